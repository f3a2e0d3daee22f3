"""Qwen Scope: TopK autoencoders of the residual stream of Qwen3 and Qwen3.5, a file `layer3.sae.pt` each.

Tensors: W_enc [F, d], W_dec [d, F], b_enc [F], b_dec [d]. f = the k largest of relu(z), z = x W_encᵀ + b_enc; nothing
is subtracted. k is in the `config.json` of some sets, else in their name (`SAE-Res-Qwen3-1.7B-Base-W32K-L0_50`). The
site is the output of the block, whose number only the file name says.
"""

from __future__ import annotations

import re
from pathlib import Path

from typing_extensions import TypedDict

from sae.autoencoder import SparseAutoencoder
from sae.errors import UserError
from sae.formats.common import build, pick, read_entries, read_pickle, whole_number
from sae.formats.site_names import dictionary_site

NAME = "qwen_scope"
FILE = r"layer\d+\.sae\.pt"
CONFIG = "config.json"
_TENSORS = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}


class _Config(TypedDict, total=False):
    """The entries of `config.json` that are read."""

    base_model: str | None
    k: int | None
    hook_point: str | None


def read(path: Path) -> SparseAutoencoder:
    """The autoencoder in a file `layer3.sae.pt`."""
    beside = path.parent / CONFIG
    config = read_entries(beside, _Config) if beside.is_file() else {}
    if (hook := config.get("hook_point", "resid_post")) != "resid_post":
        raise UserError(f"{beside} has hook_point {hook!r}: allowed is resid_post")
    where = path.absolute().as_posix()
    named = re.search(r"SAE-Res-(?P<model>[\w.-]+?)-W\d+K-L0_(?P<k>\d+)", where)
    k = config.get("k", int(named["k"]) if named else None)
    if k is None:
        raise UserError(
            f"nothing says how many features of {path} are active on a token: keep the folder's name, such as "
            f'SAE-Res-Qwen3-1.7B-Base-W32K-L0_50, or write {{"k": 50}} to {CONFIG} beside it'
        )
    tensors = pick(read_pickle(path), _TENSORS, source=path, what="a Qwen Scope autoencoder")
    tensors["W_dec"] = tensors["W_dec"].T
    return build(
        tensors,
        source=path,
        file_format=NAME,
        architecture="topk",
        subtract_b_dec=False,
        k=whole_number(k, "k", source=beside if beside.is_file() else path),
        ranked=True,
        site=dictionary_site(path.name),
        model=config.get("base_model") or (f"Qwen/{named['model']}" if named else ""),
    )

"""Transcoders of GPT-2 small (Dunefsky, Chlenski, Nanda 2024, arXiv 2406.11944; hub `pchlenski/gpt2-transcoders`).

Files `final_sparse_autoencoder_gpt2-small_blocks.3.ln2.hook_normalized_24576.pt`: a dictionary of `cfg`, an object of
their class, and `state_dict` with W_enc [d, F], b_enc, W_dec [F, d], b_dec (subtracted from the input) and b_dec_out.
f = relu((x − b_dec) W_enc + b_enc), y = f W_dec + b_dec_out; x is the normalised residual stream before the norm's
gain, y what the MLP adds, of which TransformerLens had taken the mean over dimensions away. The bias of the input goes
into that of the encoder.

The pickle is opened with `weights_only`; in place of their class it gets one that keeps entries and does nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from sae.autoencoder import SparseAutoencoder
from sae.errors import UserError
from sae.formats.common import build, pick, read_pickle
from sae.formats.site_names import dictionary_site, read_place

NAME = "transcoder_circuits"
FILE = r"final_sparse_autoencoder_.*\.pt"
THEIR_CONFIGS = ("sae_training.config.LanguageModelSAERunnerConfig", "sae_training.config.SAERunnerConfig")
_TENSORS = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec_out", "centre": "b_dec"}


class _Entries:
    """Stands for their config."""


def read(path: Path) -> SparseAutoencoder:
    """The transcoder in a file of theirs."""
    with torch.serialization.safe_globals([(_Entries, name) for name in THEIR_CONFIGS]):  # type: ignore[list-item]
        loaded = read_pickle(path)
    state = loaded.get("state_dict")
    if not isinstance(state, Mapping):
        raise UserError(f"{path}: looked for the entry 'state_dict', found {', '.join(map(repr, loaded)) or 'none'}")
    named = re.search(r"(blocks\.\d+\.[\w.]+)_\d+\.pt$", path.name)
    hook = named[1] if named else ""
    place = read_place(hook)
    if not place:
        raise UserError(f"{path}: its name says the hook {hook!r}: a transcoder reads before the MLP here")
    tensors = pick(state, _TENSORS, source=path, what="a transcoder of transcoder_circuits")
    tensors["W_enc"] = tensors["W_enc"].T
    tensors["b_enc"] = tensors["b_enc"] - tensors["W_enc"] @ tensors.pop("centre")
    return build(
        tensors,
        source=path,
        file_format=NAME,
        architecture="relu",
        subtract_b_dec=False,
        site=dictionary_site(path.name),
        model="gpt2" if "gpt2-small" in path.name else "",
        read=place,  # type: ignore[arg-type]
        notes={"hook": hook},
    )

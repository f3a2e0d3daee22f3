"""circuit-tracer's transcoders of one layer each: `layer_3.safetensors`, in a folder with `config.yaml` or without.

Tensors: W_enc [F, d], W_dec [F, d], b_enc [F], b_dec [d]; with `activation_function.threshold` [F] it is a JumpReLU,
with a `k`, here or in the config, a TopK, else a ReLU; W_skip [d, d], y += x W_skipᵀ. Nothing is subtracted.

`config.yaml` says at which TransformerLens hook all of them read (`feature_input_hook`) and where the files are
(`transcoders`, in the order of the layers); mwhanna's sets for Qwen3 have a `wandb-config.yaml` instead, and read what
the MLP takes. A cross-layer transcoder (`W_enc_3.safetensors`) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from typing_extensions import TypedDict

from sae._files import read_tensors, read_text, write_tensors, write_text
from sae._run.outputs import has_header
from sae._yaml import read_yaml
from sae.autoencoder import SKIP, ReadKind, SparseAutoencoder
from sae.errors import UserError, unknown
from sae.folding import plain_tensors
from sae.formats.common import build, pick, transcoder_hook, unsupported, whole_number
from sae.formats.refusals import refusal
from sae.formats.site_names import read_place
from sae.model.sites import Site

NAME = "circuit_tracer"
CONFIG = "config.yaml"
FILE = r"layer_(\d+)\.safetensors"
THRESHOLD = "activation_function.threshold"
_TENSORS = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_OPTIONAL = {"threshold": THRESHOLD, SKIP: "W_skip"}


class SetConfig(TypedDict, total=False):
    """The entries of `config.yaml` that are read."""

    model_name: str | None
    model_kind: str | None
    feature_input_hook: str | None
    feature_output_hook: str | None
    transcoders: list[str] | None
    activation: str | None
    k: int | None


def read_set(folder: Path) -> dict[str, Any]:
    """The config of a set, without the entries that are null; nothing where a folder has none. UserError for a set of
    anything but transcoders that write what an MLP adds.
    """
    path = folder / CONFIG
    if not path.is_file():
        return {}
    config = {key: value for key, value in read_yaml(path, SetConfig).items() if value is not None}
    kind = config.get("model_kind", "transcoder_set")
    if kind != "transcoder_set":
        raise refusal(folder, kind) or unknown(f"model_kind in {path}", kind, ("transcoder_set",))
    if (out := config.get("feature_output_hook", "hook_mlp_out")) not in ("hook_mlp_out", "mlp.hook_out"):
        raise UserError(f"{path} has feature_output_hook {out!r}: transcoders write at hook_mlp_out here")
    return config


def input_place(config: dict[str, Any], folder: Path) -> ReadKind | None:
    """The place that the transcoders of a set read; None where the config does not say. UserError for no place of a
    block.
    """
    hook = config.get("feature_input_hook")
    if hook is None:
        return None
    place = read_place(hook if "." in hook else f".{hook}")
    if not place:
        raise UserError(f"{folder / CONFIG} has feature_input_hook {hook!r}: transcoders read before the MLP here")
    return place  # type: ignore[return-value]


def read(path: Path) -> SparseAutoencoder:
    """The transcoder in a file `layer_3.safetensors`."""
    config, state = read_set(path.parent), read_tensors(path)
    match = re.fullmatch(FILE, path.name)
    k = state.pop("k", config.get("k"))
    names = _TENSORS | {ours: theirs for ours, theirs in _OPTIONAL.items() if theirs in state}
    tensors = pick(state, names, source=path, what="a transcoder of one layer")
    activation = config.get("activation", "topk" if k is not None else "relu")
    if activation not in ("relu", "topk"):
        raise unknown(f"activation in {path.parent / CONFIG}", activation, ("relu", "topk"))
    architecture = "jumprelu" if "threshold" in tensors else activation
    if architecture == "topk" and k is None:
        raise UserError(f"{path} is a TopK transcoder, and neither it nor {CONFIG} has k, the active features a token")
    return build(
        tensors,
        source=path,
        file_format=NAME,
        architecture=architecture,
        subtract_b_dec=False,
        k=whole_number(k, "k", source=path) if architecture == "topk" else None,
        ranked=architecture == "topk",
        site=f"mlp_{match[1]}" if match else "",
        model=str(config.get("model_name", "")),
        read=input_place(config, path.parent) or "mlp_in",
    )


# ---- writing

WRITTEN = "# Written by sfc convert"
"""First line of a `config.yaml` that is written here."""
GENERATOR = {"generator": "sfc"}
"""In the header of a file of tensors that is written here."""


def is_own(path: Path) -> bool:
    """Whether a file is what `write` or `write_set` left there."""
    if path.suffix == ".yaml":
        return path.is_file() and read_text(path).startswith(WRITTEN)
    return has_header(**GENERATOR)(path)


def write(sae: SparseAutoencoder, folder: Path) -> None:
    """`layer_3.safetensors` and the `config.yaml` of a set of this one transcoder; ŷ and f stay the same."""
    if not sae.config.read or sae.nonlinearity.name not in ("relu", "topk", "jumprelu"):
        raise unsupported(sae, NAME)
    hook = transcoder_hook(sae, NAME)
    tensors = plain_tensors(sae, subtract_b_dec=False)
    state = {theirs: tensors[ours].contiguous() for ours, theirs in _TENSORS.items()}
    state |= {theirs: tensors[ours].contiguous() for ours, theirs in _OPTIONAL.items() if ours in tensors}
    name = f"layer_{Site.parse(sae.config.site).layer}.safetensors"
    if sae.nonlinearity.name == "topk":
        state["k"] = torch.tensor(sae.config.k)
    write_tensors(folder / name, state, metadata=GENERATOR)
    write_set(folder, [name], hook, model=sae.config.model)


def write_set(folder: Path, files: Sequence[str], hook: str, *, model: str) -> None:
    """The `config.yaml` of transcoders, in the order of the layers, that all read at a hook of their block."""
    config = {
        "model_name": model, "model_kind": "transcoder_set", "feature_input_hook": hook.split(".", 2)[2],
        "feature_output_hook": "hook_mlp_out", "transcoders": list(files),
    }  # fmt: skip
    write_text(folder / CONFIG, f"{WRITTEN}\n{yaml.safe_dump(config, sort_keys=False)}")

"""circuit-tracer's transcoders of one layer each: `layer_3.safetensors`, in a folder with `config.yaml` or without.

Tensors: W_enc [F, d], W_dec [F, d], b_enc [F], b_dec [d]; with `activation_function.threshold` [F] it is a JumpReLU,
with a `k`, here or in the config, a TopK, else a ReLU; W_skip [d, d], y += x W_skipᵀ. Nothing is subtracted.

`config.yaml` says at which TransformerLens hook all of them read (`feature_input_hook`) and where the files are
(`transcoders`, in the order of the layers); mwhanna's sets for Qwen3 have a `wandb-config.yaml` instead, and read what
the MLP takes. A cross-layer transcoder (`W_enc_3.safetensors`) is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from typing_extensions import TypedDict

from sae._files import check_type, read_tensors, read_text
from sae.autoencoder import SKIP, ReadKind, SparseAutoencoder
from sae.errors import UserError, unknown
from sae.formats.common import build, pick, whole_number
from sae.formats.refusals import refusal
from sae.formats.site_names import read_place

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
    try:
        loaded = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not YAML ({reason[:120]})") from None
    config = {key: value for key, value in check_type(loaded, SetConfig, path).items() if value is not None}
    kind = config.get("model_kind", "transcoder_set")
    if kind != "transcoder_set":
        raise refusal(folder, kind) or unknown(f"model_kind in {path}", kind, ("transcoder_set",))
    if (out := config.get("feature_output_hook", "hook_mlp_out")) not in ("hook_mlp_out", "mlp.hook_out"):
        raise UserError(f"{path} has feature_output_hook {out!r}: transcoders write at hook_mlp_out here")
    return config


def input_place(config: dict[str, Any], folder: Path) -> ReadKind | None:
    """Where the transcoders of a set read; None where the config does not say. UserError for no place of a block."""
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

"""Llama Scope (He et al. 2024, arXiv 2410.20526): `hyperparams.json` and `checkpoints/final.safetensors`.

Tensors: encoder.weight [F, d], encoder.bias [F], decoder.weight [d, F], decoder.bias [d]. Training scaled inputs to an
average norm of √d and outputs likewise, s_in = √d / norm_in and s_out = √d / norm_out. As its owners read the files,

1. the scales are folded: b_enc / s_in, W_dec · s_in / s_out, b_dec / s_out, W_enc as it is;
2. the decoder is brought to unit rows (`sparsity_include_decoder_norm`, on unless said otherwise);
3. f = z 1[z > jump_relu_threshold]: one threshold, in units of x and of unit rows, so it is not scaled with 1 and 2.

A topk file with a threshold above 0 is read as jumprelu, as its owners do. A file with different input and output hooks
is a transcoder, whose input hook is one before the MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypedDict

from sae._files import read_tensors
from sae.autoencoder import SparseAutoencoder
from sae.errors import UserError
from sae.folding import fold_norms
from sae.formats.common import LINEAR, build, entry, pick, positive, read_entries
from sae.formats.refusals import refusal
from sae.formats.site_names import read_place, site_named

NAME = "llama_scope"
CONFIG = "hyperparams.json"
WEIGHTS = ("checkpoints/pruned.safetensors", "checkpoints/final.safetensors", "sae_weights.safetensors")
_TENSORS = LINEAR | {"b_dec": "decoder.bias"}


class _Config(TypedDict, total=False):
    """The entries of `hyperparams.json` that are read."""

    sae_type: str | None
    hook_point_in: str
    hook_point_out: str | None
    use_glu_encoder: bool | None
    sparsity_include_decoder_norm: bool | None
    jump_relu_threshold: float | None
    act_fn: str | None
    apply_decoder_bias_to_pre_encoder: bool | None
    top_k: int | None
    norm_activation: str | None
    dataset_average_activation_norm: dict[str, float] | None


def read(folder: Path) -> SparseAutoencoder:
    """The autoencoder in a folder with `hyperparams.json`."""
    config = read_entries(folder / CONFIG, _Config)
    if kind := config.get("sae_type", "sae").replace("sae", ""):
        raise refusal(folder, kind) or UserError(f"{folder / CONFIG} has sae_type {kind!r}: allowed is sae")
    hook = entry(config, "hook_point_in", source=folder / CONFIG)
    out = config.get("hook_point_out", hook)
    place = "" if out == hook else read_place(hook)
    if out != hook and not place:
        raise UserError(f"{folder / CONFIG} has hook_point_in {hook!r}: transcoders read before the MLP here")
    if config.get("use_glu_encoder"):
        raise UserError(f"{folder / CONFIG} has use_glu_encoder: allowed is a linear encoder")
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), folder / WEIGHTS[1])
    tensors = pick(read_tensors(weights), _TENSORS, source=weights, what="a Llama Scope autoencoder")
    tensors["W_dec"] = tensors["W_dec"].T
    tensors = _scaled(tensors, config, folder / CONFIG)
    unit_rows = config.get("sparsity_include_decoder_norm", True)
    if unit_rows:
        tensors = fold_norms(tensors)
    threshold = float(config.get("jump_relu_threshold", 0.0))
    activation = config.get("act_fn", "relu")
    if activation == "jumprelu" or (activation == "topk" and threshold > 0):
        architecture = "jumprelu"
        tensors["threshold"] = torch.full_like(tensors["b_enc"], threshold)
    elif activation in ("relu", "topk"):
        architecture = activation
    else:
        allowed = UserError(f"{folder / CONFIG} has act_fn {activation!r}: allowed are jumprelu, topk and relu")
        raise refusal(folder, activation) or allowed
    return build(
        tensors,
        source=folder,
        file_format=NAME,
        architecture=architecture,
        subtract_b_dec=bool(config.get("apply_decoder_bias_to_pre_encoder", False)),
        k=config.get("top_k") if architecture == "topk" else None,
        ranked=architecture == "topk" and not unit_rows,
        site=site_named(out),
        read=place,  # type: ignore[arg-type]
        model="meta-llama/Llama-3.1-8B" if "Llama3_1-8B" in folder.as_posix() else "",
        notes={"hook": hook},
    )


def _scaled(tensors: dict[str, Tensor], config: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Step 1: the tensors in units of x."""
    norm = config.get("norm_activation", "dataset-wise")
    if norm in ("none", "inference", None):
        return tensors
    if norm != "dataset-wise":
        raise UserError(f"{path} has norm_activation {norm!r}: allowed are dataset-wise, inference and none")
    average = entry(config, "dataset_average_activation_norm", source=path)
    root = len(tensors["b_dec"]) ** 0.5
    s_in, s_out = (root / positive(average, side, source=path) for side in ("in", "out"))
    return {
        **tensors,
        "b_enc": tensors["b_enc"] / s_in,
        "W_dec": tensors["W_dec"] * (s_in / s_out),
        "b_dec": tensors["b_dec"] / s_out,
    }

"""Scales, norms and biases moved into the tensors of an autoencoder, without changing what it computes.

1. `fold_scale`: an autoencoder trained on x / scale becomes one of x.
2. `fold_norms`: decoder rows of any norm become unit rows.
3. `fold_reading`: a transcoder trained on (x_r − c_r) / s_r becomes one of x_r.
4. `plain_tensors`: the decoder bias is subtracted from the input, or not, as another format has it.

All rest on activation functions being positively homogeneous in x together with the tensors measured in units of
activations (`sae.activation_functions`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sae.autoencoder import SKIP, SparseAutoencoder

IN_ACTIVATION_UNITS = ("b_enc", "threshold", "gate_bias", "b_dec")
SCALED_WITH_FEATURE = ("W_enc", "b_enc", "threshold", "gate_bias")


def fold_scale(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Tensors that do on x what the given ones do on x / scale: f′(x) = scale f(x / scale), x̂ likewise."""
    return {name: tensor * scale if name in IN_ACTIVATION_UNITS else tensor for name, tensor in tensors.items()}


def fold_norms(tensors: Mapping[str, Tensor], *, ranked: bool = False) -> dict[str, Tensor]:
    """Give the decoder unit rows without changing x̂: f′_i = f_i ‖W_dec[i]‖. Rows that are zero stay zero.

    `ranked`: features compete by their size (top k), so a `rank_scale` [F] keeps that order unless all norms are 1.
    """
    norms = tensors["W_dec"].norm(dim=-1)  # [F]
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    folded = dict(tensors)
    folded["W_dec"] = tensors["W_dec"] / norms[:, None]
    for name in SCALED_WITH_FEATURE:
        if name in folded:
            tensor = tensors[name]
            folded[name] = tensor * (norms[:, None] if tensor.dim() == 2 else norms)
    if ranked and not torch.allclose(norms, torch.ones_like(norms), atol=1e-5):
        folded["rank_scale"] = tensors.get("rank_scale", torch.ones_like(norms)) / norms
    return folded


def fold_reading(tensors: dict[str, Tensor], centre: Tensor, ratio: float) -> dict[str, Tensor]:
    """Encoder and skip connection for what a transcoder reads as it is: W′ = W s / s_r and biases less W′ c_r.

    Args:
        tensors: those of the transcoder; biases are in units of what it writes already.
        centre: c_r [r].
        ratio: the scale of what is written by that of what is read, s / s_r.
    """
    tensors = tensors | {key: tensors[key] * ratio for key in ("W_enc", SKIP) if key in tensors}
    shift = tensors["W_enc"] @ centre  # [F]
    if "gate_bias" in tensors:
        tensors["gate_bias"] = tensors["gate_bias"] - shift
    tensors["b_enc"] = tensors["b_enc"] - shift * tensors.get("magnitude", torch.ones_like(shift))
    if SKIP in tensors:
        tensors["b_dec"] = tensors["b_dec"] - tensors[SKIP] @ centre
    return tensors


def plain_tensors(sae: SparseAutoencoder, *, subtract_b_dec: bool) -> dict[str, Tensor]:
    """Tensors that give the same x̂ when b_dec is subtracted from the input, or when it is not.

    1. W (x − b_dec) + b = W x + (b − W b_dec): the biases take up the difference, that of the gate too.
    2. A top-k selection that goes by activations before the decoder was normalised (`rank_scale` r) gets the old
       decoder back: W_dec / r, W_enc · r, b_enc · r. Then f is the format's, not f · ‖W_dec‖.
    """
    tensors = {name: tensor.detach().cpu().double() for name, tensor in sae.named_buffers()}
    if sae.config.subtract_b_dec != subtract_b_dec:
        shift = tensors["W_enc"] @ tensors["b_dec"]  # [F]
        if not subtract_b_dec:
            shift = -shift
        if "gate_bias" in tensors:
            tensors["gate_bias"] = tensors["gate_bias"] + shift
        tensors["b_enc"] = tensors["b_enc"] + shift * tensors.get("magnitude", torch.ones(()))
    if "rank_scale" in tensors:
        scale = tensors.pop("rank_scale")
        tensors["W_dec"] = tensors["W_dec"] / scale[:, None]
        tensors["W_enc"] = tensors["W_enc"] * scale[:, None]
        tensors["b_enc"] = tensors["b_enc"] * scale
    return {name: tensor.float() for name, tensor in tensors.items()}

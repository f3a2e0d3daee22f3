"""What all writers share: our tensors in the conventions of a format that has no place for ours."""

from __future__ import annotations

import torch
from torch import Tensor

from sae.autoencoder import SparseAutoencoder
from sae.errors import UserError


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


def unsupported(sae: SparseAutoencoder, file_format: str) -> UserError:
    """The format has no such architecture."""
    return UserError(
        f"{file_format} has no class for a {sae.config.architecture!r} autoencoder: save it in our own format"
    )

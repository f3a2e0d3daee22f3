"""How pre-activations become features once training is over.

With z = W_enc x + b_enc  [N, F]:

- relu      f = max(z, 0)
- topk      f = max(z, 0) for the k largest z of a token, else 0 (Gao et al. 2024, arXiv 2406.04093)
- jumprelu  f = max(z, 0) · 1[z > θ], one threshold a feature (Rajamanoharan et al. 2024b, arXiv 2407.14435)
- gated     f = 1[z + gate_bias > 0] · max(magnitude · z + b_enc, 0), where z = W_enc x has no bias
            (Rajamanoharan et al. 2024a, arXiv 2404.16014; magnitude = exp(r_mag))
- identity  f = z, or magnitude · z + b_enc: the neurons themselves

All of them are linear in x where the set of active features does not change, and positively homogeneous in x together
with the tensors measured in units of activations: `sae.folding` rests on that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

CORE = ("W_enc", "b_enc", "W_dec", "b_dec")
"""Tensors that every autoencoder has: [F, d], [F], [F, d], [d]."""


@dataclass(frozen=True)
class ActivationFunction:
    """From z = x W_encᵀ to features."""

    name: str
    """How it is called in messages."""
    apply: Callable[[Tensor, Mapping[str, Tensor], int | None], Tensor]
    """(z [N, F] without bias, tensors by name, k) -> f [N, F]; z may be overwritten."""
    extra: tuple[str, ...] = ()
    """Per-feature tensors [F] needed beside the core ones."""
    optional: tuple[str, ...] = ()
    """Per-feature tensors [F] that are used when present."""
    needs_k: bool = False
    """Whether the number of active features a token, k, is part of it."""


def _relu(z: Tensor, tensors: Mapping[str, Tensor], k: int | None) -> Tensor:
    return (z + tensors["b_enc"]).relu()


def _identity(z: Tensor, tensors: Mapping[str, Tensor], k: int | None) -> Tensor:
    z = z * tensors["magnitude"] if "magnitude" in tensors else z
    return z + tensors["b_enc"]


def _topk(z: Tensor, tensors: Mapping[str, Tensor], k: int | None) -> Tensor:
    assert k is not None
    z = z + tensors["b_enc"]
    values, index = top_features(z, k, tensors.get("rank_scale"))
    return torch.zeros_like(z).scatter(-1, index, values)


def _jumprelu(z: Tensor, tensors: Mapping[str, Tensor], k: int | None) -> Tensor:
    z = z + tensors["b_enc"]
    return z.relu() * (z > tensors["threshold"])


def _gated(z: Tensor, tensors: Mapping[str, Tensor], k: int | None) -> Tensor:
    magnitude = torch.addcmul(tensors["b_enc"], z, tensors["magnitude"])
    return magnitude.relu() * (z + tensors["gate_bias"] > 0)


RELU = ActivationFunction("relu", _relu)
IDENTITY = ActivationFunction("identity", _identity, optional=("magnitude",))
TOPK = ActivationFunction("topk", _topk, optional=("rank_scale",), needs_k=True)
JUMPRELU = ActivationFunction("jumprelu", _jumprelu, extra=("threshold",))
GATED = ActivationFunction("gated", _gated, extra=("gate_bias", "magnitude"))


def top_features(z: Tensor, k: int, rank_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k features of a token with the largest z (times `rank_scale` where given), values max(z, 0): two [..., k]."""
    if rank_scale is None:
        values, index = z.topk(k, dim=-1, sorted=False)
    else:
        index = (z * rank_scale).topk(k, dim=-1, sorted=False).indices
        values = z.gather(-1, index)
    return values.relu(), index

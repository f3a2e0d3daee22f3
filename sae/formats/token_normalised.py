"""Autoencoders that normalise their input token by token (OpenAI's TopK, SAELens' layer_norm), made affine in f.

Such an autoencoder computes, with μ and σ the mean and scale of x over its d entries and E, D, b those of training,

    f = E((x − μ)/σ),   x̂ = σ (f D + b) + μ.

That is affine in f for one token only: σ and μ differ from token to token, while feature effects, edits and sums over
tokens need one decoder for all. In units of x it becomes exactly so:

1. f_i := σ f_i, the length of what feature i writes;
2. one more feature, σ ‖b‖, writes along b / ‖b‖;
3. one more, μ √d, writes along the direction of equal entries (`layer_norm` only; it may be negative).

Then x̂ = Σ f_i W_dec[i] with unit rows and no bias: the x̂ of the file to rounding. The last one or two features are
active on every token. What is lost: f is not piecewise linear in x, so a feature has no encoder row and edges cannot be
computed; and of the formats that are written only SAELens' holds the normalisation.

OpenAI's normalisation: Gao et al. 2024 (arXiv 2406.04093), appendix A; σ is the unbiased standard deviation.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sae.autoencoder import INPUT_NORM, SparseAutoencoder
from sae.errors import UserError, unknown

EPSILON = 1e-5
NORMS = ("layer_norm", "constant_norm")


class NormalisedAutoencoder(SparseAutoencoder):
    """An autoencoder around another one that reads normalised tokens."""

    def __init__(self, inner: SparseAutoencoder, *, norm: str):
        if norm not in NORMS:
            raise unknown("norm", norm, NORMS)
        b_dec = inner.b_dec
        extra_rows = [b_dec / b_dec.norm().clamp(min=torch.finfo(b_dec.dtype).tiny)]
        if norm == "layer_norm":
            extra_rows.append(torch.full_like(b_dec, len(b_dec) ** -0.5))
        n_extra = len(extra_rows)
        tensors = {
            name: torch.cat([tensor, tensor.new_zeros(n_extra, *tensor.shape[1:])])
            for name, tensor in inner.named_buffers()
            if name not in ("W_dec", "b_dec")
        }
        tensors |= {"W_dec": torch.cat([inner.W_dec, torch.stack(extra_rows)]), "b_dec": torch.zeros_like(b_dec)}
        n_features = inner.config.n_features + n_extra
        super().__init__(
            replace(inner.config, n_features=n_features, extra={**inner.config.extra, INPUT_NORM: norm}), tensors
        )
        self.inner, self.norm = inner, norm
        # Features depend on the scale of the whole token, so no subset of them can be encoded alone.
        self.nonlinearity = replace(self.nonlinearity, needs_k=True)

    def encode(self, x: Tensor) -> Tensor:
        """x [..., d] -> f [..., F + 1 or F + 2]."""
        x = x.to(self.W_dec.dtype)
        d = x.shape[-1]
        if self.norm == "constant_norm":
            scale = x.norm(dim=-1, keepdim=True) / d**0.5  # [..., 1]
            normal, extra = x / scale.clamp(min=torch.finfo(x.dtype).tiny), []
        else:
            mean = x.mean(-1, keepdim=True)
            scale = (x - mean).std(-1, keepdim=True)
            normal, extra = (x - mean) / (scale + EPSILON), [mean * d**0.5]
        return torch.cat([scale * self.inner.encode(normal), scale * self.inner.b_dec.norm(), *extra], dim=-1)

    def _encode_chunk(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        f = self.encode(x)
        token, feature = f.nonzero(as_tuple=True)
        return token + start, feature, f[token, feature]

    def encoder_rows(self, index: Tensor) -> Tensor:
        """There are none: an error that says so."""
        raise edge_refusal(self.config.site)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Our format does not hold the normalisation: an error that says so."""
        raise norm_refusal(self, "our format")


def edge_refusal(site: str) -> UserError:
    """The error for edges of features that are not linear in the activations; raise what this returns."""
    return UserError(
        f"the autoencoder of site {site!r} normalises each token, so its features are not linear in the activations "
        "and have no edges: compute nodes only (--edge-nodes 0, edge_nodes=0 in Python), or use another autoencoder"
    )


def norm_refusal(sae: SparseAutoencoder, file_format: str) -> UserError:
    """The error for a format that does not hold how each token is normalised; raise what this returns."""
    return UserError(
        f"the autoencoder of site {sae.config.site!r} normalises each token ({sae.config.input_norm}) and cannot be "
        f"saved in {file_format}: keep its own file {sae.config.extra.get('source')!r}, or convert it to saelens"
    )

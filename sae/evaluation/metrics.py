"""Metrics of sparse autoencoders, each with its formula, pooled over all tokens that were fed in.

1. `ReconstructionTotals` collects sums over tokens of x, x̂ and x − x̂: explained variance, MSE, cosine, L2 ratio,
   relative reconstruction bias.
2. `FeatureTotals` collects sums over the nonzero activations: L0, density, dead and dense fractions, shrinkage.

Those over next-token predictions are in `sae.data.predictions`.

A batch only ever adds to sums and a ratio is taken once, at the end, so no number depends on how tokens were batched (a
mean of batch ratios does). Sums are float64. The functions `explained_variance(x, x_hat)`, ... are the same
definitions for tensors that are all there at once.

Shapes: N tokens, d model width, F features, n nonzero activations.

Explained variance about the mean and the CE score follow Gao et al. 2024 (arXiv 2406.04093) and Marks et al. 2024
(arXiv 2403.19647); the relative reconstruction bias is Rajamanoharan et al. 2024 (arXiv 2404.16014).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sae.data.predictions import Totals, double, ratio, total
from sae.sparse.activations import row_blocks

DENSE_DENSITY = 0.1
"""A feature that is active on more than this share of the tokens is called dense."""


class ReconstructionTotals(Totals):
    """Running sums over tokens that tell how well x̂ rebuilds x."""

    def __init__(self) -> None:
        self.n_tokens = 0
        self.width = 0
        self._mean = torch.zeros(0, dtype=torch.float64)  # [d] mean of x over the tokens so far
        self._deviation = 0.0  # Σ ‖x − x̄‖², x̄ over the tokens so far
        self._error = 0.0  # Σ ‖x − x̂‖²
        self._rebuilt = 0.0  # Σ ‖x̂‖²
        self._dot = 0.0  # Σ ⟨x, x̂⟩
        self._n_cosine, self._cosine = 0, 0.0
        self._n_norm_ratio, self._norm_ratio = 0, 0.0

    def update(self, x: Tensor, x_hat: Tensor) -> None:
        """Add tokens. x, x_hat: [N, d] (or [..., d])."""
        x, x_hat = x.reshape(-1, x.shape[-1]).float(), x_hat.reshape(-1, x_hat.shape[-1]).float()
        if not len(x):
            return
        self._add_deviation(x)
        dot, x_squared, x_hat_squared = (x * x_hat).sum(-1), x.square().sum(-1), x_hat.square().sum(-1)  # [N] each
        self._error += total((x - x_hat).square().sum(-1))
        self._rebuilt += total(x_hat_squared)
        self._dot += total(dot)
        has_norm, has_both = x_squared > 0, (x_squared > 0) & (x_hat_squared > 0)
        self._n_norm_ratio += int(has_norm.sum())
        self._norm_ratio += total((x_hat_squared / x_squared)[has_norm].sqrt())
        self._n_cosine += int(has_norm.sum())
        self._cosine += total((dot / (x_squared.sqrt() * x_hat_squared.sqrt()))[has_both])

    def _add_deviation(self, x: Tensor) -> None:
        """Merge the batch into mean and Σ‖x − x̄‖² (Chan et al. 1979): no difference of large sums is ever taken."""
        n, new = self.n_tokens, len(x)
        batch_mean = double(x.mean(0))
        batch_mean = batch_mean + double(x - batch_mean.to(x)).mean(0)  # the rounding of the float32 mean, repaired
        deviation = total((x - batch_mean.to(x)).square().sum(-1))
        batch_mean = batch_mean.cpu()
        if n == 0:
            self.width, self._mean = x.shape[-1], torch.zeros_like(batch_mean)
        shift = batch_mean - self._mean  # [d]
        self._deviation += deviation + float(shift.square().sum()) * n * new / (n + new)
        self._mean = self._mean + shift * (new / (n + new))
        self.n_tokens = n + new

    @property
    def explained_variance(self) -> float:
        """1 − Σ‖x − x̂‖² / Σ‖x − x̄‖², x̄ the mean of x over all tokens (per dimension, not per batch)."""
        return 1.0 - ratio(self._error, self._deviation)

    @property
    def mse(self) -> float:
        """Σ‖x − x̂‖² / (N·d): the mean over tokens and dimensions."""
        return ratio(self._error, self.n_tokens * self.width)

    @property
    def cosine(self) -> float:
        """Mean over tokens of ⟨x, x̂⟩ / (‖x‖ ‖x̂‖); 0 where x̂ = 0; tokens with x = 0 are left out."""
        return ratio(self._cosine, self._n_cosine)

    @property
    def l2_ratio(self) -> float:
        """Mean over tokens of ‖x̂‖ / ‖x‖; below 1 the autoencoder shrinks its input. Tokens with x = 0 are left out."""
        return ratio(self._norm_ratio, self._n_norm_ratio)

    @property
    def relative_bias(self) -> float:
        """Σ‖x̂‖² / Σ⟨x, x̂⟩: 1 is unbiased, below 1 the reconstruction is systematically too short."""
        return ratio(self._rebuilt, self._dot)


@dataclass(frozen=True)
class DensityHistogram:
    """How often features fire, on a logarithmic scale."""

    edges: list[float]
    """Edges of the bins in log10(density), one more than there are bins."""
    counts: list[int]
    """Number of live features in each bin; the first and last bin also hold what lies beyond them."""
    dead: int
    """Number of features that never fired and so have no logarithm."""


class FeatureTotals(Totals):
    """Running sums per feature over the nonzero activations."""

    def __init__(self, n_features: int) -> None:
        self.n_features = n_features
        self.n_tokens = 0
        self.count = torch.zeros(n_features, dtype=torch.int64)  # [F] tokens on which the feature is not 0
        self.total = torch.zeros(n_features, dtype=torch.float64)  # [F] Σ f
        self.squared = torch.zeros(n_features, dtype=torch.float64)  # [F] Σ f²
        self.maximum = torch.zeros(n_features)  # [F] largest activation, 0 for a feature that never fired
        self._aligned = torch.zeros(n_features, dtype=torch.float64)  # [F] Σ f · ⟨x − x̂, W_dec row⟩

    def update(self, feature: Tensor, value: Tensor, n_tokens: int, *, alignment: Tensor | None = None) -> None:
        """Add the nonzero activations of `n_tokens` tokens.

        feature: [n] feature index of each nonzero activation; value: [n] its activation; alignment: [n] the dot product
        of the error at its token with the feature's unit decoder row (`error_alignment`), for `shrinkage` only.
        """
        self.n_tokens += n_tokens
        value = value.float()
        if value.device.type == "mps":  # some of what follows is missing there, or in float64
            feature, value, alignment = feature.cpu(), value.cpu(), None if alignment is None else alignment.cpu()
        self.count += torch.bincount(feature, minlength=self.n_features).cpu()
        self.total += self._per_feature(feature, value)
        self.squared += self._per_feature(feature, value.square())
        largest = torch.zeros(self.n_features, device=value.device)
        self.maximum = self.maximum.maximum(largest.scatter_reduce_(0, feature, value, "amax").cpu())
        if alignment is not None:
            self._aligned += self._per_feature(feature, value * alignment)

    def _per_feature(self, feature: Tensor, weight: Tensor) -> Tensor:
        return torch.bincount(feature, weights=weight.double(), minlength=self.n_features).cpu()

    @property
    def l0(self) -> float:
        """Σ_t #{i : f_i(t) ≠ 0} / N: mean number of active features per token."""
        return ratio(float(self.count.sum()), self.n_tokens)

    @property
    def density(self) -> Tensor:
        """[F] share of the tokens on which each feature is active."""
        return self.count.double() / max(self.n_tokens, 1)

    @property
    def dead_fraction(self) -> float:
        """Share of the features that were active on none of the N tokens; it falls with N, so say N beside it."""
        return float((self.count == 0).double().mean())

    @property
    def dense_fraction(self) -> float:
        """Share of the features that were active on more than a tenth (`DENSE_DENSITY`) of the tokens."""
        return float((self.density > DENSE_DENSITY).double().mean())

    @property
    def shrinkage_per_feature(self) -> Tensor:
        """[F] s_i = Σ_t f_i ⟨e, d_i⟩ / Σ_t f_i², d_i the unit decoder row; nan for a feature that never fired.

        The squared error is smallest when f_i is multiplied by 1 + s_i and all else stays: s_i > 0 means that the
        feature is too weak (feature suppression, Wright & Sharkey 2024), 0 that no rescaling of it helps.
        """
        return torch.where(self.count > 0, self._aligned / self.squared.clamp(min=1e-300), torch.nan)

    @property
    def shrinkage(self) -> float:
        """Σ_i Σ_t f_i ⟨e, d_i⟩ / Σ_i Σ_t f_i²: `shrinkage_per_feature` averaged with the features' energy as weight."""
        return ratio(float(self._aligned.sum()), float(self.squared.sum()))

    def density_histogram(self, *, low: float = -6.0, bins_per_decade: int = 4) -> DensityHistogram:
        """Histogram of log10(density) over the live features, from `low` to 0."""
        n_bins = round(-low * bins_per_decade)
        edges = torch.linspace(low, 0.0, n_bins + 1, dtype=torch.float64)
        log_density = self.density[self.count > 0].log10()
        index = torch.bucketize(log_density, edges, right=True).sub(1).clamp(0, n_bins - 1)
        counts = torch.bincount(index, minlength=n_bins)
        return DensityHistogram(edges.tolist(), counts.tolist(), int((self.count == 0).sum()))


def explained_variance(x: Tensor, x_hat: Tensor) -> float:
    """1 − Σ‖x − x̂‖² / Σ‖x − x̄‖² with x̄ the mean over these tokens. x, x_hat: [..., d]."""
    totals = ReconstructionTotals()
    totals.update(x, x_hat)
    return totals.explained_variance


def l0(f: Tensor) -> float:
    """Mean number of nonzero features per token. f: [..., F]."""
    return ratio(float((f != 0).sum()), f[..., 0].numel())


def ce_recovered(*, ce_model: float, ce_sae: float, ce_zero: float) -> float:
    """(CE_zero − CE_sae) / (CE_zero − CE_model): 1 when the autoencoder costs nothing, 0 when it is as bad as zeros.

    nan where zeros cost nothing: such a site's score has no meaning.
    """
    return ratio(ce_zero - ce_sae, ce_zero - ce_model)


def kl_recovered(*, kl_sae: float, kl_zero: float) -> float:
    """(KL_zero − KL_sae) / KL_zero: the share of the damage done by zeros that the autoencoder avoids."""
    return ratio(kl_zero - kl_sae, kl_zero)


def error_alignment(
    error: Tensor, W_dec: Tensor, token: Tensor, feature: Tensor, *, chunk_bytes: int = 64 * 2**20
) -> Tensor:
    """[n] ⟨e_t, W_dec[i]⟩ for each nonzero activation (t, i), in chunks of bounded memory.

    error: [N, d] what the reconstruction misses; W_dec: [F, d]; token, feature: [n].
    """
    blocks = row_blocks(len(token), 8 * error.shape[-1], chunk_bytes)
    products = [torch.einsum("nd,nd->n", error[token[block]], W_dec[feature[block]]) for block in blocks]
    return torch.cat(products) if products else error.new_zeros(0)

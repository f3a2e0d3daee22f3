"""A finished autoencoder made trainable again, of whatever architecture and origin, for `sae.training.finetuning`.

1. Its tensors are brought to inputs of unit variance (Σ over d), as in training, so that one learning rate fits all.
2. A call is its own inference, x -> x̂, differentiable in the weights and in x: with π = W_enc (x − b_dec),
   f_i = max(gain_i π_i + b_i, 0) at the active features, which are the k largest (top k) or those with π_i > cut_i:
   relu      cut = −b                         gain 1
   jumprelu  cut = max(θ, 0) − b              gain 1
   gated     cut = max(−gate_bias, −b / gain) gain = magnitude
   Only entries of active features wait for the backward pass (`sae.sparse.activations`), so no [N, F] stays in
   memory.
3. Sparsity stays what it was. Top k is exact. Elsewhere one shift δ of all cuts of the site follows L0: were margins
   π − cut exponentially distributed with mean μ, as their tail nearly is, a shift by μ ln(L0 / L0 wanted) would bring
   L0 there at once; `STEERING` of it is made a step. θ rises by δ, b (relu) and gate_bias fall by it. A cut does not
   go below the π at which the feature is zero anyway: θ stays positive, gate_bias below b / gain.
4. Decoder rows stay unit vectors: the gradient along them is removed, and they are normalised after each step.

Which features are active has no gradient, as in training of TopK; thresholds and gate biases move with δ only.
N tokens, d width, F features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sae.activation_functions import CORE, GATED, IDENTITY, JUMPRELU, RELU, TOPK
from sae.autoencoder import SKIP, SparseAutoencoder
from sae.errors import UserError
from sae.folding import fold_scale
from sae.sparse.activations import SparseActs, normalize_rows_, remove_parallel_
from sae.sparse.encoder_pass import EncoderPass, above, top_k

STEERING = 0.1
"""Share of the estimated way to the wanted L0 that the cuts go in one step."""
LARGEST_LOG = 1.0
"""Bound on |ln(L0 / L0 wanted)| in one step."""
SMALLEST_GAIN = 1e-6


class Reconstruction(NamedTuple):
    """The reconstruction of N tokens."""

    x_hat: Tensor  # [N, d]
    acts: SparseActs  # the active entries; with top k some may be zero
    n_active: Tensor  # scalar, the number of features that are not zero


def check_trainable(saes: Iterable[SparseAutoencoder]) -> None:
    """`UserError` for the first of some autoencoders that cannot be fine-tuned."""
    for sae in saes:
        site = sae.config.site
        if sae.nonlinearity.name == IDENTITY.name:
            raise UserError(f"the dictionary of site {site!r} is the neurons: there is nothing to fine-tune")
        if norm := sae.config.input_norm:
            raise UserError(
                f"the autoencoder of site {site!r} normalises each token ({norm}), and fine-tuning has no such step: "
                "leave the site out with --sites, or take an autoencoder that reads the activations themselves"
            )


class FinetuningSAE:
    """An autoencoder whose weights can be moved; `state` are the tensors that move without a gradient."""

    def __init__(self, sae: SparseAutoencoder, *, scale: float, l0: float, read_scale: float | None = None):
        """`scale` is the root of the variance Σ_d of x, `l0` the mean number of active features to keep; `read_scale`
        as `scale`, of what a transcoder reads.
        """
        check_trainable([sae])
        self.config, self.nonlinearity = sae.config, sae.nonlinearity
        self.scale, self.l0, self.read_scale = scale, l0, read_scale or scale
        tensors = {name: tensor.detach() for name, tensor in sae.named_buffers()}
        tensors = _scaled_maps(fold_scale(tensors, 1 / scale), self.read_scale / scale)
        trained = (*CORE, "magnitude") if self.nonlinearity.name == GATED.name else CORE
        trained = (*trained, SKIP) if sae.has_skip else trained
        self.weights = {name: tensors[name].clone().requires_grad_() for name in trained}
        self.state = {name: tensor.clone() for name, tensor in tensors.items() if name not in trained}

    def __call__(self, x: Tensor) -> Reconstruction:
        """Reconstruct what is read, x [N, r] -> x̂ [N, d], raw activations both; with the active features."""
        w = self.weights
        x = x.to(w["W_enc"].dtype) / self.read_scale
        x_c = x - w["b_dec"] if self.config.subtract_b_dec else x
        acts = self._active(x_c)
        z = acts.encode(w["W_enc"], None, None, x_c)
        if self.nonlinearity.name == GATED.name:
            z = z * acts.expand(w["magnitude"])
        f = (z + acts.expand(w["b_enc"])).relu()
        x_hat = acts.decode(f, w["W_dec"]) + w["b_dec"]
        x_hat = (x_hat + x @ w[SKIP].T if SKIP in w else x_hat) * self.scale
        return Reconstruction(x_hat, acts, (f > 0).sum())

    @torch.no_grad()
    def _active(self, x_c: Tensor) -> SparseActs:
        """The active entries of centred and scaled x_c [N, d], with their π."""
        w = self.weights
        encoder = EncoderPass(x_c.detach(), w["W_enc"], None)
        if self.nonlinearity.name == TOPK.name:
            assert self.config.k is not None
            chunks = [self._largest(pi, self.config.k) for pi in encoder.chunks()]
            value, feature = (torch.cat(column) for column in zip(*chunks, strict=True))  # [N, k]
            return SparseActs.fixed_k(feature, value, len(w["W_enc"]))
        cut = self._cut()
        acts = SparseActs.concatenate([above(margin) for margin in encoder.chunks(cut)])
        acts.z = acts.z + cut[acts.feature]
        return acts

    def _largest(self, pi: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """π and features [n, k] of the k largest π + b of each token, times `rank_scale` where there is one."""
        z = pi + self.weights["b_enc"]
        _, feature = top_k(z * self.state["rank_scale"] if "rank_scale" in self.state else z, k)
        return pi.gather(-1, feature), feature

    @torch.no_grad()
    def _cut(self) -> Tensor:
        """The π [F] above which a feature is active; not for top k."""
        b = self.weights["b_enc"]
        if self.nonlinearity.name == RELU.name:
            return -b
        if self.nonlinearity.name == JUMPRELU.name:
            return self.state["threshold"].clamp(min=0) - b
        return torch.maximum(-self.state["gate_bias"], -b / self.weights["magnitude"])

    @torch.no_grad()
    def steer(self, acts: SparseActs) -> None:
        """Moves all cuts towards the wanted L0, judged by the activations of some tokens; top k needs nothing."""
        if self.nonlinearity.name == TOPK.name or not len(acts.z):
            return
        cut, b = self._cut(), self.weights["b_enc"]
        ratio = math.log(len(acts.z) / (acts.n_tokens * self.l0))
        shift = STEERING * (acts.z - cut[acts.feature]).mean() * max(-LARGEST_LOG, min(LARGEST_LOG, ratio))
        if self.nonlinearity.name == RELU.name:
            b.sub_(shift)
        elif self.nonlinearity.name == JUMPRELU.name:
            self.state["threshold"].copy_((cut + b + shift).clamp(min=0))
        else:
            self.state["gate_bias"].copy_(torch.minimum(-cut - shift, b / self.weights["magnitude"]))

    @torch.no_grad()
    def project(self) -> None:
        """Takes the part of the decoder's gradient along its rows away."""
        rows = self.weights["W_dec"]
        if rows.grad is not None:
            remove_parallel_(rows.grad, rows)

    @torch.no_grad()
    def constrain(self) -> None:
        """Unit decoder rows, where they are not zero, and gains that stay positive."""
        normalize_rows_(self.weights["W_dec"])
        if self.nonlinearity.name == GATED.name:
            self.weights["magnitude"].clamp_(min=SMALLEST_GAIN)

    @torch.no_grad()
    def export(self) -> SparseAutoencoder:
        """The autoencoder on raw activations."""
        tensors = {name: tensor.detach().clone() for name, tensor in (self.weights | self.state).items()}
        tensors = _scaled_maps(tensors, self.scale / self.read_scale)
        return SparseAutoencoder(self.config, fold_scale(tensors, self.scale))


def _scaled_maps(tensors: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """The maps from what is read, in units in which it is 1 / ratio as large."""
    return {name: tensor * ratio if name in ("W_enc", SKIP) else tensor for name, tensor in tensors.items()}

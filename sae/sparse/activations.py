"""Feature activations in the form that makes a training step cheap: a list of the few that matter.

A batch of N tokens has N·F pre-activations z = W_enc (x − b_dec) + b_enc. Once they are known, what follows (decoding,
and the gradients of W_enc, W_dec and the biases) needs only the n entries that are active:

1. x̂[t]      = Σ over entries of t:  f · W_dec[feature]      an embedding bag, one bag a token
2. ∂L/∂f     = g[token] · W_dec[feature], g = ∂L/∂x̂          the gradient of the bag's weights
3. ∂L/∂W_dec = Σ over entries of i:  f · g[token]            an embedding bag, one bag a feature, entries sorted by it
4. ∂L/∂W_enc = Σ over entries of i:  ∂L/∂z · (x − b_dec)[token]

so the step costs one GEMM, a selection, and 8 n d operations, against 8 N F d for four more dense GEMMs. Bags are
summed by `sae.sparse.segment_ops`, where kernels make 2 and 3 at once. Entries may lie in several levels, each with its
own sum over tokens (nested reconstructions): a bag is then a (level, token).

The gradient of b_dec through the encoder is −W_encᵀ Σ_t ∂L/∂z, which saves the GEMM of ∂L/∂x.

Where more than a tenth of all entries are active, as early in training, whole products are faster: `DenseActs` does the
same as `SparseActs` on all N F of them, so that one loss serves both.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sae.sparse.segment_ops import group_offsets, group_sums, kernels_for, segment_dot, weighted_segment_sum


def stable_order(index: Tensor, n: int) -> Tensor:
    """The stable order that sorts an index of values below n; by radix on a CPU, as torch does for long ones only."""
    if index.device.type == "cpu" and n <= 2**16:
        return torch.from_numpy(np.argsort(index.numpy().astype(np.uint16), kind="stable"))
    if index.device.type not in ("cpu", "mps") and n <= 2**31:  # half the digits of an int64
        index = index.int()
    return index.sort(stable=True).indices


class SparseActs:
    """n entries (token, feature) of a batch, sorted by level and token."""

    def __init__(
        self, token: Tensor, feature: Tensor, z: Tensor, *, n_tokens: int, n_features: int,
        level: Tensor | None = None, n_levels: int = 1,
    ):  # fmt: skip
        self.token = token  # [n] int64
        self.feature = feature  # [n] int64
        self.level = level  # [n] int64, sorted; None: one level
        self.z = z  # [n] pre-activations, without gradient
        self.n_tokens, self.n_features = n_tokens, n_features
        self.n_levels = n_levels

    @classmethod
    def fixed_k(cls, feature: Tensor, z: Tensor, n_features: int) -> SparseActs:
        """From [N, k] features and pre-activations: k entries for every token."""
        n_tokens, k = feature.shape
        token = torch.arange(n_tokens, device=feature.device).repeat_interleave(k)
        acts = cls(token, feature.flatten(), z.flatten(), n_tokens=n_tokens, n_features=n_features)
        acts.bag_offsets = torch.arange(0, n_tokens * k + 1, k, device=feature.device)
        return acts

    @classmethod
    def concatenate(cls, chunks: Sequence[SparseActs]) -> SparseActs:
        """The entries of consecutive chunks of rows as those of the whole batch."""
        tokens, n_tokens = [], 0
        for chunk in chunks:
            tokens.append(chunk.token + n_tokens)
            n_tokens += chunk.n_tokens
        feature, z = torch.cat([chunk.feature for chunk in chunks]), torch.cat([chunk.z for chunk in chunks])
        return cls(torch.cat(tokens), feature, z, n_tokens=n_tokens, n_features=chunks[0].n_features)

    def largest(self, n: int) -> SparseActs:
        """The n entries with the largest z, still sorted by token; of one level."""
        if len(self.z) <= n:
            return self
        entry = self.z.topk(n, sorted=False).indices.sort().values
        token, feature, z = self.token[entry], self.feature[entry], self.z[entry]
        return SparseActs(token, feature, z, n_tokens=self.n_tokens, n_features=self.n_features)

    def at_levels(self, level: Tensor, n_levels: int) -> SparseActs:
        """The same entries, each in its level [n]."""
        order = stable_order(level, n_levels)
        sizes = {"n_tokens": self.n_tokens, "n_features": self.n_features, "n_levels": n_levels}
        return SparseActs(self.token[order], self.feature[order], self.z[order], level=level[order], **sizes)

    @cached_property
    def bag(self) -> Tensor:
        """[n] index of (level, token)."""
        return self.token if self.level is None else self.level * self.n_tokens + self.token

    @cached_property
    def bag_offsets(self) -> Tensor:
        return group_offsets(self.bag, self.n_levels * self.n_tokens)

    @cached_property
    def by_feature(self) -> tuple[Tensor, Tensor]:
        """The order that sorts entries by feature [n], and where each feature begins [F + 1]."""
        order = stable_order(self.feature, self.n_features)
        return order, group_offsets(self.feature, self.n_features, order)

    def expand(self, parameter: Tensor) -> Tensor:
        """A per-feature parameter [F] at the entries [n], differentiable."""
        return _Expand.apply(parameter, self)

    def sum_tokens(self, value: Tensor) -> Tensor:
        """Σ over tokens of values at the entries: [F]."""
        return group_sums(value, self.feature, *self.by_feature)

    def count_active(self, f: Tensor) -> Tensor:
        """Tokens on which each feature's f is positive: [F]."""
        return self.sum_tokens((f > 0).to(f.dtype))

    def encode(self, W_enc: Tensor, bias: Tensor | None, b_dec: Tensor | None, x_c: Tensor) -> Tensor:
        """z at the entries [n], differentiable in the encoder and b_dec; x_c [N, d] is x − b_dec, or x without it.

        Where x_c wants a gradient, entries of one level give it.
        """
        return _SparseEncode.apply(W_enc, bias, b_dec, x_c, self)

    def decode(self, value: Tensor, W_dec: Tensor) -> Tensor:
        """Σ over features of value · W_dec: [N, d], or [levels, N, d] where entries have levels."""
        out: Tensor = _SparseDecode.apply(value, W_dec, self)
        return out if self.level is None else out.view(self.n_levels, self.n_tokens, -1)


class DenseActs:
    """All N F entries of some tokens, as matrices: what `SparseActs` does, by whole products."""

    def expand(self, parameter: Tensor) -> Tensor:
        """A per-feature parameter [F], as it is broadcast over [N, F]."""
        return parameter

    def sum_tokens(self, value: Tensor) -> Tensor:
        """Σ over tokens of values [N, F]: [F]."""
        return value.sum(0)

    def count_active(self, f: Tensor) -> Tensor:
        """Tokens on which each feature's f [N, F] is positive: [F]."""
        if f.device.type != "cpu":
            return (f > 0).sum(0, dtype=f.dtype)
        return torch.gt(f, 0, out=torch.empty_like(f)).sum(0)  # sums of bools take ten times as long

    def encode(self, W_enc: Tensor, bias: Tensor | None, b_dec: Tensor | None, x_c: Tensor) -> Tensor:
        """z [N, F], differentiable in the encoder and b_dec; x_c [N, d] is x − b_dec, or x without it."""
        return _DenseEncode.apply(W_enc, bias, b_dec, x_c)

    def decode(self, value: Tensor, W_dec: Tensor) -> Tensor:
        """value [N, F] W_dec: [N, d]."""
        return (value @ W_dec).to(value.dtype)


Acts = SparseActs | DenseActs
"""Activations that a loss can be computed from."""


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, acts: SparseActs) -> Tensor:
        ctx.acts = acts
        return parameter[acts.feature]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.acts.sum_tokens(g), None


def _bias_gradients(ctx: Any, dz_sum: Tensor, W_enc: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the encoder bias and of b_dec as a part of x − b_dec, from Σ_t ∂L/∂z [F].

    Not in autocast: for one vector, casting W_enc would cost more than the product does.
    """
    db_dec = None
    if ctx.needs_input_grad[2]:
        with torch.autocast(W_enc.device.type, enabled=False):
            db_dec = -(dz_sum @ W_enc)
    return dz_sum if ctx.needs_input_grad[1] else None, db_dec


class _SparseEncode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, W_enc: Tensor, bias: Tensor | None, b_dec: Tensor | None, x_c: Tensor, acts: SparseActs
    ) -> Tensor:
        ctx.save_for_backward(W_enc, x_c)
        ctx.acts = acts
        return acts.z.to(W_enc.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        W_enc, x_c = ctx.saved_tensors
        order, offsets = ctx.acts.by_feature
        dW_enc = weighted_segment_sum(x_c, ctx.acts.token[order], offsets, dz[order])
        dx_c = (
            weighted_segment_sum(W_enc, ctx.acts.feature, ctx.acts.bag_offsets, dz) if ctx.needs_input_grad[3] else None
        )
        return dW_enc, *_bias_gradients(ctx, ctx.acts.sum_tokens(dz), W_enc), dx_c, None


class _DenseEncode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W_enc: Tensor, bias: Tensor | None, b_dec: Tensor | None, x_c: Tensor) -> Tensor:
        ctx.save_for_backward(W_enc, x_c)
        return F.linear(x_c, W_enc, bias).to(W_enc.dtype)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        W_enc, x_c = ctx.saved_tensors
        return (dz.T @ x_c).to(W_enc.dtype), *_bias_gradients(ctx, dz.sum(0), W_enc), None


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, W_dec: Tensor, acts: SparseActs) -> Tensor:
        ctx.save_for_backward(value, W_dec)
        ctx.acts = acts
        return weighted_segment_sum(W_dec, acts.feature, acts.bag_offsets, value)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (value, W_dec), acts = ctx.saved_tensors, ctx.acts
        wants_value, wants_rows, _ = ctx.needs_input_grad
        if not wants_rows:
            return segment_dot(g, acts.bag, W_dec, acts.feature, acts.bag_offsets), None, None
        order, offsets = acts.by_feature
        entries = g, acts.bag[order], offsets, value[order]
        if wants_value and (kernels := kernels_for(g, value, W_dec)):
            dW_dec, dots = kernels.bag_sum_and_dots(*entries, W_dec)
            return torch.empty_like(value).scatter_(0, order, dots), dW_dec, None
        dvalue = segment_dot(g, acts.bag, W_dec, acts.feature, acts.bag_offsets) if wants_value else None
        return dvalue, weighted_segment_sum(*entries), None

"""Feature activations in the form that makes a training step cheap: a list of the few that matter.

A batch of N tokens has N·F pre-activations z = W_enc (x − b_dec) + b_enc. Once they are known, what follows (decoding,
and the gradients of W_enc, W_dec and the biases) needs only the n entries that are active:

1. x̂[t]      = Σ over entries of t:  f · W_dec[feature]      an embedding bag, one bag a token
2. ∂L/∂f     = g[token] · W_dec[feature], g = ∂L/∂x̂          the gradient of the bag's weights
3. ∂L/∂W_dec = Σ over entries of i:  f · g[token]            an embedding bag, one bag a feature, entries sorted by it
4. ∂L/∂W_enc = Σ over entries of i:  ∂L/∂z · (x − b_dec)[token]

so the step costs one GEMM, a selection, and 8 n d operations, against 8 N F d for four more dense GEMMs. Entries may
lie in several levels, each with its own sum over tokens (nested reconstructions): a bag is then a (level, token). The
gradient of b_dec through the encoder is −W_encᵀ Σ_t ∂L/∂z, which saves the GEMM of ∂L/∂x.

Where more than a tenth of all entries are active, as early in training, whole products are faster: `DenseActs` does the
same as `SparseActs` on all N F of them, so that one loss serves both.

**Sums over segments** (what one token, or one feature, has of the entries) and operations on rows are plain torch on a
CPU. On CUDA `sae.sparse.triton_kernels` takes its place, which makes 2 and 3 at once (on an H200 a step takes .6 of the
time), where Triton can be imported and agrees with torch on a small example; else a warning says so. That is
`SFC_KERNELS=auto`; `torch` turns the kernels off, `triton` turns them on everywhere (with TRITON_INTERPRET=1 also on a
CPU, slowly, which is how they are tested). They add up in float32 whatever rows are stored in; results have the dtype
of the rows. Autocast changes nothing.

On MPS torch has no `segment_reduce`, no `embedding_bag` before release 2.10, and its `bincount` takes seconds where
indices repeat. There rows are gathered and added by index instead, some of them at a time.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sae.errors import UserError
from sae.sparse.shards import Sharded

log = logging.getLogger(__name__)

MODES = ("auto", "torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Number types that rows of the kernels may have."""
SMALLEST_NORM = 1e-12
GATHER_BYTES = 256 * 2**20
"""Largest block of gathered rows."""
_mode = [os.environ.get("SFC_KERNELS", "auto")]


def stable_order(index: Tensor, n: int) -> Tensor:
    """The stable order that sorts an index of values below n; by radix on a CPU, as torch does for long ones only."""
    if index.device.type == "cpu" and n <= 2**16:
        return torch.from_numpy(np.argsort(index.numpy().astype(np.uint16), kind="stable"))
    if index.device.type not in ("cpu", "mps") and n <= 2**31:  # half the digits of an int64
        index = index.int()
    return index.sort(stable=True).indices


class SparseActs(Sharded):
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
        """Put each entry in its level [n]."""
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
        out = out if self.shards is None else self.shards.over_all_features(out)
        return out if self.level is None else out.view(self.n_levels, self.n_tokens, -1)


class DenseActs(Sharded):
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
        return self.over_all_features((value @ W_dec).to(value.dtype))


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


# ---- sums over segments and operations on rows


def weighted_segment_sum(source: Tensor, index: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """out[b] = Σ_{j in offsets[b]:offsets[b+1]} weight[j] · source[index[j]]: [bags, d]."""
    if kernels := kernels_for(source, weight):
        return kernels.weighted_segment_sum(source, index, offsets, weight)
    if source.device.type == "mps":
        return rows_added(source, index, offsets, weight)
    return F.embedding_bag(index, source, offsets, mode="sum", per_sample_weights=weight, include_last_offset=True)


def segment_dot(g: Tensor, bag: Tensor, rows: Tensor, index: Tensor, offsets: Tensor) -> Tensor:
    """g[bag[j]] · rows[index[j]] for entry j [n]: the gradient of `weighted_segment_sum`'s weights, g = ∂L/∂out."""
    if g.device.type == "mps":
        return rows_multiplied(g, bag, rows, index)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(g, rows, index, offsets, bag, 0)


def remove_parallel_(gradient: Tensor, rows: Tensor) -> None:
    """Takes the part of gradient [n, d] along rows of unit norm away, in place."""
    if (kernels := kernels_for(gradient, rows)) and gradient.stride(1) == rows.stride(1) == 1:
        kernels.remove_parallel_(gradient, rows)
    else:
        gradient.addcmul_(rows, -(gradient * rows).sum(1, keepdim=True))  # vecdot would be cast by autocast


def normalize_rows_(rows: Tensor) -> None:
    """Rows [n, d] of unit norm, in place; those of zeros stay."""
    if (kernels := kernels_for(rows)) and rows.stride(1) == 1:
        kernels.normalize_rows_(rows, SMALLEST_NORM)
    else:
        rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp(min=SMALLEST_NORM))


def group_sizes(index: Tensor, n: int) -> Tensor:
    """How often each of 0, ..., n - 1 is in an index: [n] int64."""
    if index.device.type == "mps":
        once = torch.ones(len(index), device=index.device)
        return torch.zeros(n, device=index.device).index_add_(0, index, once).long()
    return torch.bincount(index, minlength=n)


def group_offsets(index: Tensor, n: int, order: Tensor | None = None) -> Tensor:
    """Begin of each of the n groups of an index, once sorted by `order` if it is not yet, and the end: [n + 1].

    The host of a GPU does not wait for it.
    """
    if index.device.type not in ("cpu", "mps"):  # bincount would ask for the largest value
        index = index if order is None else index[order]
        return torch.searchsorted(index, torch.arange(n + 1, device=index.device, dtype=index.dtype))
    offsets = torch.zeros(n + 1, dtype=torch.int64, device=index.device)
    torch.cumsum(group_sizes(index, n), 0, out=offsets[1:])
    return offsets


def group_sums(value: Tensor, index: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """Σ of the values of each group: [n]; `order` sorts the index, `offsets` are its groups'."""
    if value.device.type == "mps":
        return value.new_zeros(len(offsets) - 1).index_add_(0, index, value)
    return torch.segment_reduce(value[order], "sum", offsets=offsets, initial=0)


def rows_added(source: Tensor, index: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """Σ_{j in offsets[b]:offsets[b+1]} weight[j] · source[index[j]], [bags, d], by index; no gradient."""
    bag = torch.repeat_interleave(offsets.diff())  # [n]
    out = source.new_zeros(len(offsets) - 1, source.shape[1])
    for block in row_blocks(len(index), source.shape[1] * source.element_size(), GATHER_BYTES):
        out.index_add_(0, bag[block], source[index[block]] * weight[block, None])
    return out


def rows_multiplied(g: Tensor, bag: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """g[bag[j]] · rows[index[j]] for every entry, [n], by index."""
    blocks = row_blocks(len(index), rows.shape[1] * rows.element_size(), GATHER_BYTES)
    dots = [(g[bag[block]] * rows[index[block]]).sum(1) for block in blocks]
    return torch.cat(dots) if dots else g.new_zeros(0)


def row_blocks(n_rows: int, row_bytes: int, most_bytes: int) -> list[slice]:
    """Slices of n rows, each of as many as fit in so many bytes, and of one at least."""
    size = max(1, most_bytes // max(1, row_bytes))
    return [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]


# ---- the choice between torch and kernels


@contextmanager
def using(mode: str) -> Iterator[None]:
    """Within it, `mode` holds in place of the environment variable."""
    _mode.append(mode)
    try:
        yield
    finally:
        _mode.pop()


def kernels_for(*tensors: Tensor) -> ModuleType | None:
    """`sae.sparse.triton_kernels` where they are turned on for these tensors, all of one device; None for torch."""
    mode, device = _mode[-1], tensors[0].device
    if mode not in MODES:
        raise UserError(f"SFC_KERNELS is {mode!r}, allowed are {', '.join(MODES)}")
    if mode == "torch" or (mode == "auto" and device.type != "cuda"):
        return None
    if any(tensor.dtype not in DTYPES for tensor in tensors):
        return None
    return _tried(device) if mode == "auto" else _imported(device)


def _imported(device: torch.device) -> ModuleType:
    if device.type in ("cpu", "mps") and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(
            f"SFC_KERNELS is 'triton', but Triton has no code for {device.type!r}: leave the variable out, or set "
            "TRITON_INTERPRET=1 to have the kernels interpreted"
        )
    try:
        return import_module("sae.sparse.triton_kernels")
    except ImportError as error:
        raise UserError(
            f"SFC_KERNELS is 'triton', but Triton cannot be imported ({error}): install it, or leave the variable out"
        ) from error


@cache
def _tried(device: torch.device) -> ModuleType | None:
    """The kernels, if they can be imported and do on a device what torch does."""
    try:
        kernels = import_module("sae.sparse.triton_kernels")
        kernels.check(device)
    except ImportError:
        return None
    except Exception as error:  # whatever a compiler or a driver may raise
        log.warning("Triton's kernels do not work on %s, torch takes their place: %s", device, error)
        return None
    return kernels

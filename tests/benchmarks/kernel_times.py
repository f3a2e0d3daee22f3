"""Times each operation on rows of a TopK step, in torch and by Triton's kernels, for `bench_sae_step --device cuda`.

Bytes are those that `sae.sparse.triton_kernels` states. Entries are k random features a token, some of them active on
every token, as in trained dictionaries.
"""

from __future__ import annotations

import statistics
from typing import NamedTuple

import torch

from sae.sparse import activations
from sae.sparse.activations import SparseActs
from tests.benchmarks.peer_steps import Sizes, Step, seconds

ROUNDS = 7
DENSE = 4
"""Features that are active on every token."""


class Operation(NamedTuple):
    """What is timed, and the rows of d numbers that each side moves through memory."""

    name: str
    step: Step
    by_kernels: int
    by_torch: int


def operations(sizes: Sizes) -> list[Operation]:
    """The operations of a step on tensors of its sizes; all weights are float32."""
    device, n_tokens, n_features, d = sizes.device, sizes.batch, sizes.features, sizes.width
    dense, n = min(DENSE, sizes.k), n_tokens * sizes.k
    feature = torch.randint(n_features, (n_tokens, sizes.k), device=device)
    feature[:, :dense] = torch.arange(dense, device=device)
    acts = SparseActs.fixed_k(feature, torch.rand(n_tokens, sizes.k, device=device), n_features)
    W_dec, gradient = (torch.randn(n_features, d, device=device) for _ in range(2))
    x = torch.randn(n_tokens, d, device=device)
    activations.normalize_rows_(W_dec)
    value, W = acts.z.clone().requires_grad_(), W_dec.clone().requires_grad_()
    out = acts.decode(value, W)
    order, offsets = acts.by_feature
    entries = x, acts.token[order], offsets, acts.z[order]
    read, rows_of_both = n + n_tokens, n_features + n_tokens
    return [
        Operation(
            "decoding",
            lambda: activations.weighted_segment_sum(W_dec, acts.feature, acts.bag_offsets, acts.z),
            read,
            read,
        ),
        Operation(
            "its gradients", lambda: torch.autograd.grad(out, (value, W), x, retain_graph=True),
            n_features + rows_of_both, read + rows_of_both,
        ),
        Operation("gradient of W_enc", lambda: activations.weighted_segment_sum(*entries), rows_of_both, rows_of_both),
        Operation("projection", lambda: activations.remove_parallel_(gradient, W_dec), 3 * n_features, 7 * n_features),
        Operation("normalisation", lambda: activations.normalize_rows_(W_dec), 2 * n_features, 3 * n_features),
    ]  # fmt: skip


def kernel_times(sizes: Sizes, modes: tuple[str, ...] = ("torch", "auto")) -> str:
    """A table: milliseconds, the gigabytes stated, and gigabytes a second, in torch and by the kernels."""
    titles = ["by torch, ms" if mode == "torch" else "by kernels, ms" for mode in modes]
    lines = [f"{'operation':18s}" + "".join(f"   {title:>14s} {'GB':>6s} {'GB/s':>6s}" for title in titles)]
    for operation in operations(sizes):
        line = f"{operation.name:18s}"
        for mode in modes:
            with activations.using(mode):
                time = statistics.median(seconds(operation.step, ROUNDS + 2, sizes)[2:])
            moved = 4e-9 * sizes.width * (operation.by_torch if mode == "torch" else operation.by_kernels)
            line += f"   {1e3 * time:14.3f} {moved:6.2f} {moved / time:6.0f}"
        lines.append(line)
    return "\n".join(lines)

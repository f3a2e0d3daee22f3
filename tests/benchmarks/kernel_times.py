"""Times each operation of a TopK step but the encoder's product, in torch and as a step on CUDA does it.

    python -m tests.benchmarks.kernel_times [--tiles]

`bench_sae_step --device cuda` prints the same table. Bytes are those that `sae.sparse.triton_kernels` states; selection
reads the pre-activations once. Entries are k random features a token, some of them active on every token, as in trained
dictionaries. `--tiles` times the kernels with other tiles, warps and windows too.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from typing import NamedTuple
from unittest.mock import patch

import torch

from sae.sparse import activations
from sae.sparse.activations import SparseActs
from sae.sparse.encoder_pass import top_k
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
    z = torch.randn(n_tokens, n_features, device=device, dtype=torch.bfloat16)
    rows_of_z = n_tokens * n_features // (2 * d)
    weights = [torch.randn(n_features, d, device=device, requires_grad=True) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    return [
        Operation(
            "selection",
            lambda: z.topk(sizes.k, sorted=False) if activations.kernels_for(x) is None else top_k(z, sizes.k),
            rows_of_z, rows_of_z,
        ),
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
        Operation("Adam", torch.optim.Adam(weights, lr=1e-6, fused=True).step, 14 * n_features, 14 * n_features),
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


def other_tiles() -> Iterator[tuple[str, dict[str, object]]]:
    """Other sizes of programs, in words and as values of `sae.sparse.triton_kernels`."""
    for tile in (2048, 4096, 8192, 16384):
        for per_warp in (256, 512, 1024):
            warps = {"warps_of": lambda numbers, per_warp=per_warp: max(1, min(16, numbers // per_warp))}
            yield f"tiles of {tile}, {per_warp} numbers a warp", {"TILE": tile, **warps}
    for window in (32, 64, 128, 256, 512):
        yield f"windows of {window}", {"WINDOW": window}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 2304), ("features", 65_536), ("batch", 4096), ("k", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiles", action="store_true", help="time the kernels with other tiles, warps and windows too")
    options = parser.parse_args()
    sizes = Sizes(options.width, options.features, options.batch, options.k, device=options.device)
    on_cuda = options.device.startswith("cuda")
    print(kernel_times(sizes, ("torch", "auto" if on_cuda else "triton")))
    for words, values in other_tiles() if options.tiles else ():
        with patch.multiple("sae.sparse.triton_kernels", **values):
            print(f"\n{words}", kernel_times(sizes, ("auto" if on_cuda else "triton",)), sep="\n")


if __name__ == "__main__":
    main()

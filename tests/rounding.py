"""The suite on a machine that rounds otherwise: `python -m pytest -p tests.rounding`.

1. Every sum that a processor may add up in another order (matrix products, convolutions, reductions, norms, softmax,
   attention), forwards and backwards, gets an error of up to NOISE times the size of its values: 20 times that of
   float32 at the lengths of these tests, so that what passes has a margin.
2. The error is a function of the value's bits and of ROUNDING_SEED. The same computation on the same numbers gives the
   same bits twice, as on any machine; another route to the same number does not.

A test that fails under it compares what only one machine keeps equal.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

NOISE = float(os.environ.get("ROUNDING_NOISE", "1e-6"))
SEED = int(os.environ.get("ROUNDING_SEED", "0"))
SUMS = {
    "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "linear", "matmul", "convolution",
    "sum", "mean", "norm", "linalg_vector_norm", "var", "std", "var_mean", "cumsum", "logsumexp",
    "_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data",
    "native_layer_norm", "native_layer_norm_backward",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_embedding_bag", "_embedding_bag_forward_only", "_embedding_bag_dense_backward", "segment_reduce",
    "scatter_add", "scatter_add_", "index_add", "index_add_",
}  # fmt: skip
IN_PLACE = {"scatter_add_", "index_add_"}


def disturbed(x: torch.Tensor) -> torch.Tensor:
    """x with errors relative to its own size and to the usual size of its values; float64 keeps nine more digits."""
    noise = NOISE if x.dtype == torch.float32 else NOISE * 1e-9
    bits = x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int64)
    hashed = ((bits.long() * 2654435761 + SEED * 40503) >> 7) % 2003  # [0, 2003)
    error = (hashed.to(x.dtype) / 1001 - 1).reshape(x.shape)
    finite = torch.where(x.isfinite(), x, 0)
    size = finite.square().mean().sqrt() if x.numel() > 1 else finite.abs()
    exact = (x == x.round()) | ~x.isfinite()  # counts are exact on every machine
    return torch.where(exact, x, x + noise * error * (finite.abs() + size) / 2)


class OtherRounding(TorchDispatchMode):
    """Disturbs the results of sums."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in SUMS or "out" in (kwargs or {}):
            return result
        if isinstance(result, tuple | list):
            return type(result)(self.changed(x, name) for x in result)
        return self.changed(result, name)

    def changed(self, x: Any, name: str) -> Any:
        plain = type(x) is torch.Tensor and x.device.type == "cpu" and x.layout == torch.strided
        if not plain or x.dtype not in (torch.float32, torch.float64) or not x.numel():
            return x
        with torch.no_grad():
            return x.copy_(disturbed(x)) if name in IN_PLACE else disturbed(x)


@pytest.fixture(autouse=True)
def _other_rounding() -> Iterator[None]:
    with OtherRounding():
        yield

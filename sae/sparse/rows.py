"""What a sparse step does with rows of weights and activations, in torch or by Triton kernels.

On CUDA, where Triton can be imported (torch's CUDA wheels bring it along), the kernels of `sae.sparse.triton_kernels`
run; everywhere else their twins below do, in plain torch. Before kernels are used on a device, both must agree there
on a small example: if they do not, or do not compile, a warning says so and torch does the work. The environment
variable `SFC_KERNELS` decides otherwise: `torch` never takes the kernels, `triton` always does, on any device (with
TRITON_INTERPRET=1 also on a CPU, slowly, which is how they are tested), `auto` is the default.

Kernels add up in float32 whatever rows are stored in; results have the dtype of the rows. Autocast changes nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from sae.errors import UserError
from sae.sparse.bags import rows_added, rows_multiplied

log = logging.getLogger(__name__)

MODES = ("auto", "torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What rows of the kernels are stored in."""
SMALLEST_NORM = 1e-12
_mode = [os.environ.get("SFC_KERNELS", "auto")]


@contextmanager
def using(mode: str) -> Iterator[None]:
    """Within it, `mode` holds in place of the environment variable."""
    _mode.append(mode)
    try:
        yield
    finally:
        _mode.pop()


def kernels_for(*tensors: Tensor) -> ModuleType | None:
    """`sae.sparse.triton_kernels` where they are to work on these tensors, all of one device; None for torch."""
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
    """The kernels, if they can be had on a device and do there what torch does."""
    if not torch.cuda.is_available():
        return None
    try:
        kernels = import_module("sae.sparse.triton_kernels")
    except ImportError:
        return None
    try:
        check(kernels, device)
    except Exception as error:  # whatever a compiler or a driver may raise
        log.warning("Triton's kernels do not work on %s, torch takes their place: %s", device, error)
        return None
    return kernels


@torch.no_grad()
def check(kernels: ModuleType, device: torch.device | str) -> None:
    """Raises an AssertionError where the kernels do not agree with torch on a few bags, empty, short and long."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    lengths = torch.tensor([0, 3, 1, 2 * kernels.WINDOW + 5, 40, kernels.WINDOW + 1, 0])
    bag = torch.arange(len(lengths)).repeat_interleave(lengths).to(device)
    offsets = F.pad(lengths.cumsum(0), (1, 0)).to(device)
    index = torch.randint(50, (len(bag),), generator=generator).to(device)
    source, rows, weight = normal(50, 96), normal(len(lengths), 96), normal(len(bag))
    out, dots = kernels.bag_sum_and_dots(source, index, offsets, weight, rows)
    unit, projected = rows.clone(), out.clone()
    kernels.normalize_rows_(unit, SMALLEST_NORM)
    kernels.remove_parallel_(projected, unit)
    with using("torch"):
        twin, twin_out = rows.clone(), weighted_segment_sum(source, index, offsets, weight)
        normalize_rows_(twin)
        twin_projected = twin_out.clone()
        remove_parallel_(twin_projected, twin)
    expected = (twin_out, (source[index] * rows[bag]).sum(1), twin, twin_projected)
    for mine, its in zip((out, dots, unit, projected), expected, strict=True):
        torch.testing.assert_close(mine, its, atol=1e-4, rtol=1e-4)


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

"""Comparison of numbers that were summed along different routes."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-4, *, msg: object = "not near") -> None:
    """Equal up to a share of the largest value: the error of a float32 sum is relative to its terms, not to what is
    left of them. A processor's own order of additions takes some 1e-6; `tests.rounding` ten times that. `msg` says what
    was compared.
    """
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        found, expected, atol=tolerance * max(largest, 1e-3), rtol=tolerance, msg=lambda text: f"{msg}: {text}"
    )

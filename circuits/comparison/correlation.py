"""How well two lists of numbers agree: linear correlation and correlation of ranks."""

from __future__ import annotations

import torch


def pearson(x: torch.Tensor, y: torch.Tensor) -> float:
    """Linear correlation of x and y, [n] each; 0 where one of them does not vary."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    norm = (x.norm() * y.norm()).item()
    return (x @ y).item() / norm if norm > 0 else 0.0


def spearman(x: torch.Tensor, y: torch.Tensor) -> float:
    """Linear correlation of the ranks, ties sharing their mean rank."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(x: torch.Tensor) -> torch.Tensor:
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[inverse].double()

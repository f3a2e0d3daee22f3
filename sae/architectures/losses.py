"""The quantities that losses are made of and made to. N tokens, F features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sae.sparse.activations import SparseActs

Weights = Mapping[str, Tensor]
"""Trained tensors by name: W_enc [F, d], b_enc [F], W_dec [F, d], b_dec [d] and the architecture's own [F]."""


@dataclass(frozen=True)
class Hyper:
    """The hyperparameters in force at one step."""

    k: int
    """Active features a token."""
    sparsity: Tensor | float = 0.0
    """Weight of the sparsity penalty, already warmed up."""
    p: float = 1.0
    """Exponent of the penalty where it is annealed."""
    bandwidth: float = 0.001
    """Width of the kernel of straight-through gradients."""
    target_l0: float | None = None
    """Active features a token that JumpReLU's quadratic penalty wants; None for a penalty on L0 itself."""
    k_aux: int = 0
    """Dead features a token that reconstruct the error; 0 for no auxiliary loss."""
    aux_alpha: float = 1 / 32
    """Weight of the auxiliary loss."""


class Losses(NamedTuple):
    """The loss of some tokens, with the reconstruction and the activations it was computed from."""

    loss: Tensor  # scalar, a sum over tokens
    x_hat: Tensor  # [N, d], the reconstruction that counts
    f: Tensor  # values at the entries; positive means active


class StepStats(NamedTuple):
    """Sums over the tokens of a batch; all stay on the device."""

    loss: Tensor  # scalar
    squared_error: Tensor  # scalar, Σ ‖x − x̂‖²
    fired: Tensor  # [F], tokens on which each feature was active


def squared_error(x: Tensor, x_hat: Tensor) -> Tensor:
    """Σ over tokens of ‖x − x̂‖²: a scalar."""
    return (x - x_hat).square().sum()


def where_positive(value: Tensor, of: Tensor) -> Tensor:
    """The value where `of` is positive, else 0; a CPU takes ten times as long to multiply by a mask of bools."""
    return torch.ops.aten.threshold_backward(value, of, 0)


def aux_loss(z: Tensor, acts: SparseActs, error: Tensor, W_dec: Tensor) -> Tensor:
    """Σ‖e − ê‖² / Σ‖e − ē‖² with ê = Σ max(z, 0) W_dec over the dead features' entries; e [N, d] is a constant."""
    variance = (error - error.mean(0)).square().sum()
    return squared_error(error, acts.decode(z.relu(), W_dec)) / variance.clamp(min=1e-12)

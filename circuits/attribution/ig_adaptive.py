"""Integrated gradients with as many nodes as the sum check asks for, placed where the path bends.

Legend: B examples, S positions, d width; a in [0, 1] is the place on the straight path of one site from x_clean to
x_patch.

Every evaluation gives the metric m(a) along with its slope m'(a) = (x_patch - x_clean) . dm/dx, so the error of a
quadrature rule is known exactly, interval by interval, and not only in sum. Of an interval [l, r] with middle c,

    error(l, r) = (r - l) / 6 (m'(l) + 4 m'(c) + m'(r)) - (m(r) - m(l))          Simpson's rule

1. Start every example with the whole path, nodes 0, 1/2 and 1; the gradient at 0 is that of attribution patching, one
   pass for all sites.
2. While the mean over examples of |sum of an example's errors| exceeds `residual` times the scale (the mean total
   effect), halve the intervals whose error is at least a quarter of the largest, among examples that are not there
   yet. All nodes of an interval serve its halves; each example gets its own nodes.
3. g = sum over nodes of weight * dm/dx. The errors add up to the residual of the site's sum check, which is therefore
   at most `residual`, and not by cancellation between examples.

The gradients of all nodes are kept until the weights are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from circuits.attribution.activations import ActivationPair
from sae.model.sites import Site

MAX_NODES = 100
"""Nodes a prompt takes on average at most, even where no residual is small enough."""


@dataclass(frozen=True)
class _Nodes:
    """Evaluated points of the paths, n in all."""

    example: Tensor  # [n] int64
    alpha: Tensor  # [n]
    m: Tensor  # [n]
    slope: Tensor  # [n] m'(a)
    gradient: Tensor  # [n, S, d]

    def __add__(self, other: _Nodes) -> _Nodes:
        names = ("example", "alpha", "m", "slope", "gradient")
        return _Nodes(*(torch.cat([getattr(self, name), getattr(other, name)]) for name in names))


def path_scale(states: ActivationPair, totals: Mapping[Site, Tensor]) -> float:
    """The unit of residuals: |mean of m(patch) - m(clean)|, without patch prompts the largest mean total of a site."""
    if states.m_patch is not None:
        return abs((states.m_patch - states.m_clean).mean().item())
    return max(abs(total.mean().item()) for total in totals.values())


@torch.enable_grad()
def adaptive_gradient(
    states: ActivationPair, *, site: Site, at_clean: Tensor, residual: float, scale: float, max_rows: int = 512
) -> tuple[Tensor, float]:
    """Mean of dm/dx along the path of one site, [B, S, d], and how many nodes a prompt took on average, that at the
    clean run not counted.

    at_clean: dm/dx at the clean run, [B, S, d]; residual: the error of the sum check to reach, in units of `scale`.
    """
    n = len(states.prompts)
    examples = torch.arange(n, device=states.m_clean.device)
    half = torch.full_like(states.m_clean, 0.5)
    slope = ((states.patch[site] - states.clean[site]) * at_clean).float().sum((1, 2))
    nodes = _Nodes(examples, torch.zeros_like(half).float(), states.m_clean.float(), slope, at_clean)
    nodes += _evaluate(states, site, examples.repeat(2), torch.cat([half, 2 * half]), max_rows)
    left, middle, right = examples, examples + n, examples + 2 * n
    while True:
        width = nodes.alpha[right] - nodes.alpha[left]
        slope = nodes.slope[left] + 4 * nodes.slope[middle] + nodes.slope[right]
        error = width / 6 * slope - (nodes.m[right] - nodes.m[left])  # [intervals]
        owner = nodes.example[left]
        of_example = torch.zeros_like(states.m_clean).index_add(0, owner, error).abs()
        open_ = of_example[owner] > residual * scale
        if of_example.mean() <= residual * scale or len(nodes.alpha) >= MAX_NODES * n:
            break
        split = open_ & (error.abs() >= error[open_].abs().max() / 4)
        a, c, b = left[split], middle[split], right[split]
        quarters = torch.cat([nodes.alpha[a] + nodes.alpha[c], nodes.alpha[c] + nodes.alpha[b]]) / 2
        first, k = len(nodes.alpha), len(a)
        nodes += _evaluate(states, site, owner[split].repeat(2), quarters, max_rows)
        new = torch.arange(first, first + 2 * k, device=left.device)
        left = torch.cat([left[~split], a, c])
        middle = torch.cat([middle[~split], new])
        right = torch.cat([right[~split], c, b])
    weight = torch.zeros_like(nodes.alpha)
    for node, share in ((left, 1), (middle, 4), (right, 1)):
        weight.index_add_(0, node, share * width / 6)
    total = torch.zeros_like(states.clean[site], dtype=torch.float32)
    total.index_add_(0, nodes.example, weight.to(total)[:, None, None] * nodes.gradient)
    return total, len(nodes.alpha) / n - 1


def _evaluate(states: ActivationPair, site: Site, example: Tensor, alpha: Tensor, max_rows: int) -> _Nodes:
    """m and dm/dx at alpha [n] on the paths of the examples [n]."""
    chunks = []
    for owner, alphas in zip(example.split(max_rows), alpha.split(max_rows), strict=True):
        clean, patch = states.clean[site][owner], states.patch[site][owner]
        leaf = torch.lerp(clean, patch, alphas.to(clean)[:, None, None]).requires_grad_()
        m = states.metric_of_rows(site, leaf, owner, grad=True)
        (gradient,) = torch.autograd.grad(m.sum(), leaf)
        slope = ((patch - clean) * gradient).float().sum((1, 2))
        chunks.append(_Nodes(owner, alphas, m.detach().float(), slope, gradient))
    nodes = chunks[0]
    for chunk in chunks[1:]:
        nodes += chunk
    return nodes

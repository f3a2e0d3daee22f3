"""Integrated gradients: the gradient averaged along the path from clean to patch, one site at a time.

Sundararajan et al. 2017; Marks et al. 2024, eq. 4. Legend: B examples, S positions, d model width, K quadrature nodes.

The SAE never enters the model's forward or backward pass: decoding is affine, so all that is needed is g = dm/dx at
each site, and the features are met only once, in `circuits.attribution.feature_effects`.

1. x_k = (1 - a_k) x_clean + a_k x_patch for the quadrature nodes a_k, all K * B rows in the batch dimension, chunked to
   a budget.
2. Everything before the site is skipped: the forward pass resumes from the cached clean activations.
3. g = sum_k w_k dm/dx at x_k. Then sum over nodes of the effects = m(site patched) - m(clean), up to the quadrature
   error.

What a node gets is its share in moving the *whole site*: the effect it has on the way, when part of the others have
moved, as the mean over random orders has it (Shapley values; Aumann & Shapley 1974 for the straight path). Patched
alone, from either end, it may do far less: where several features stand for the same word, each alone moves the model
too little to change its mind, and so m(clean) and m(patch) are both flat in it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from circuits.attribution.activations import ActivationPair, metric_at
from circuits.options import Rule
from sae.model.sites import Site


def quadrature(rule: Rule, steps: int) -> tuple[list[float], list[float]]:
    """Nodes a_k in [0, 1] and weights w_k (summing to 1) of a rule with `steps` nodes.

    `left-riemann` is what the paper's code uses; `midpoint` has a fraction of its error at the same cost.
    """
    if rule == "midpoint":
        return [(k + 0.5) / steps for k in range(steps)], [1 / steps] * steps
    if rule == "left-riemann":
        return [k / steps for k in range(steps)], [1 / steps] * steps
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return [float(node + 1) / 2 for node in nodes], [float(weight) / 2 for weight in weights]


@torch.enable_grad()
def integrated_gradients(
    states: ActivationPair, *, site: Site, rule: Rule = "midpoint", steps: int = 10, max_rows: int = 512
) -> Tensor:
    """Weighted mean of dm/dx along the straight path from the clean to the patch activation of one site, [B, S, d],
    added up in float32 whatever the model computes in.

    At most `max_rows` prompts go through the model at once (at least one quadrature node of the whole batch does).
    """
    total = torch.zeros_like(states.clean[site], dtype=torch.float32)
    for weight, leaf in path_chunks(states.clean[site], states.patch[site], rule, steps, max_rows):
        m = metric_at(states, leaf, site=site, grad=True)
        (gradient,) = torch.autograd.grad(m.sum(), leaf)
        total += torch.einsum("k,kbsd->bsd", weight, gradient.unflatten(0, (len(weight), -1)).float())
    return total


def path_chunks(clean: Tensor, patch: Tensor, rule: Rule, steps: int, max_rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The quadrature nodes of the path from `clean` to `patch` [B, S, d], in chunks of K: weights [K] in float32 and a
    leaf [K * B, S, d], at most `max_rows` rows or one node of the whole batch.
    """
    nodes, weights = quadrature(rule, steps)
    per_pass = max(1, max_rows // len(clean))
    for start in range(0, steps, per_pass):
        alpha = torch.tensor(nodes[start : start + per_pass], device=clean.device)
        weight = torch.tensor(weights[start : start + per_pass], device=clean.device)
        path = torch.lerp(clean.float(), patch.float(), alpha[:, None, None, None])  # [K, B, S, d]
        yield weight, path.to(clean.dtype).flatten(0, 1).requires_grad_()

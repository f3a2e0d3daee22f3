"""The constants with which a model multiplies what its sublayers add to the residual stream (Granite, Cohere).

For each block, stream before + Σ c_i x_i = stream after. Where the plain sum does not explain the stream, the factors
c_i come from least squares; where one is near a number of the model's config, it is that number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sae.model.site_search import SMALLEST_SCALE, fit_factors
from sae.model.sites import Site

TOLERANCE = 1e-4  # relative to the largest value, in float32 and float64
TOLERANCE_16_BIT = 3e-2


def block_sums(sites: Sequence[Site]) -> list[tuple[Site, list[Site], Site]]:
    """For each block whose sites are there: the stream before it, what is added, the stream after it."""
    sums = []
    for resid in (site for site in sites if site.kind == "resid" and site.layer is not None):
        stream_before = Site("resid", resid.layer - 1) if resid.layer else Site("embed")
        added = [site for site in (Site("attn", resid.layer), Site("mlp", resid.layer)) if site in sites]
        if stream_before in sites and added:
            sums.append((stream_before, added, resid))
    return sums


def fit_scales(activations: Mapping[Site, Tensor], constants: Sequence[float]) -> dict[Site, float]:
    """The factors with which attn and mlp are added to the residual stream, where they are not 1 and explain it; one
    of the config's constants where one is near.
    """
    scales: dict[Site, float] = {}
    for stream_before, added, stream_after in block_sums(list(activations)):
        outputs = [exactly(activations[site]) for site in added]
        if len({activations[site].shape for site in (stream_before, *added, stream_after)}) > 1:
            continue
        change = exactly(activations[stream_after]) - exactly(activations[stream_before])
        allowed = _allowed(activations[stream_after], change)
        if float((change - torch.stack(outputs).sum(0)).abs().max()) <= allowed:
            continue
        factors = [_nearest(x, constants, activations[stream_after]) for x in fit_factors(outputs, change)]
        explained = torch.stack([x * output for x, output in zip(factors, outputs, strict=True)]).sum(0)
        if min(factors) >= SMALLEST_SCALE and float((change - explained).abs().max()) <= allowed:
            scales |= dict(zip(added, factors, strict=True))
    return scales


def exactly(x: Tensor) -> Tensor:
    """In float64, on the CPU: Apple's GPUs have none."""
    return x.detach().cpu().double()


def _allowed(after: Tensor, change: Tensor) -> float:
    """The largest difference that rounding of the stream, and a little of the change itself, explains."""
    return tolerance(after) * (float(change.abs().max()) + 0.1 * float(after.abs().max()))


def _nearest(factor: float, constants: Sequence[float], x: Tensor) -> float:
    best = min(constants, key=lambda constant: abs(constant - factor), default=factor)
    return best if abs(best - factor) <= tolerance(x) * abs(factor) else float(f"{factor:.6g}")


def tolerance(x: Tensor | torch.dtype) -> float:
    """Largest difference that rounding explains, relative to the largest value."""
    return TOLERANCE if is_exact(x) else TOLERANCE_16_BIT


def is_exact(x: Tensor | torch.dtype) -> bool:
    """Whether numbers have at least the precision of float32."""
    return (x.dtype if isinstance(x, Tensor) else x) in (torch.float32, torch.float64)

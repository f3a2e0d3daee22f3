"""What must hold of every site of a model, tried on a few random tokens when the model is loaded.

1. Activations are finite.
2. What a token does depends on the tokens before it alone; and on padding not at all, or the model is run without.
3. The residual stream before a block + attn + mlp is the stream after it, the embedding being the stream before the
   first. Where sublayers are multiplied by a constant before they are added, the constant belongs to the site.
4. Replacing x by a copy of x changes no logits, at every site.
5. A site the user placed reaches the logits: there is a gradient from them to it.
6. The gradient at the first site is what a small step there does: no module is without a backward pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.errors import UserError
from sae.model.forward import padding_tokens, with_gradients
from sae.model.site_search import SMALLEST_SCALE, fit_factors
from sae.model.sites import Site

if TYPE_CHECKING:
    from sae.model.language_model import LanguageModel, Run, Tokens

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4  # relative to the largest value, in float32 and float64
TOLERANCE_16_BIT = 3e-2
PADDING_TOLERANCE = 1e-3  # of the largest logit: kernels for other shapes round otherwise
STEPS = 1e-3, 1e-2, 1e-4  # of x: one may cross a routing decision or vanish in rounding
STEP_TOLERANCE = 2e-2  # of the change of the logits


@with_gradients
def check_model(model: LanguageModel) -> None:
    """Raise UserError naming the site where something does not hold."""
    tokens = model.probe_tokens()
    plain = model.run(tokens, capture=model.sites)
    check_finite(plain)
    _check_order(model)
    _check_sums(model, plain.activations)
    _check_copies(model, tokens, plain.logits)
    placed = list(model.moved_sites)
    if placed:
        _check_connected(model, tokens, placed)
    _check_gradient(model, tokens)


def check_finite(run: Run) -> None:
    """Raise UserError naming the first site whose activations hold NaN or infinity, or the logits."""
    named = [(f"activations at site {site.name!r}", x) for site, x in run.activations.items()]
    for name, x in [*named, ("logits", run.logits)]:
        if not bool(torch.isfinite(x).all()):
            count = int((~torch.isfinite(x)).sum())
            raise UserError(f"{name}: {count} of {x.numel()} values are NaN or infinite; check weights and number type")


def relative_difference(x: Tensor, y: Tensor) -> float:
    """max |x - y| / max |y|, in float32."""
    x, y = x.detach().float(), y.detach().float()
    return float((x - y).abs().max() / y.abs().max().clamp_min(torch.finfo(torch.float32).tiny))


def _tolerance(model: LanguageModel) -> float:
    return TOLERANCE if _exact(model.dtype) else TOLERANCE_16_BIT


def _exact(x: Tensor | torch.dtype) -> bool:
    return (x.dtype if isinstance(x, Tensor) else x) in (torch.float32, torch.float64)


def _check_order(model: LanguageModel) -> None:
    """Later tokens change nothing; whether padding does is noted."""
    tokens = padding_tokens(model.probe_tokens()).to(model.device)
    logits = model.run(tokens).logits
    n = tokens.n_positions - int(tokens.lengths[-1])  # of padding
    allowed = PADDING_TOLERANCE if _exact(model.dtype) else TOLERANCE_16_BIT
    if relative_difference(logits[1, :-1], logits[0, :-1]) > allowed:
        raise UserError(
            f"model {model.name!r} is not a decoder: its logits at a token depend on the tokens after it "
            "(for a model that can be both, set is_decoder in its config.json)"
        )
    model.padding_shows = relative_difference(logits[-1, n:], logits[0, : tokens.n_positions - n]) > allowed


def block_sums(sites: Sequence[Site]) -> list[tuple[Site, list[Site], Site]]:
    """For each block whose sites are there: the stream before it, what is added, the stream after it."""
    sums = []
    for resid in (site for site in sites if site.kind == "resid" and site.layer is not None):
        before = Site("resid", resid.layer - 1) if resid.layer else Site("embed")
        added = [site for site in (Site("attn", resid.layer), Site("mlp", resid.layer)) if site in sites]
        if before in sites and added:
            sums.append((before, added, resid))
    return sums


def fit_scales(activations: Mapping[Site, Tensor], constants: Sequence[float]) -> dict[Site, float]:
    """The factors with which attn and mlp are added to the residual stream, where they are not 1 and explain it; one
    of the config's constants where one is near.
    """
    scales: dict[Site, float] = {}
    for before, added, after in block_sums(list(activations)):
        parts = [_exactly(activations[site]) for site in added]
        if len({activations[site].shape for site in (before, *added, after)}) > 1:
            continue
        change = _exactly(activations[after]) - _exactly(activations[before])
        allowed = _allowed(activations[after], change)
        if float((change - torch.stack(parts).sum(0)).abs().max()) <= allowed:
            continue
        factors = [_nearest(x, constants, activations[after]) for x in fit_factors(parts, change)]
        explained = torch.stack([x * part for x, part in zip(factors, parts, strict=True)]).sum(0)
        if min(factors) >= SMALLEST_SCALE and float((change - explained).abs().max()) <= allowed:
            scales |= dict(zip(added, factors, strict=True))
    return scales


def _exactly(x: Tensor) -> Tensor:
    """In float64, on the CPU: Apple's GPUs have none."""
    return x.detach().cpu().double()


def _allowed(after: Tensor, change: Tensor) -> float:
    """What rounding of the stream explains, and a little of the change itself."""
    tolerance = TOLERANCE if _exact(after) else TOLERANCE_16_BIT
    return tolerance * (float(change.abs().max()) + 0.1 * float(after.abs().max()))


def _nearest(factor: float, constants: Sequence[float], x: Tensor) -> float:
    near = TOLERANCE if _exact(x) else TOLERANCE_16_BIT
    best = min(constants, key=lambda constant: abs(constant - factor), default=factor)
    return best if abs(best - factor) <= near * abs(factor) else float(f"{factor:.6g}")


def _check_sums(model: LanguageModel, activations: dict[Site, Tensor]) -> None:
    """Sites where the architecture has them must add up; of the user's own it is said where they do not."""
    moved, off = model.moved_sites, []
    for before, added, after in block_sums(model.sites):
        if len({activations[site].shape for site in (before, *added, after)}) == 1:
            total = torch.stack([activations[site].float() for site in (before, *added)]).sum(0)
            difference = relative_difference(total, activations[after])
        else:
            difference = float("inf")
        if difference <= _tolerance(model):
            continue
        where = ", ".join(f"{site} at {str(model.site_paths[site])!r}" for site in added)
        names = " + ".join(site.name for site in (before, *added))
        sentence = f"{names} differs from {after} by {difference:.1e} of its size, allowed is {_tolerance(model):.0e}"
        if not moved.keys() & {before, *added, after}:
            raise UserError(f"{sentence} ({where}): give site_paths that fit this model")
        off.append(f"{sentence} ({where})")
    if off:
        logger.warning(
            "model %s: the site paths given are not what sublayers add to the residual stream in %d blocks: %s",
            model.name, len(off), off[0],
        )  # fmt: skip


def _check_copies(model: LanguageModel, tokens: Tokens, logits: Tensor) -> None:
    def difference(sites: tuple[Site, ...]) -> float:
        return relative_difference(model.run(tokens, edits=dict.fromkeys(sites, torch.clone)).logits, logits)

    if difference(model.sites) <= _tolerance(model):
        return
    worst = max(model.sites, key=lambda site: difference((site,)))
    raise UserError(
        f"replacing the tensor at site {worst.name!r} ({model.site_paths[worst].module!r}) by a copy changes the "
        f"logits by {difference((worst,)):.1e} of their size: give another path for it in site_paths"
    )


def _check_connected(model: LanguageModel, tokens: Tokens, sites: list[Site]) -> None:
    run = model.run(tokens, capture=sites, grad=True)
    captured = [run.activations[site] for site in sites]
    loose = [site for site, x in zip(sites, captured, strict=True) if not x.requires_grad]
    if not loose:
        gradients = torch.autograd.grad(run.logits.float().square().sum(), captured, allow_unused=True)
        loose = [site for site, gradient in zip(sites, gradients, strict=True) if gradient is None]
    if loose:
        raise UserError(
            f"site {loose[0].name!r} ({model.site_paths[loose[0]].module!r}) does not lie between the embedding and "
            "the logits: give another path for it in site_paths"
        )


def _check_gradient(model: LanguageModel, tokens: Tokens) -> None:
    """Warn where a module between the first site and the logits has no backward pass (int8 kernels)."""
    site = model.sites[0]
    run = model.run(tokens, capture=[site], grad=True)
    x = run.activations[site]
    weights = torch.randn(run.logits.shape, generator=torch.Generator().manual_seed(0)).to(run.logits)
    m = (run.logits * weights).sum()
    (gradient,) = torch.autograd.grad(m, x, allow_unused=True) if m.requires_grad else (None,)
    if gradient is None:
        model.has_gradients = False
        logger.warning(
            "model %s: no gradient reaches its logits from %s: modules have no backward pass, as quantised ones may "
            "have; what needs gradients will be refused", model.name, site,
        )  # fmt: skip
        return

    def difference(step: float) -> float:
        direction = step * x.detach().abs().max() * gradient / gradient.norm().clamp_min(1e-30)
        values = [(run_at(sign * direction) * _exactly(weights)).sum() for sign in (1, -1)]
        slope, measured = float((_exactly(gradient) * _exactly(direction)).sum()), float(values[0] - values[1]) / 2
        return abs(slope - measured) / max(abs(slope), abs(measured), 1e-30)

    def run_at(change: Tensor) -> Tensor:
        return _exactly(model.run(tokens, edits={site: lambda x: x + change}).logits)

    if _exact(model.dtype) and (worst := _smallest(difference)) > STEP_TOLERANCE:
        logger.warning(
            "model %s: its gradient differs by %.0f %% from what a small step at %s does to the logits: a module has "
            "no backward pass, as quantised ones may have, or rounds; effects by gradients are wrong by as much",
            model.name, 100 * worst, site,
        )  # fmt: skip


def _smallest(difference: Callable[[float], float]) -> float:
    """The smallest difference over the steps, tried until one is small enough."""
    worst = float("inf")
    for step in STEPS:
        worst = min(worst, difference(step))
        if worst <= STEP_TOLERANCE:
            break
    return worst

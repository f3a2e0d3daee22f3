"""What must hold of every site of a model, tried on a few random tokens when the model is loaded.

1. Activations are finite.
2. The residual stream before a block + attn + mlp is the stream after it, the embedding being the stream before the
   first: tried in layers whose sites are the architecture's own contributions.
3. Replacing x by a copy of x changes no logits, at every site.
4. A site the user placed reaches the logits: there is a gradient from them to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.errors import UserError
from sae.sites import Site, own_sites

if TYPE_CHECKING:
    from sae.model import LanguageModel, Run, Tokens

TOLERANCE = 1e-4  # relative to the largest value, in float32 and float64
TOLERANCE_16_BIT = 3e-2


def check_model(model: LanguageModel) -> None:
    """Raise UserError naming the site where something does not hold."""
    tokens = model.probe_tokens()
    plain = model.run(tokens, capture=model.sites)
    check_finite(plain)
    own = own_sites(model.hf, model.site_paths)
    for layer in range(model.n_layers):
        _check_sum(model, layer, own, plain.activations)
    _check_copies(model, tokens, plain.logits)
    placed = [site for site in model.sites if site not in own]
    if placed:
        _check_connected(model, tokens, placed)


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
    return TOLERANCE if model.dtype in (torch.float32, torch.float64) else TOLERANCE_16_BIT


def _check_sum(model: LanguageModel, layer: int, own: set[Site], activations: dict[Site, Tensor]) -> None:
    before = Site("resid", layer - 1) if layer else Site("embed")
    attn, mlp, resid = (Site(kind, layer) for kind in ("attn", "mlp", "resid"))
    if not {before, attn, mlp, resid} <= own:
        return
    total = sum(activations[site].float() for site in (before, attn, mlp))
    difference = relative_difference(total, activations[resid])
    if not difference <= _tolerance(model):
        where = ", ".join(f"{site} at {model.site_paths[site].module!r}" for site in (attn, mlp))
        raise UserError(
            f"{before} + {attn} + {mlp} differs from {resid} by {difference:.1e} of its size, allowed is "
            f"{_tolerance(model):.0e} ({where}): give site_paths that fit this model"
        )


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

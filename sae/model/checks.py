"""Checks of every site of a model, on a few random tokens when the model is loaded.

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
from collections.abc import Callable

import torch
from torch import Tensor

from sae.errors import UserError
from sae.model.forward import PROBE_ROWS, is_exact, padding_tokens, relative_difference, with_gradients
from sae.model.huggingface import quantization
from sae.model.language_model import LanguageModel, Run
from sae.model.site_search import TOLERANCE_16_BIT, block_sums, exactly, tolerance
from sae.model.sites import Site
from sae.model.tokens import Tokens

log = logging.getLogger(__name__)

PADDING_TOLERANCE = 1e-3  # of the largest logit: kernels for other shapes round otherwise
STEPS = 1e-3, 1e-2, 1e-4  # of x: one may cross a routing decision or vanish in rounding
STEP_TOLERANCE = 2e-2  # of the change of the logits


@with_gradients
def check_model(model: LanguageModel) -> None:
    """Raise UserError naming the site where something does not hold, on four forward passes."""
    probe, n = model.probe_tokens(), PROBE_ROWS
    varied = padding_tokens(probe)[1:].to(model.device)  # the first row with another end, and its beginning padded
    tokens = Tokens(*(torch.cat(pair) for pair in ((probe.input_ids, varied.input_ids),
                                                    (probe.attention_mask, varied.attention_mask))))  # fmt: skip
    plain = model.run(tokens, capture=model.sites)
    probed = Run({site: x[:n] for site, x in plain.activations.items()}, plain.logits[:n])
    probed.check_finite()
    padding_shows = _check_order(model, tokens, plain.logits)
    _check_sums(model, probed.activations)
    _check_copies(model, tokens, plain.logits)
    model.padding_shows = padding_shows
    _check_gradient(model, probe)


def precision_of(model: LanguageModel) -> dict[str, str | None]:
    """Number type and quantisation of a model, which its activations depend on and its fingerprint does not."""
    return {"dtype": str(model.dtype).removeprefix("torch."), "quantize": quantization(model.architecture)}


def _check_order(model: LanguageModel, tokens: Tokens, logits: Tensor) -> bool:
    """Later tokens change nothing; whether padding does is returned. The last two rows are variants of the first."""
    n = tokens.n_positions - int(tokens.lengths[-1])  # of padding
    allowed = PADDING_TOLERANCE if is_exact(model.dtype) and not _rounds(model) else TOLERANCE_16_BIT
    if relative_difference(logits[-2, :-1], logits[0, :-1]) > allowed:
        raise UserError(
            f"model {model.name!r} is not a decoder: its logits at a token depend on the tokens after it "
            "(for a model that can be both, set is_decoder in its config.json)"
        )
    padded = relative_difference(logits[-1, n:], logits[0, : tokens.n_positions - n])
    return not padded <= allowed  # also where padding makes NaN


def _check_sums(model: LanguageModel, activations: dict[Site, Tensor]) -> None:
    """Sites where the architecture has them must add up; of the user's own it is said where they do not."""
    moved, off, allowed = model.moved_sites, [], tolerance(model.dtype)
    for stream_before, added, stream_after in block_sums(model.sites):
        if len({activations[site].shape for site in (stream_before, *added, stream_after)}) == 1:
            total = torch.stack([activations[site].float() for site in (stream_before, *added)]).sum(0)
            difference = relative_difference(total, activations[stream_after])
        else:
            difference = float("inf")
        if difference <= allowed:
            continue
        where = ", ".join(f"{site} at {str(model.site_paths[site])!r}" for site in added)
        names = " + ".join(site.name for site in (stream_before, *added))
        sentence = f"{names} differs from {stream_after} by {difference:.1e} of its size, allowed is {allowed:.0e}"
        if not moved.keys() & {stream_before, *added, stream_after}:
            raise UserError(f"{sentence} ({where}): give site_paths that fit this model")
        off.append(f"{sentence} ({where})")
    if off:
        log.warning(
            "model %s: the site paths given are not what sublayers add to the residual stream in %d blocks: %s",
            model.name, len(off), off[0],
        )  # fmt: skip


def _check_copies(model: LanguageModel, tokens: Tokens, logits: Tensor) -> None:
    def difference(sites: tuple[Site, ...]) -> float:
        changed = model.run(tokens, edits=dict.fromkeys(sites, torch.clone)).logits
        return relative_difference(changed[:-1], logits[:-1])  # the last row has padding, of which a model may make NaN

    if difference(model.sites) <= tolerance(model.dtype):
        return
    worst = max(model.sites, key=lambda site: difference((site,)))
    raise UserError(
        f"replacing the tensor at site {worst.name!r} ({model.site_paths[worst].module!r}) by a copy changes the "
        f"logits by {difference((worst,)):.1e} of their size: give another path for it in site_paths"
    )


def _check_gradient(model: LanguageModel, tokens: Tokens) -> None:
    """Refuse a site of the user's that no gradient reaches, and warn where a module between the first site and the
    logits has no backward pass (int8 kernels).
    """
    first, moved = model.sites[0], list(model.moved_sites)
    run = model.run(tokens, capture=[first, *moved], grad=True)
    weights = torch.randn(run.logits.shape, generator=torch.Generator().manual_seed(0)).to(run.logits)
    m = (run.logits * weights).sum()
    gradients = {site: _gradient(run, m, site) for site in (first, *moved)}
    loose = next((site for site in moved if gradients[site] is None), None)
    if loose is not None:
        raise UserError(
            f"site {loose.name!r} ({model.site_paths[loose].module!r}) does not lie between the embedding and "
            "the logits: give another path for it in site_paths"
        )
    if (gradient := gradients[first]) is None:
        model.has_gradients = False
        log.warning(
            "model %s: no gradient reaches its logits from %s: modules have no backward pass, as quantised ones may "
            "have; what needs gradients will be refused", model.name, first,
        )  # fmt: skip
        return
    x = run.activations[first]

    def difference(step: float) -> float:
        direction = step * x.detach().abs().max() * gradient / gradient.norm().clamp_min(1e-30)
        both = torch.cat([direction, -direction])  # one pass over two copies of the batch
        logits = model.run(tokens.repeat(2), edits={first: lambda x: x + both}).logits
        up, down = (exactly(logits) * exactly(weights).repeat(2, 1, 1)).unflatten(0, (2, -1)).sum((1, 2, 3)).tolist()
        slope, measured = float((exactly(gradient) * exactly(direction)).sum()), (up - down) / 2
        return abs(slope - measured) / max(abs(slope), abs(measured), 1e-30)

    if is_exact(model.dtype) and not _rounds(model) and (worst := _smallest(difference)) > STEP_TOLERANCE:
        log.warning(
            "model %s: its gradient differs by %.0f %% from what a small step at %s does to the logits: a module has "
            "no backward pass, as quantised ones may have, or rounds; effects by gradients are wrong by as much",
            model.name, 100 * worst, first,
        )  # fmt: skip


def _rounds(model: LanguageModel) -> bool:
    """Whether linear layers round their inputs to 8 bits, and gradients go through as if they did not."""
    return quantization(model.architecture) == "8bit"


def _gradient(run: Run, m: Tensor, site: Site) -> Tensor | None:
    """dm/dx; None where x does not reach m."""
    if run.pull_back is None and not (m.requires_grad and run.activations[site].requires_grad):
        return None
    return run.gradients(m, [site], allow_unused=True, retain_graph=True)[0]


def _smallest(difference: Callable[[float], float]) -> float:
    """The smallest difference over the steps, tried until one is small enough."""
    worst = float("inf")
    for step in STEPS:
        worst = min(worst, difference(step))
        if worst <= STEP_TOLERANCE:
            break
    return worst

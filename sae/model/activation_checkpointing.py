"""Forward passes cut into parts, so that a gradient keeps the graph of one part alone: activation checkpointing.

1. Between two cuts lies a part: a function of the tensors that stand at the sites before it, x at other sites and the
   logits its results.
2. A part runs without a graph. For its gradient it runs once more, with one (Chen et al. 2016): memory of one block in
   place of all, for one more forward pass.
3. `Checkpointed` cuts a model that is here at every residual site. `sae.model.remote` cuts one that is elsewhere where
   it is edited: there both runs are requests.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae.model.forward import Run
from sae.model.hook_points import SiteEdit, edited
from sae.model.site_handles import hidden_by
from sae.model.sites import READ_KINDS, Site
from sae.model.tokens import Tokens

LOGITS = "logits"


class Runner(Protocol):
    """Runs parts of a model."""

    def ask(
        self, part: Part, values: Mapping[Site, Tensor], leaves: Sequence[Site],
        cotangents: Mapping[str, Tensor] | None = None, *, logits: bool = True,
    ) -> dict[str, Any]:  # fmt: skip
        """x of captured sites and the logits by name, or the gradients at the leaves; values: what is fixed."""


@dataclass(frozen=True)
class Part:
    """A part of a forward pass: a function of the tensors that stand at sites before it."""

    runner: Runner
    model: Any
    tokens: Tokens
    fixed: Mapping[Site, Tensor] = field(default_factory=dict)
    """Tensors that stand at sites, whose modules do not run."""
    captured: tuple[Site, ...] = ()
    """Sites whose x is the result, behind those of `fixed` that reach them."""
    functions: Mapping[Site, SiteEdit] = field(default_factory=dict)
    """Edits made where the part runs."""
    last_only: bool = False
    logits: bool = True
    """Whether logits are a result."""

    def run(self, grad: bool) -> tuple[dict[Site, Tensor], Tensor]:
        """x of the captured sites, and the logits; with `grad` as functions of what is fixed."""
        places, _ = self.standing()
        tensors = [self.fixed[site] for site in places]
        if grad and any(x.requires_grad for x in tensors):
            results = _InParts.apply(self, places, *tensors)
        else:
            results = self.ask(dict(zip(places, tensors, strict=True)))
        return dict(zip(self.captured, results, strict=False)), results[-1] if self.logits else torch.empty(0)

    def ask(self, values: Mapping[Site, Tensor]) -> list[Tensor]:
        """x of the captured sites, and the logits if they are wanted."""
        given = self.runner.ask(self, values, (), logits=self.logits)
        logits = [given[LOGITS][:, -1:] if self.last_only else given[LOGITS]] if self.logits else []
        return [*(given[site.name] for site in self.captured), *logits]

    def pulled(
        self, values: Mapping[Site, Tensor], cotangents: Mapping[str, Tensor], sources: Sequence[Site]
    ) -> list[Tensor | None]:
        """Gradients at sites that are fixed or captured, from those at captured sites and the logits, by name."""
        given = self.runner.ask(self, values, sources, cotangents)
        return [given[site.name] for site in sources]

    def differentiable(self, run: Run) -> Run:
        """The run with `Run.gradients` at all sites from one backward pass."""
        outputs = {site.name: run.activations[site] for site in self.captured}
        outputs |= {LOGITS: run.logits} if self.logits else {}
        for x in outputs.values():
            x.requires_grad_()
        places, _ = self.standing()

        def pull_back(m: Tensor, sites: Sequence[Site]) -> list[Tensor | None]:
            at_outputs = torch.autograd.grad(m, list(outputs.values()), allow_unused=True, retain_graph=True)
            incoming = {name: g for name, g in zip(outputs, at_outputs, strict=True) if g is not None}
            return self.pulled({site: self.fixed[site] for site in places}, incoming, sites)

        return replace(run, pull_back=pull_back)

    def standing(self) -> tuple[list[Site], list[Site]]:
        """The fixed sites that reach what is wanted, in order, and blocks before them that need not run."""
        contains = self.model._contains
        reaching = [site for site in self.fixed if site not in hidden_by(self.fixed, contains)]
        blocks = [site for site in reaching if site.kind == "resid" and contains.get(site)]
        last = max(blocks, default=None)
        if last is None or any(site < last for site in {*self.captured, *self.functions}):
            return sorted(reaching, key=self.model._when), []
        later = [site for site in reaching if site >= last]
        return sorted(later, key=self.model._when), [s for s in self.model.sites if s < last and contains.get(s)]


class _InParts(torch.autograd.Function):
    """The results of a part, which runs again for its gradient."""

    @staticmethod
    def forward(ctx: Any, part: Part, places: list[Site], *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the part."""
        ctx.set_materialize_grads(False)
        ctx.part, ctx.places = part, places
        ctx.save_for_backward(*tensors)
        return tuple(part.ask(dict(zip(places, tensors, strict=True))))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        """Run it again, for the gradients at what is fixed."""
        part, values = ctx.part, dict(zip(ctx.places, ctx.saved_tensors, strict=True))
        names = [*(site.name for site in part.captured), *([LOGITS] if part.logits else [])]
        incoming = {name: g for name, g in zip(names, cotangents, strict=True) if g is not None}
        sources = [site for site, needed in zip(ctx.places, ctx.needs_input_grad[2:], strict=True) if needed]
        gradients = dict(zip(sources, part.pulled(values, incoming, sources), strict=True)) if incoming else {}
        return None, None, *(gradients.get(site) for site in ctx.places)


def run_in_parts(
    part: Part, captured: set[Site], edits: Mapping[Site, SiteEdit], values: Mapping[Site, Tensor], cuts: set[Site],
    *, grad: bool, need_logits: bool,
) -> Run:  # fmt: skip
    """A forward pass that is cut at some sites, all those with edits among them; part: its model and tokens."""
    when = part.model._when
    order = sorted(cuts, key=when)
    fixed, activations = dict(values), {site: x for site, x in values.items() if site in captured}
    for number, cut in enumerate(order):
        if cut not in fixed:
            before = [site for site in captured if when(site) < when(cut) and site not in activations]
            earlier = {site: x for site, x in fixed.items() if site < cut}
            activations |= replace(part, fixed=earlier, captured=(*sorted(before), cut), logits=False).run(grad)[0]
        x = fixed[cut] if cut in fixed else activations.pop(cut)
        x = x.detach().requires_grad_() if grad and not number and not x.requires_grad else x
        x = edited(x, edits[cut], cut) if cut in edits else x
        fixed |= {cut: x} if cut.kind not in READ_KINDS else {}
        activations |= {cut: x} if cut in captured else {}
    rest = tuple(sorted(captured - activations.keys(), key=when))
    last = replace(part, fixed=fixed, captured=rest, logits=need_logits)
    more, logits = last.run(grad) if rest or need_logits else ({}, torch.empty(0))
    activations |= more
    run = Run({site: activations[site] for site in sorted(captured, key=when)}, logits)
    return last.differentiable(run) if grad and not cuts else run


@dataclass
class Checkpointed:
    """Runs with gradients that keep no more than the graph of one block.

    The forward pass is cut at every residual site and everything that is captured or edited. What is between two cuts
    runs without a graph, and once more when its gradient is taken.
    """

    plain: Any
    """The `LanguageModel` without these cuts."""

    @staticmethod
    def of(model: Any) -> Any:
        """The same model with runs of this kind."""
        cut = copy.copy(model)
        cut.checkpointed = Checkpointed(model)
        return cut

    def run(
        self, model: Any, tokens: Tokens, captured: set[Site], edits: Mapping[Site, SiteEdit],
        values: Mapping[Site, Tensor], *, grad: bool, last_only: bool, need_logits: bool,
    ) -> Run:  # fmt: skip
        """One forward pass with gradients; see `LanguageModel.run`."""
        stream = [site for site in model.sites if site.kind == "resid" and model._contains.get(site)]
        first = max((site for site in values if site in stream), default=None)
        last = max({*captured, *edits}, key=model._when, default=Site("embed"))
        between = {site for site in stream if (first is None or site > first) and (need_logits or site < last)}
        inner = {site for site in captured if site.kind not in READ_KINDS}
        part = Part(self, model, tokens, last_only=last_only)
        return run_in_parts(
            part, captured, edits, values, {*edits, *inner, *between}, grad=grad, need_logits=need_logits
        )

    def ask(
        self, part: Part, values: Mapping[Site, Tensor], leaves: Sequence[Site],
        cotangents: Mapping[str, Tensor] | None = None, *, logits: bool = True,
    ) -> dict[str, Any]:  # fmt: skip
        """The same as `Server.ask`, in this process."""
        fixed = {site: x.detach().requires_grad_(site in leaves) for site, x in values.items()}
        passed = part.standing()[1]
        skip = fixed | {block: fixed[min(site for site in fixed if site > block)].detach() for block in passed}
        wanted = logits if cotangents is None else LOGITS in cotangents
        with torch.set_grad_enabled(cotangents is not None):
            run = self.plain._run(
                part.tokens, {*part.captured}, {}, skip, grad=cotangents is not None, last_only=part.last_only,
                need_logits=wanted, unedited=True,
            )  # fmt: skip
        given = {site.name: x for site, x in run.activations.items()} | {LOGITS: run.logits}
        if cotangents is None:
            return {name: x.detach() for name, x in given.items()}
        outputs = [given[name] for name in cotangents]
        sources = [fixed[site] for site in leaves]
        gradients = torch.autograd.grad(outputs, sources, list(cotangents.values()), allow_unused=True)
        return {site.name: gradient for site, gradient in zip(leaves, gradients, strict=True)}

"""Runs of a model that is elsewhere: on NDIF or another server of nnsight, or in nnsight's simulation of one.

The interface is that of `LanguageModel.run`; only tensors travel, so that no code and no autoencoder has to be there.

1. A run without edits is one request, whatever is captured or skipped.
2. An edit is a function that only this process has. The run is cut at its site: one request up to there gives x, the
   edit is applied here, and the next request goes on from what it gave. A run with edits at n sites is n + 1 requests
   of a part of the model each. Edits that are functions of torch itself travel.
3. With gradients every part is a function of the tensors that stand at the sites before it. Its backward pass is a
   request as well, which makes that part of the forward pass again.
4. What is captured in a run without edits is not cut off: `Run.gradients` asks for dm/dx at all sites in one request.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sae._run.processes import current
from sae.errors import UserError
from sae.model.forward import Run, forward_inputs, outside_inference_mode
from sae.model.hook_points import HookPoint, SiteEdit, edited
from sae.model.huggingface import Loaded, hash_of, load_hf, not_loaded, pretrained_tokenizer, sampled
from sae.model.site_handles import FirstPass, blocks_after, envoy_of, hidden_by
from sae.model.site_search import fit_scales
from sae.model.sites import READ_KINDS, Site, model_type
from sae.model.tokens import Tokens
from sae.model.tracing import Step, has_key, request, samples, server_handles, structure

LOGITS = "logits"
SIMULATION = "local"


def parse_remote(remote: str) -> bool | str:
    """The server as nnsight takes it, from "ndif", "local" or the address of a server.

    Raises:
        UserError: it is none of these, nnsight has no key for NDIF, or there are several processes.
    """
    if current().size > 1:
        raise UserError("remote is for one process: the server shares its work out itself")
    if remote == "ndif":
        if not has_key():
            raise UserError("NDIF asks for a key, and nnsight has none: set NDIF_API_KEY, or run: nnsight login")
        return True
    if remote == SIMULATION or remote.startswith(("http://", "https://")):
        return remote
    raise UserError(
        f"remote is {remote!r}: allowed are ndif, local (nnsight's simulation) and an address (https://...)"
    )


@dataclass
class Server:
    """A model elsewhere, as requests name it."""

    root: Any
    """nnsight's handle of the model."""
    where: bool | str
    """True for NDIF, "local" for the simulation, or an address."""
    name: str
    """Of the model."""
    dtype: torch.dtype = torch.float32
    """Number type of the activations there."""
    n_requests: int = 0
    """How many were made."""
    points: dict[Site, HookPoint] = field(default_factory=dict)
    """How each site is read."""

    @property
    def refusal(self) -> UserError:
        """The error of what needs the model here; raise what this returns."""
        return UserError(
            f"this needs the weights and modules of model {self.name!r} in this process, and with --remote there are "
            "only its activations and gradients: leave --remote out"
        )

    def fingerprints(self) -> tuple[str, str]:
        """The model's, as `sae.model.huggingface.fingerprints` gives them, from a sample of all weights."""
        hf, seen, weights, shapes = self.root._module, set(), [], []
        for path, module in hf.named_modules():
            for name, weight in module.named_parameters(recurse=False, remove_duplicate=False):
                if id(weight) not in seen:
                    seen.add(id(weight))
                    shapes.append(tuple(weight.shape))
                    weights.append((envoy_of(self.root, path), name, sampled(weight.numel())))
        values = samples(self.root, self.where, weights, torch.zeros(1, 2, dtype=torch.int64))
        self.n_requests += 1
        self.dtype = values[0].dtype
        return hash_of(model_type(hf), zip(shapes, values, strict=True))

    def first_pass(self, points: Mapping[Site, HookPoint], tokens: Tokens) -> FirstPass:
        """Structure and sizes of the sites, from one request; the points are kept."""
        steps = [_handle(point) for point in points.values()]
        shown = structure(self.root, self.where, forward_inputs(self.root._module, tokens), steps)
        self.n_requests += 1
        rows, values = len(tokens), {}
        for site, point in points.items():
            seen = shown["sites"][site.name]
            x = seen["tensor"]
            self.points[site] = replace(
                point, outputs=_empty(seen["outputs"]), body_outputs=_empty(seen["body"]),
                flat=x.ndim == 2, in_place=seen["changed"],
            )  # fmt: skip
            values[site] = x.unflatten(0, (rows, -1)) if x.ndim == 2 else x
        config = self.root._module.config
        numbers = [value for entry in (config, config.get_text_config()) for value in vars(entry).values()]
        scales = fit_scales(values, [value for value in numbers if isinstance(value, float)])
        self.points = {site: replace(p, scale=scales.get(site, 1.0)) for site, p in self.points.items()}
        widths = {site: x.shape[-1] for site, x in values.items()}
        d_model = getattr(config, "hidden_size", None) or max(widths.values())
        self.dtype = next(iter(values.values())).dtype
        return FirstPass(dict(self.points), widths, shown["logits"].shape[-1], d_model)

    def run(
        self, model: Any, tokens: Tokens, captured: set[Site], edits: Mapping[Site, SiteEdit],
        values: Mapping[Site, Tensor], *, grad: bool, last_only: bool, need_logits: bool,
    ) -> Run:  # fmt: skip
        """One forward pass of a `LanguageModel` that is elsewhere; see `LanguageModel.run`."""
        functions = {site: edit for site, edit in edits.items() if _travels(edit) and not grad and site not in values}
        here = {site: edit for site, edit in edits.items() if site not in functions}
        cuts = {*here, *(captured if grad and here else ())}
        part = _Part(self, model, tokens, functions=functions, last_only=last_only)
        return run_in_parts(part, captured, here, values, cuts, grad=grad, need_logits=need_logits)

    def ask(
        self, part: _Part, values: Mapping[Site, Tensor], leaves: Sequence[Site],
        cotangents: Mapping[str, Tensor] | None = None, *, logits: bool = True,
    ) -> dict[str, Any]:  # fmt: skip
        """One request for x of a part's captured sites and the logits by name, or the gradients at the leaves; values:
        what is fixed.
        """
        self.n_requests += 1
        inputs = forward_inputs(self.root._module, part.tokens, last_only=part.last_only)
        incoming = dict(cotangents or {})
        if LOGITS in incoming and part.last_only and "logits_to_keep" not in inputs:
            incoming[LOGITS] = torch.nn.functional.pad(incoming[LOGITS], (0, 0, part.tokens.n_positions - 1, 0))
        with part.model._lock, outside_inference_mode():
            return request(
                self.root, self.where, inputs, part.steps(values, leaves), logits=logits, cotangents=incoming,
                sources=[site.name for site in leaves],
            )  # fmt: skip


@dataclass
class Blocks:
    """Runs with gradients that keep no more than the graph of one block: activation checkpointing (Chen et al. 2016).

    The forward pass is cut at every residual site and everything that is captured or edited. What is between two cuts
    runs without a graph, and once more when its gradient is taken.
    """

    plain: Any
    """The `LanguageModel` without these cuts."""

    @staticmethod
    def of(model: Any) -> Any:
        """The same model with runs of this kind."""
        cut = copy.copy(model)
        cut.blocks = Blocks(model)
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
        part = _Part(self, model, tokens, last_only=last_only)
        return run_in_parts(
            part, captured, edits, values, {*edits, *inner, *between}, grad=grad, need_logits=need_logits
        )

    def ask(
        self, part: _Part, values: Mapping[Site, Tensor], leaves: Sequence[Site],
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


def run_in_parts(
    part: _Part, captured: set[Site], edits: Mapping[Site, SiteEdit], values: Mapping[Site, Tensor], cuts: set[Site],
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


@dataclass(frozen=True)
class _Part:
    """A part of a forward pass: a function of the tensors that stand at sites before it."""

    server: Server | Blocks
    model: Any
    tokens: Tokens
    fixed: Mapping[Site, Tensor] = field(default_factory=dict)
    """Tensors that stand at sites, whose modules do not run."""
    captured: tuple[Site, ...] = ()
    """Sites whose x is the result, behind those of `fixed` that reach them."""
    functions: Mapping[Site, SiteEdit] = field(default_factory=dict)
    """Edits that travel."""
    last_only: bool = False
    logits: bool = True
    """Whether logits are a result."""

    def run(self, grad: bool) -> tuple[dict[Site, Tensor], Tensor]:
        """x of the captured sites, and the logits; with `grad` as functions of what is fixed."""
        places, _ = self.standing()
        tensors = [self.fixed[site] for site in places]
        if grad and any(x.requires_grad for x in tensors):
            results = _Elsewhere.apply(self, places, *tensors)
        else:
            results = self.ask(dict(zip(places, tensors, strict=True)))
        return dict(zip(self.captured, results, strict=False)), results[-1] if self.logits else torch.empty(0)

    def ask(self, values: Mapping[Site, Tensor]) -> list[Tensor]:
        """x of the captured sites, and the logits if they are wanted."""
        given = self.server.ask(self, values, (), logits=self.logits)
        logits = [given[LOGITS][:, -1:] if self.last_only else given[LOGITS]] if self.logits else []
        return [*(given[site.name] for site in self.captured), *logits]

    def pulled(
        self, values: Mapping[Site, Tensor], cotangents: Mapping[str, Tensor], sources: Sequence[Site]
    ) -> list[Tensor | None]:
        """Gradients at sites that are fixed or captured, from those at captured sites and the logits, by name."""
        given = self.server.ask(self, values, sources, cotangents)
        return [given[site.name] for site in sources]

    def differentiable(self, run: Run) -> Run:
        """The run with `Run.gradients` at all sites from one request."""
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

    def steps(self, values: Mapping[Site, Tensor], leaves: Sequence[Site]) -> list[Step]:
        """Steps of the request, in forward order."""
        points = {site: self.model._point(site) for site in {*values, *self.captured, *self.functions}}
        order = sorted(points, key=self.model._when)
        n = len(self.tokens)
        first = min((order.index(site) for site in leaves), default=-1)
        model, reached = self.model, list(points.values())
        passes = [] if self.logits else blocks_after(reached, model._hook_points, model._contains)
        before = [self.model._point(site) for site in self.standing()[1]]
        steps = [_step(point, n) | {"passes": True} for point in before]
        for number, site in enumerate(order):
            step = _step(points[site], n)
            if site in values:
                step |= {"value": values[site].detach(), "leaf": site in leaves}
            else:
                step |= {"function": self.functions[site]} if site in self.functions else {}
                step |= {"leaf": number == first}
            steps.append(step)
        return steps + [_step(point, n) | {"passes": True} for point in passes]

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


class _Elsewhere(torch.autograd.Function):
    """The results of a part, with a request for its backward pass."""

    @staticmethod
    def forward(ctx: Any, part: _Part, places: list[Site], *tensors: Tensor) -> tuple[Tensor, ...]:
        """Ask for the results."""
        ctx.set_materialize_grads(False)
        ctx.part, ctx.places = part, places
        ctx.save_for_backward(*tensors)
        return tuple(part.ask(dict(zip(places, tensors, strict=True))))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        """Ask for the gradients at what is fixed."""
        part, values = ctx.part, dict(zip(ctx.places, ctx.saved_tensors, strict=True))
        names = [*(site.name for site in part.captured), *([LOGITS] if part.logits else [])]
        incoming = {name: g for name, g in zip(names, cotangents, strict=True) if g is not None}
        sources = [site for site, needed in zip(ctx.places, ctx.needs_input_grad[2:], strict=True) if needed]
        gradients = dict(zip(sources, part.pulled(values, incoming, sources), strict=True)) if incoming else {}
        return None, None, *(gradients.get(site) for site in ctx.places)


def _travels(edit: Any) -> bool:
    """Whether an edit is a function of torch's own, such as `torch.clone`, which a server has as well."""
    return isinstance(edit, types.BuiltinFunctionType) and getattr(torch, edit.__name__, None) is edit


def _empty(shape: Sequence[Any]) -> Any:
    """A tuple or list of None, from its kind and the number of entries; None for a tensor."""
    kind, n = shape
    return {"tuple": tuple, "list": list}[kind]([None] * n) if kind and n else None


def _handle(point: HookPoint) -> Step:
    """How a request finds the tensor of a site."""
    step: Step = {"key": point.site.name, "envoy": point.envoy, "entry": point.path.side == "input"}
    return step | ({"body": point.body} if point.body is not None else {})


def _step(point: HookPoint, rows: int) -> Step:
    """A site as `sae.model.tracing.request` takes it."""
    step = _handle(point) | {"outputs": point.outputs, "body_outputs": point.body_outputs, "scale": point.scale}
    return step | {"copy": point.in_place, "rows": rows if point.flat else None}


def connect(model: str | Path | nn.Module, remote: str, options: Mapping[str, Any]) -> tuple[Server, Loaded]:
    """A server and the model that it has.

    Args:
        model: name on the hub; for the simulation a folder or a model too.
        remote: see `parse_remote`.
        options: of `load_hf`, of which a server decides device and number type itself.
    """
    where = parse_remote(remote)
    if options["device_map"] is not None:
        raise UserError("device-map is for a model in this process, remote for one elsewhere: give one of them")
    if where == SIMULATION:
        loaded = load_hf(model, **options)
        root = server_handles(loaded.hf, copy.deepcopy(loaded.tokenizer))
    else:
        name = str(model)
        if isinstance(model, nn.Module) or Path(name).is_dir():
            raise UserError("a model that is here cannot run elsewhere: give its name on the hub, or remote local")
        if options["device"] != "auto" or options["quantize"]:
            raise UserError("device and quantize are for a model in this process: with remote the server has its own")
        tokenizer = options["tokenizer"] or pretrained_tokenizer(name, required=True)
        try:
            root = server_handles(name, copy.deepcopy(tokenizer))
        except Exception as error:
            raise not_loaded("model", name, "config.json", error) from error
        loaded = Loaded(root._module, tokenizer, name, ("", ""))
    server = Server(root, where, loaded.name)
    return server, replace(loaded, fingerprints=server.fingerprints())

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

from sae._run.processes import current
from sae.errors import UserError
from sae.model.activation_checkpointing import LOGITS, Part, run_in_parts
from sae.model.forward import Run, forward_inputs, outside_inference_mode
from sae.model.hook_points import HookPoint, SiteEdit
from sae.model.huggingface import Loaded, hash_of, load_hf, not_loaded, pretrained_tokenizer, sampled
from sae.model.site_handles import FirstPass, blocks_after, envoy_of
from sae.model.site_search import fit_scales
from sae.model.sites import Site, model_type
from sae.model.tokens import Tokens
from sae.model.tracing import Step, has_key, request, samples, server_handles, structure

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
        part = Part(self, model, tokens, functions=functions, last_only=last_only)
        return run_in_parts(part, captured, here, values, cuts, grad=grad, need_logits=need_logits)

    def ask(
        self, part: Part, values: Mapping[Site, Tensor], leaves: Sequence[Site],
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
                self.root, self.where, inputs, _steps(part, values, leaves), logits=logits, cotangents=incoming,
                sources=[site.name for site in leaves],
            )  # fmt: skip


def _steps(part: Part, values: Mapping[Site, Tensor], leaves: Sequence[Site]) -> list[Step]:
    """Steps of the request, in forward order."""
    points = {site: part.model._point(site) for site in {*values, *part.captured, *part.functions}}
    order = sorted(points, key=part.model._when)
    n = len(part.tokens)
    first = min((order.index(site) for site in leaves), default=-1)
    model, reached = part.model, list(points.values())
    passes = [] if part.logits else blocks_after(reached, model._hook_points, model._contains)
    before = [part.model._point(site) for site in part.standing()[1]]
    steps = [_step(point, n) | {"passes": True} for point in before]
    for number, site in enumerate(order):
        step = _step(points[site], n)
        if site in values:
            step |= {"value": values[site].detach(), "leaf": site in leaves}
        else:
            step |= {"function": part.functions[site]} if site in part.functions else {}
            step |= {"leaf": number == first}
        steps.append(step)
    return steps + [_step(point, n) | {"passes": True} for point in passes]


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

"""From a model's module tree to its sites: their default paths, and the handles they are read and written by.

`first_pass` is the first run of a model, on a few random tokens: what its modules return, and how wide its sites are.
At every site the module's output is read: a tensor or a tuple, with rows or flat, changed in place later or not. Where
sublayers are multiplied by a constant before they are added, the constant goes into the hook point.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sae.errors import UserError, unknown
from sae.model.device_map import home_device
from sae.model.forward import cannot_run, config_constants, forward_inputs, probe_tokens
from sae.model.hook_points import HookPoint, empty_outputs
from sae.model.read_places import LayerReads, layer_reads, seen_at
from sae.model.site_search import fit_scales, module_calls, search_sites
from sae.model.sites import MODEL_FAMILIES, READ_KINDS, Site, SitePath, model_type, usual_sites
from sae.model.tokens import Tokens

log = logging.getLogger(__name__)


def default_paths(hf: Any, name: str) -> dict[Site, SitePath]:
    """The sites of the model's family, else those found by measurement, with a word where some could not be."""
    if usual := usual_sites(hf):
        return usual
    probe = probe_tokens(hf).to(home_device(hf))
    rows, positions = probe.input_ids.shape
    hf.eval()
    try:
        search = search_sites(hf, lambda: hf(**forward_inputs(hf, probe)), rows=rows, positions=positions)
    except Exception as error:
        raise cannot_run(name, error) from error
    if search.incomplete:
        layer, tried = next(iter(search.incomplete.items()))
        log.warning(
            "model %s: no attn and mlp sites were found in %d of %d blocks (block %d: %s): give site_paths for them",
            name, len(search.incomplete), len(search.blocks), layer, tried,
        )  # fmt: skip
    return search.paths


def make_hook_point(root: Any, site: Site, path: SitePath) -> HookPoint:
    """The hook point of a site; its body, and what it computes, are known where the path is the architecture's own."""
    family = MODEL_FAMILIES.get(model_type(root._module))
    body, usual = None, False
    if family is not None and path == SitePath.parse(family.defaults()[site.kind]).at(site.layer):
        sublayer = {"attn": family.attn_body, "mlp": family.mlp_body}.get(site.kind)
        body = sublayer and envoy_of(root, SitePath(f"{family.block}.{sublayer}").at(site.layer).module)
        usual = True
    return HookPoint(site, path, envoy_of(root, path.module), body, token_wise=usual and site.kind == "mlp")


def envoy_of(root: Any, module: str) -> Any:
    """nnsight's handle of a module, whose own name for it differs where the module is called `output` or the like."""
    submodule = root._module.get_submodule(module)
    return next(envoy for _, envoy in root.named_modules() if envoy._module is submodule)


def input_embeddings(root: Any) -> HookPoint:
    """The hook point at the input embedding, where gradients start in a model that has no embed site."""
    hf = root._module
    module = hf.get_input_embeddings()
    path = SitePath(next(name for name, other in hf.named_modules() if other is module))
    return HookPoint(Site("embed"), path, envoy_of(root, path.module))


@dataclass(frozen=True)
class ReadPoints:
    """The places at which transcoders of the blocks' MLPs may read."""

    points: dict[Site, HookPoint]
    """Hook point of each place."""
    early: frozenset[Site]
    """Those that come before the attention of their block, with which the MLP shares its norm."""
    layers: dict[int | None, LayerReads]
    """The reads of each block."""
    widths: dict[Site, int]
    """Width of each place."""


def read_points(root: Any, points: Mapping[Site, HookPoint], probe: Tokens) -> ReadPoints:
    """Measure the read places of every block in one forward pass."""
    hf = root._module
    rows, positions = probe.input_ids.shape
    calls = module_calls(hf, lambda: hf(**forward_inputs(hf, probe)), rows=rows, positions=positions)
    places: dict[Site, HookPoint] = {}
    early: set[Site] = set()
    layers: dict[int | None, LayerReads] = {}
    for site in (site for site in points if site.kind == "mlp" and Site("resid", site.layer) in points):
        attn = points[of_attn].path if (of_attn := Site("attn", site.layer)) in points else None
        block = points[Site("resid", site.layer)].path.module
        reads = replace(layer_reads(hf, calls, block, points[site].path, attn), scale=points[site].scale)
        layers[site.layer] = reads
        for kind, path in reads.paths.items():
            place = Site(kind, site.layer)
            early |= {place} if reads.early and kind in ("mlp_resid", "mlp_norm") else set()
            places[place] = HookPoint(
                place, path, envoy_of(root, path.module), flat=kind in reads.flat, read_only=True,
                seen=seen_at(kind, reads, hf), home=points[site].home,
            )  # fmt: skip
    widths = {place: calls[point.path.module].entered.shape[-1] for place, point in places.items()}
    return ReadPoints(places, frozenset(early), layers, widths)


def no_site(site: Site, sites: Sequence[Site], places: Iterable[Site]) -> UserError:
    """The error for a site, or a place that is read only, which the model does not have; raise what this returns."""
    if site.kind not in READ_KINDS:
        return unknown("site", str(site), [other.name for other in sites])
    kinds = ", ".join(place.kind for place in sorted(places) if place.layer == site.layer)
    return UserError(
        f"nothing can be read at {site.kind!r} ({READ_KINDS[site.kind]}) in block {site.layer} of this model: its MLP "
        f"has {kinds or 'no such place'}"
    )


def is_parallel(model: Any) -> bool:
    """Whether no MLP of a `LanguageModel` reads the attention of its own block, in the first block and in the last."""
    tokens, layers = model.probe_tokens(), sorted({0, model.n_layers - 1})
    if any(Site(kind, layer) not in model.widths for kind in ("attn", "mlp") for layer in layers):
        return False
    plain = model.run(tokens, capture=[Site("mlp", layer) for layer in layers], need_logits=False).activations
    for layer in layers:
        attn, mlp = Site("attn", layer), Site("mlp", layer)
        run = model.run(tokens, capture=[mlp], edits={attn: torch.zeros_like}, need_logits=False)
        if not torch.equal(run.activations[mlp], plain[mlp]):
            return False
    return True


def direct_parents(
    sites: Sequence[Site], site: Site, cached: Container[Site], *, parallel_blocks: bool
) -> dict[Site, Site]:
    """Each of a model's sites that a run from `site` on skips -> the cached site that stands for it."""
    earlier = [other for other in sites if other < site and other in cached]
    if parallel_blocks and site.kind == "attn" and Site("mlp", site.layer) in cached:
        earlier.append(Site("mlp", site.layer))
    blocks = [other for other in earlier if other.kind == "resid"]
    if not blocks:
        return {other: other for other in earlier}
    skipped = [other for other in sites if other.kind == "resid" and other <= blocks[-1]]
    return dict.fromkeys(skipped, blocks[-1]) | {other: other for other in earlier if other > blocks[-1]}


def hidden_by(skip: Iterable[Site], contains: Mapping[Site, Sequence[Site]]) -> set[Site]:
    """Sites and read places that are never reached, because they are inside a skipped module; contains: sites by the
    site whose module they are in.
    """
    skip = list(skip)
    hidden = {inner for site in skip for inner in contains.get(site, ())}
    blocks = [site.layer for site in skip if site.kind == "resid" and contains.get(site)]
    hidden |= {Site(kind, layer) for layer in blocks for kind in READ_KINDS}
    return hidden | {Site("mlp_hidden", site.layer) for site in skip if site.kind == "mlp"}


def base_path(hf: Any, table: Mapping[Site, SitePath]) -> str:
    """Path of the model without its head, if all sites are in it; else empty."""
    base = getattr(hf, "base_model_prefix", "")
    inside = isinstance(getattr(hf, base or " ", None), nn.Module)
    return base if inside and all(path.module.startswith(f"{base}.") for path in table.values()) else ""


def containment(table: Mapping[Site, SitePath]) -> dict[Site, tuple[Site, ...]]:
    """For each site at a module's output, the sites inside the module."""
    return {
        site: tuple(inner for inner, other in table.items() if other.module.startswith(f"{path.module}."))
        for site, path in table.items()
        if path.side == "output"
    }


# ---- the first run


Trace = Callable[[Sequence[Callable[[], None]]], Tensor]
"""Makes visits in forward order in one run and gives its logits [B, S, V]."""


@dataclass(frozen=True)
class FirstPass:
    """Structure and sizes that the first run showed."""

    hook_points: dict[Site, HookPoint]
    """Each site with the structure of what its module returns."""
    widths: dict[Site, int]
    """Width of each site, in forward order."""
    vocab_size: int
    """Number of logits V at a position."""
    d_model: int
    """Width of the residual stream."""


def first_pass(name: str, hf: Any, hook_points: Mapping[Site, HookPoint], trace: Trace, *, rows: int) -> FirstPass:
    """Read every site once; `UserError` for a model that cannot run, or whose sites are not reached in this order."""
    described: dict[Site, HookPoint] = {}
    home = home_device(hf)
    values: dict[Site, Tensor] = {}
    raw: dict[Site, tuple[Tensor, int]] = {}  # the module's own tensor, and how often it had been written to

    def visit(point: HookPoint) -> None:
        body = point.body.output if point.body is not None else None
        outputs = empty_outputs(point.envoy.output) if point.path.side == "output" else None
        x = replace(point, flat=False).read(rows)
        raw[point.site] = x, x._version
        point = replace(point, outputs=outputs, body_outputs=empty_outputs(body), flat=x.ndim == 2)
        described[point.site] = point
        values[point.site] = point.read(rows).detach().to(home, copy=True)

    try:
        logits = trace([partial(visit, point) for point in hook_points.values()])
    except Exception as error:
        if type(error).__name__ == "OutOfOrderError":  # nnsight's own, which only tracing.py imports from
            raise UserError(
                f"the sites {', '.join(map(str, hook_points))} are not reached in this order in every run, each once: "
                f"give other site_paths ({str(error).strip().splitlines()[0]})"
            ) from None
        raise cannot_run(name, error) from error
    scales = fit_scales(values, config_constants(hf))
    spread = any(x.device != home for x, _ in raw.values())
    for site, (x, version) in raw.items():
        described[site] = replace(
            described[site], in_place=x._version != version, scale=scales.get(site, 1.0),
            home=home if spread else None, away=x.device if x.device != home else None,
        )  # fmt: skip
    widths = {site: x.shape[-1] for site, x in values.items()}
    d_model = getattr(getattr(hf, "config", None), "hidden_size", None) or max(widths.values())
    return FirstPass(described, widths, logits.shape[-1], d_model)


def blocks_after(
    points: Sequence[HookPoint], hook_points: Mapping[Site, HookPoint], contains: Mapping[Site, Any]
) -> list[HookPoint]:
    """The blocks behind the last of the points, which need not run where no logits are needed."""
    last = max((point.site for point in points), default=Site("embed"))
    reached = -1 if last.layer is None else last.layer
    blocks = [site for site in hook_points if site.kind == "resid" and contains.get(site)]
    return [hook_points[site] for site in blocks if site.layer is not None and site.layer > reached]


def left_out(
    points: Sequence[HookPoint], hook_points: Mapping[Site, HookPoint], contains: Mapping[Site, Any],
    asked: set[Site], *, last_only: bool, need_logits: bool,
) -> list[Callable[[], None]]:  # fmt: skip
    """The visits, after those to `points`, that keep from running what nobody reads: without logits the blocks behind
    the last of the points; with those of the last position alone the last block's MLP at others, if it takes each token
    alone and neither it nor what it is added to is `asked` for.
    """
    if not need_logits:
        return [block.pass_through for block in blocks_after(points, hook_points, contains)]
    mlp = hook_points.get(Site("mlp", max((site.layer or 0 for site in hook_points), default=0)))
    if not last_only or mlp is None or not mlp.token_wise or mlp.outputs is not None:
        return []
    after = {site for site in asked if site >= mlp.site or site.kind in READ_KINDS}
    return [] if after else [mlp.at_last_position]

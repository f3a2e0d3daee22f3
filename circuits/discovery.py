"""From prompts to a circuit (Marks et al. 2024, sections 3 and 4).

1. Sort the prompts by length and cut them into batches that fit a memory budget.
2. For every batch: clean and patch activations, then node effects of all features and errors
   (`circuits.attribution`), held against the measured effect of patching each site alone.
3. Aggregate over positions and examples; choose the strongest nodes.
4. For every batch: edges among those nodes and to the metric by the cut graph (`circuits.edges`).

What is kept between 2 and 4 is the sparse effects and one gradient [B, S, d] per site, on the CPU, and within the
memory budget what the edges would else compute again: activations, and the errors' part of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

from circuits.attribution import (
    GRADIENT_AT_CLEAN,
    METHODS,
    SiteEffects,
    SiteEnds,
    States,
    attribute,
    capture_states,
)
from circuits.attribution.gradients import RULES
from circuits.behaviour import Metric, accuracy, get_metric, last_logits, prepare
from circuits.circuit import Circuit
from circuits.edges import ACTIVE, Edges, edge_effects
from circuits.nodes import AGGREGATIONS, Nodes, aggregate_site, count, select_nodes
from circuits.prompts import PromptSet
from sae.autoencoder import SparseAutoencoder
from sae.errors import UserError, unknown
from sae.model import LanguageModel
from sae.sites import Site, select_sites


@dataclass(frozen=True)
class DiscoverOptions:
    """How a circuit is computed."""

    method: str = "ig"
    """Node method: ig (integrated gradients), ig-adaptive, ig-inputs, attrib (attribution patching), relp, graddrop,
    exact (patch every node), or the baselines activation-difference and random.
    """
    rule: str = "midpoint"
    """Quadrature of ig and ig-inputs: midpoint, gauss-legendre or left-riemann (the paper's code)."""
    steps: int = 10
    """Quadrature nodes of ig and ig-inputs."""
    residual: float = 0.003
    """Completeness error ig-adaptive goes down to, as a share of the total effect."""
    aggregation: str = "sum"
    """sum over positions; position for prompts of equal length; spans for prompts with named token spans."""
    metric: str = "logit_difference"
    """What is explained: logit_difference, log_probability, kl, or package.module:function."""
    sites: str = "all"
    """Sites of the circuit, such as all, resid or resid,mlp_3; each needs an autoencoder."""
    edge_nodes: int = 300
    """Edges are computed among this many strongest nodes; 0 leaves edges out."""
    edge_active: str = "either"
    """Where a downstream feature passes edges on: where it is active on the clean or the patch prompt (either), or on
    the clean prompt alone (clean, as in the paper's code).
    """
    memory: float = 2.0
    """Budget in GiB for what the model keeps during a forward and backward pass; prompts are batched to it."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("method", METHODS),
            ("rule", RULES),
            ("aggregation", AGGREGATIONS),
            ("edge_active", ACTIVE),
        ):
            if getattr(self, name) not in allowed:
                raise unknown(name.replace("_", "-"), getattr(self, name), allowed)
        if self.steps < 1:
            raise UserError(f"steps is {self.steps}: integrated gradients need at least 1 quadrature node")
        if not 0 < self.residual < 1:
            raise UserError(f"residual is {self.residual}: it must be between 0 and 1")
        if self.edge_nodes < 0:
            raise UserError(f"edge-nodes is {self.edge_nodes}: it must be 0 or more")
        if self.memory <= 0:
            raise UserError(f"memory is {self.memory} GiB: it must be positive")


@dataclass(frozen=True)
class _Kept:
    """What the edges would else compute again, on the CPU."""

    states: States  # clean and patch activations only of sites whose features are not in `ends`
    ends: dict[Site, SiteEnds]

    @staticmethod
    def of(states: States, ends: Mapping[Site, SiteEnds]) -> _Kept:
        def needed(activations: Mapping[Site, torch.Tensor]) -> dict[Site, torch.Tensor]:
            return {site: x.cpu() for site, x in activations.items() if site not in ends or not ends[site].codes}

        states = replace(states, clean=needed(states.clean), patch=needed(states.patch), gradients=None)
        return _Kept(states, {site: found.to("cpu") for site, found in ends.items()})

    @property
    def n_bytes(self) -> int:
        activations = [*self.states.clean.values(), *self.states.patch.values()]
        size = sum(x.numel() * x.element_size() for x in activations)
        return size + sum(found.n_bytes for found in self.ends.values())


@dataclass(frozen=True)
class _Batch:
    """What of a batch is needed again for the edges."""

    index: torch.Tensor  # [B] number of each prompt in the prompt set
    prompts: PromptSet
    gradients: dict[Site, torch.Tensor]  # [B, S, d] on the CPU
    kept: _Kept | None  # as far as the memory budget goes


def discover(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    prompts: PromptSet,
    options: DiscoverOptions | None = None,
    *,
    metric: Metric | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Circuit:
    """The circuit behind `prompts`, over the features and errors of `saes`.

    metric: overrides `options.metric` by a callable; provenance: names of model, SAEs and prompts, stored in the
    metadata.
    """
    options = options or DiscoverOptions()
    m = metric or get_metric(options.metric)
    prompts = prepare(prompts, model, m)
    sites = select_sites(options.sites, list(saes))
    n_positions = prompts.clean.n_positions
    if options.aggregation == "position" and int(prompts.clean.lengths.min()) != n_positions:
        lengths = sorted(set(prompts.clean.lengths.tolist()))
        raise UserError(f"aggregation 'position' needs prompts of equal length, found lengths {lengths}: use sum")
    if options.aggregation == "spans" and prompts.roles is None:
        raise UserError("aggregation 'spans' needs prompts with spans: name them in the file, or give a span template")
    spans = prompts.spans if options.aggregation == "spans" else ()
    rows = max_rows(model, n_positions, memory=options.memory)
    batches, effects, totals, m_ends = _node_pass(model, saes, prompts, m, options, sites, rows, progress=progress)
    nodes = {
        site: aggregate_site(
            site_effects, n_examples=len(prompts), n_positions=n_positions, aggregation=options.aggregation, spans=spans
        )
        for site, site_effects in effects.items()
    }
    if not count(nodes):
        raise UserError("no node has an effect on the metric: do the prompts differ where the sites can see it?")
    chosen = select_nodes(nodes, top=options.edge_nodes)
    edges = _edge_pass(model, saes, batches, m, chosen, options, rows, progress=progress) if options.edge_nodes else {}
    edges = {pair: weights / len(prompts) for pair, weights in edges.items()}
    metadata = {
        **(provenance or {}),
        "options": asdict(options),
        "sites": [site.name for site in sites],
        "n_examples": len(prompts),
        "n_positions": n_positions,
        "n_nodes": count(nodes),
        "rejected": prompts.rejected,
        "accuracy": accuracy(last_logits(model, prompts), prompts),
        **m_ends,
        "completeness": _completeness(effects, totals, len(prompts), m_ends["total_effect"]),
        "tokens": _position_tokens(model, prompts) if options.aggregation == "position" else [],
        "positions": list(spans),
        "templates": sorted(set(prompts.templates)),
    }
    return Circuit(effects, chosen if options.edge_nodes else {}, edges, metadata)


def max_rows(model: LanguageModel, n_positions: int, *, memory: float) -> int:
    """Prompts of `n_positions` tokens whose forward and backward pass stays within `memory` GiB (at least 1).

    Kept for the backward pass, per token and layer: about 16 d of residual stream, norms, queries, keys and values,
    3 d_ff of the MLP, and the attention probabilities, H S; all in the model's dtype.
    """
    config = model.hf.config
    width = model.d_model
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
    heads = getattr(config, "num_attention_heads", 1)
    per_token = model.n_layers * (16 * width + 3 * inner + heads * n_positions)
    size = torch.empty((), dtype=model.dtype).element_size()
    return max(1, int(memory * 2**30 / (per_token * n_positions * size)))


def _node_pass(model, saes, prompts, metric, options, sites, rows, *, progress):
    """Batches with their gradients, effects per site, measured site totals [B] per site, and the metric's ends."""
    order = prompts.clean.lengths.argsort(stable=True).cpu()
    size = max(1, min(rows, 64))
    batches: list[_Batch] = []
    parts: dict[Site, list[SiteEffects]] = {site: [] for site in sites}
    totals: dict[Site, list[torch.Tensor]] = {site: [] for site in sites}
    path_nodes: dict[str, float] = {}
    clean, patch = [], []
    budget = options.memory * 2**30
    n_batches = -(-len(order) // size)
    with tqdm(total=n_batches * len(sites), desc=f"nodes ({options.method})", unit="site", disable=not progress) as bar:
        for index in order.split(size):
            batch = prompts[index]
            states = capture_states(
                model, saes, batch, metric, sites=sites, gradient=options.method in GRADIENT_AT_CLEAN
            )
            result = attribute(
                model, saes, states, metric, sites=sites, method=options.method, rule=options.rule, steps=options.steps,
                residual=options.residual, aggregation=options.aggregation, max_rows=rows,
                ends=options.edge_active if options.edge_nodes else None, progress=lambda site: bar.update(),
            )  # fmt: skip
            for site in sites:
                parts[site].append(result.effects[site].relabel_examples(index))
                totals[site].append(result.site_totals[site].cpu())
            for site, n in result.path_nodes.items():
                path_nodes[site.name] = path_nodes.get(site.name, 0.0) + n * len(index) / len(order)
            kept = _Kept.of(states, result.ends) if result.ends else None
            budget -= kept.n_bytes if kept else 0
            gradients = {site: g.detach().cpu() for site, g in result.gradients.items()}
            batches.append(_Batch(index, batch, gradients, kept if budget >= 0 else None))
            clean.append(states.m_clean.cpu())
            patch.append(states.m_clean.new_zeros(0).cpu() if states.m_patch is None else states.m_patch.cpu())
    m_clean, m_patch = torch.cat(clean).mean().item(), torch.cat(patch)
    ends: dict[str, Any] = {
        "m_clean": m_clean,
        "m_patch": m_patch.mean().item() if len(m_patch) else None,
        "total_effect": m_patch.mean().item() - m_clean if len(m_patch) else None,
    }
    if path_nodes:
        ends["path_nodes"] = path_nodes
    effects = {site: SiteEffects.concatenate(site_parts) for site, site_parts in parts.items()}
    return batches, effects, {site: torch.cat(values) for site, values in totals.items()}, ends


def _edge_pass(model, saes, batches: Sequence[_Batch], metric, nodes: Nodes, options, rows: int, *, progress) -> Edges:
    """Edge weights summed over all examples."""
    total: Edges = {}
    sites = list(nodes)
    for batch in tqdm(batches, desc="edges", unit="batch", disable=not progress):
        kept = batch.kept or _Kept(capture_states(model, saes, batch.prompts, metric, sites=sites), {})
        for pair, weights in edge_effects(
            model, saes, kept.states, metric, batch.gradients, nodes, active=options.edge_active, ends=kept.ends,
            max_rows=lanes_rows(rows, kept.states),
        ).items():  # fmt: skip
            total[pair] = total[pair] + weights if pair in total else weights
    return total


def lanes_rows(rows: int, states: States) -> int:
    """Prompts in the cut forward pass at once: the budget's, but on a CPU no more than fill its cores (about 256
    tokens), since lanes that no node uses cost as much as those in use.
    """
    if states.m_clean.device.type != "cpu":
        return rows
    return min(rows, max(1, 256 // states.mask.shape[1]))


def _completeness(
    effects: Mapping[Site, SiteEffects],
    totals: Mapping[Site, torch.Tensor],
    n_examples: int,
    total_effect: float | None,
) -> dict[str, Any]:
    """Sum of a site's effects against m(the site alone patched) - m(clean), both averaged over examples.

    residual = |sum of effects - measured| / scale, where scale is |m(patch) - m(clean)|, or without patch prompts the
    largest measured effect of a site. For integrated gradients it is the quadrature error.
    """
    summed = {site: effects[site].value.double().sum().item() / n_examples for site in effects}
    measured = {site: totals[site].double().mean().item() for site in effects}
    scale = abs(total_effect) if total_effect else max(abs(value) for value in measured.values())
    residual = {site: abs(summed[site] - measured[site]) / (scale or 1.0) for site in effects}
    worst = max(residual, key=residual.__getitem__)
    return {
        "mean_residual": sum(residual.values()) / len(residual),
        "worst_residual": residual[worst],
        "worst_site": worst.name,
        "sites": {
            site.name: {"sum_of_effects": summed[site], "measured": measured[site], "residual": residual[site]}
            for site in effects
        },
    }


def _position_tokens(model: LanguageModel, prompts: PromptSet) -> list[str]:
    """The header of a graph by position: the token where all prompts share it, else the first prompt's with an
    ellipsis.
    """
    ids = prompts.clean.input_ids
    shared = (ids == ids[:1]).all(0).tolist()
    return [
        token if same else f"{token}…" for token, same in zip(model.token_strings(ids[0].tolist()), shared, strict=True)
    ]

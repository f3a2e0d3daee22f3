"""Head loadings: an edge into or out of an attention site, split over the heads of the site.

In the cut graph (`circuits.attribution.edges`) attention writes y = y(z_1, ..., z_H), z_h = what head h gives to the
output projection, which is linear but for a norm after it.

Into the site. The edge u -> d is the product of d's cotangent g with dy/du. Every path leads through one head:

    edge = sum_h  [g . dy/dz_h] [dz_h/du] [a_u,patch - a_u,clean],

the chain rule, so the rest is rounding.

Out of the site. The source's change is split: with the norm's scale held at its value in each run, the site's
activation is a sum of one vector a head and a constant, x = sum_h x_h + c, and a feature that is active is affine in x:

    f_i,patch - f_i,clean = sum_h  W_enc[i] . (x_h,patch - x_h,clean) + rest,

where the rest is what its threshold, or its bias, adds where it is active in one run alone. Of the error node it is
x_h - sum_active (W_enc[i] . x_h) W_dec[i].

Legend: B examples, S positions, R lanes, H heads, d_v width of what a head writes, d model width, n nodes of a site.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor

from circuits._tensors import METRIC
from circuits.attribution.edges import CutGraph, NodeVectors, cut_forward, metric_gradients, node_vectors, pull_back
from circuits.attribution.node_effects import Attribution
from circuits.attribution.nodes import Nodes
from circuits.discovery.attention.results import EdgeLoading, HeadLoadings
from circuits.discovery.batching import DiscoveryRun, lanes_rows
from circuits.discovery.edge_pass import ready_for_edges
from circuits.discovery.node_pass import node_pass
from circuits.metrics.metrics import Metric
from circuits.options import DiscoverOptions
from circuits.prompts.dataset import PromptSet
from sae.autoencoder import SparseAutoencoder
from sae.errors import UserError
from sae.model.attention import AttentionHeads, attention_heads, heads_of
from sae.model.forward import with_gradients
from sae.model.language_model import LanguageModel
from sae.model.lrp import frozen_norms
from sae.model.sites import Site
from sae.model.tokens import Tokens
from sae.sparse.activations import group_offsets, rows_added, rows_multiplied

if TYPE_CHECKING:
    from circuits.circuit import Circuit

ATTENTION = "attn"
Pair = tuple[Site, Site | None, Site]
"""Upstream site, downstream site or None for the metric, and the one of the two whose heads are meant."""
Split = dict[Pair, Tensor]
"""Weights [H + 1, D, U] added up over examples: of each head, and of the whole edge."""


def head_loadings(
    circuit: Circuit,
    prompts: PromptSet | None = None,
    *,
    edges: int = 10,
    metric: str | Metric | None = None,
    progress: bool = True,
) -> HeadLoadings:
    """Split the strongest edges into and out of attention sites over the heads, by the formulas of this file.

    Args:
        circuit: The circuit, whose model, SAEs, metric and node method are used.
        prompts: The prompts; those the circuit was found on by default, of which the weights are the circuit's.
        edges: How many edges into attention sites, and as many out of them.
        metric: The circuit's own, given again where it is Python code and the circuit is from a file.
        progress: Whether to show a progress bar.

    Returns:
        A number a head for each edge, and a rest, which add up to the edge.

    Raises:
        UserError: The circuit has no edges, or the model's heads cannot be seen.
    """
    if not circuit.edges:
        raise UserError("this circuit has no edges: discover it with edge nodes above 0")
    options = DiscoverOptions(**circuit.metadata["options"])
    nodes, chosen = _chosen(circuit, edges)
    prompts = circuit.prompts if prompts is None else prompts
    if not chosen:
        return HeadLoadings([], len(prompts))
    run = DiscoveryRun.of(
        circuit.model, circuit.saes.subset(circuit.effects), prompts, options,
        metric=circuit.get_metric(metric), progress=progress,
    )  # fmt: skip
    total: Split = {}
    for index, stored in zip(run.batches(), node_pass(run), strict=True):
        batch = ready_for_edges(run, stored, index, nodes)
        rows = lanes_rows(run.rows, batch.states.mask.shape[1], run.setting.model.device)
        for pair, weights in batch_loadings(batch, nodes, options=options, max_rows=rows).items():
            total[pair] = total[pair] + weights if pair in total else weights
    names = {site: site_nodes.ids(site) for site, site_nodes in nodes.items()}
    loadings = []
    for (up, down, site), weights in total.items():
        targets = [METRIC] if down is None else names[down]
        for row, target in enumerate(targets):
            for column, source in enumerate(names[up]):
                if (source, target) in chosen:
                    *heads, weight = (weights[:, row, column].double() / len(prompts)).tolist()
                    loadings.append(EdgeLoading(source, target, site.name, weight, heads, weight - sum(heads)))
    return HeadLoadings(sorted(loadings, key=lambda edge: -abs(edge.weight)), len(prompts))


def _chosen(circuit: Circuit, n: int) -> tuple[Nodes, set[tuple[str, str]]]:
    """The n strongest edges into attention sites and those out of them, and of every site the nodes they join."""
    edges = circuit.edges_frame()
    sides = (edges["target"], edges["source"])
    rows = pd.concat([edges[side.str.startswith(f"{ATTENTION}_")].head(n) for side in sides])
    joined = {*rows["source"], *rows["target"]}
    nodes = {
        site: site_nodes[torch.tensor([name in joined for name in site_nodes.ids(site)], dtype=torch.bool)]
        for site, site_nodes in circuit.edge_nodes.items()
    }
    return nodes, set(zip(rows["source"], rows["target"], strict=True))


@with_gradients
def batch_loadings(batch: Attribution, nodes: Nodes, *, options: DiscoverOptions, max_rows: int) -> Split:
    """The edges among the nodes of one batch that touch attention sites, by head."""
    states, sites = batch.states, list(nodes)
    model = states.setting.model
    vectors = node_vectors([batch], nodes, active=options.edge_active)[0]
    lanes = max(1, min(max_rows // len(states.tokens), max(map(len, nodes.values()))))
    with attention_heads(model.hf) as by_layer:
        graph = cut_forward(states, sites=sites, copies=lanes)
    heads = {site: heads_of(by_layer, int(site.layer or 0), model.name) for site in sites if site.kind == ATTENTION}
    by_head = {site: _by_head(batch, nodes, site, vectors[site]) for site in heads if site in vectors}
    result: Split = {}
    for index, down in enumerate(sites):
        upstream = [site for site in sites[:index] if site in vectors]
        read = states.setting.saes.config(down).read_site(down)
        if down not in vectors or not upstream or not graph.outputs[read].requires_grad:
            continue
        chunks: dict[Pair, list[Tensor]] = {}
        for start in range(0, len(nodes[down]), lanes):
            at_read, at_site = vectors[down].cotangents(slice(start, start + lanes))
            entered = {read: at_read} if at_site is None else {read: at_read, down: at_site}
            for up, gradient in pull_back(graph, entered, lanes, upstream).items():
                if up in heads:
                    chunks.setdefault((up, down, up), []).append(_contracted(vectors[up], by_head[up], gradient))
            if down in heads:
                for up, weights in _into(graph, heads[down], down, at_read, lanes, vectors, upstream).items():
                    chunks.setdefault((up, down, down), []).append(weights)
        result |= {pair: torch.cat(of_pair, dim=1) for pair, of_pair in chunks.items()}
    for site, gradient in metric_gradients(graph, lanes, list(vectors), batch.gradients).items():
        if site in heads:
            result[site, None, site] = _contracted(vectors[site], by_head[site], gradient)
    return result


def _into(
    graph: CutGraph, heads: AttentionHeads, down: Site, cotangent: Tensor, lanes: int,
    vectors: Mapping[Site, NodeVectors], upstream: list[Site],
) -> dict[Site, Tensor]:  # fmt: skip
    """Edges into R features of an attention site, [H + 1, R, U] from each direct parent; cotangent: [R, B, S, d]."""
    used, output = len(cotangent), graph.outputs[down]
    of_lanes = cotangent.new_zeros(lanes, *cotangent.shape[1:])
    of_lanes[:used] = cotangent
    z = heads.output  # [lanes * B, S, H, d_v]
    (pulled,) = torch.autograd.grad([output], [z], [of_lanes.flatten(0, 1).to(output.dtype)], retain_graph=True)
    through = replace(graph, outputs={down: z})
    weights: dict[Site, list[Tensor]] = {}
    for head in [*range(z.shape[2]), None]:
        entered = pulled if head is None else torch.zeros_like(pulled)
        if head is not None:
            entered[:, :, head] = pulled[:, :, head]
        by_lane = entered.unflatten(0, (lanes, -1))[:used]
        for up, gradient in pull_back(through, {down: by_lane}, lanes, upstream).items():
            weights.setdefault(up, []).append(vectors[up].contract(gradient).cpu())
    return {up: torch.stack(of_heads) for up, of_heads in weights.items()}


def _contracted(of_site: NodeVectors, by_head: list[NodeVectors], gradient: Tensor) -> Tensor:
    """[H + 1, R, n] of the heads' changes and of the whole one, for the gradient at the site's leaf [R, B, S, d]."""
    return torch.stack([vectors.contract(gradient).cpu() for vectors in (*by_head, of_site)])


# ---- the changes of a site's nodes, by head


@dataclass(frozen=True)
class SiteHeads:
    """An attention site's activation as a sum over heads, and a constant."""

    x: Tensor
    """[B, S, d] the activation."""
    n_heads: int
    """H."""
    of_head: Callable[[int], Tensor]
    """Number of a head -> x_h [B, S, d]."""


@with_gradients
def site_by_head(model: LanguageModel, tokens: Tokens, site: Site) -> SiteHeads:
    """Run the model, and split what attention adds to the residual stream over its heads, with norms frozen.

    x_h = J z_h, J = dx/dz, by the derivative of J^T v with respect to v.
    """
    outputs: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:  # a hook behind those of frozen norms, since the site may be at one of them
        outputs.append(x)
        return x

    with attention_heads(model.hf) as by_layer, frozen_norms(model.hf), model.hooked(site, keep, rows=len(tokens)):
        model.run(tokens, capture=[site], grad=True, need_logits=False)
    (x,) = outputs
    z = heads_of(by_layer, int(site.layer or 0), model.name).output  # [B, S, H, d_v]
    v = torch.zeros_like(x, requires_grad=True)
    (pulled,) = torch.autograd.grad([x], [z], [v], create_graph=True)

    def of_head(head: int) -> Tensor:
        alone = torch.zeros_like(z)
        alone[:, :, head] = z.detach()[:, :, head]
        return torch.autograd.grad([pulled], [v], [alone], retain_graph=True)[0]

    return SiteHeads(x.detach(), z.shape[2], of_head)


def _by_head(batch: Attribution, nodes: Nodes, site: Site, vectors: NodeVectors) -> list[NodeVectors]:
    """The vectors of a site's nodes with the change that each head makes in place of the whole one."""
    states = batch.states
    model, sae, real = states.setting.model, states.setting.saes[site], states.mask[..., None]
    clean = site_by_head(model, states.tokens, site)
    patch = None if states.prompts.patch is None else site_by_head(model, states.prompts.patch, site)
    feature = nodes[site].feature.to(sae.device).clamp(max=len(sae.W_dec) - 1)
    rows = sae.encoder_rows(feature)
    runs = [clean.x] if patch is None else [clean.x, patch.x]
    active = _active(sae, runs) if vectors.others else None
    result = []
    for head in range(clean.n_heads):
        delta = -clean.of_head(head) if patch is None else patch.of_head(head) - clean.of_head(head)
        delta = delta.to(sae.W_dec) * real
        others = [replace(other, delta=_of_error(sae, delta, active)) for other in vectors.others]
        of_features = torch.where(vectors.delta != 0, delta @ rows.T, 0.0)
        result.append(replace(vectors, delta=of_features, others=others))
    return result


def _active(sae: SparseAutoencoder, runs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Token of B * S, and feature, of all features that are active in one of the runs [B, S, d]; two [m]."""
    sparse = [sae.encode_sparse(x.to(sae.W_dec).flatten(0, 1)) for x in runs]
    pair = torch.cat([of_run.token * len(sae.W_dec) + of_run.feature for of_run in sparse]).unique()
    return pair // len(sae.W_dec), pair % len(sae.W_dec)


def _of_error(sae: SparseAutoencoder, delta: Tensor, active: tuple[Tensor, Tensor] | None) -> Tensor:
    """delta [B, S, d] without what the active features make of it."""
    assert active is not None
    token, feature = active
    flat = delta.flatten(0, 1)
    value = rows_multiplied(flat, token, sae.encoder_rows(torch.arange(len(sae.W_dec), device=sae.device)), feature)
    return (flat - rows_added(sae.W_dec, feature, group_offsets(token, len(flat)), value)).view_as(delta)

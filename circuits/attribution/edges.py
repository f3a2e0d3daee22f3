"""Edge effects of a feature circuit by the cut graph.

Legend: B examples, S positions, d model width, R lanes (downstream nodes handled by one backward pass), U upstream
and D downstream nodes.

The effect of the edge u -> d (Marks et al. 2024, eq. 5, direct paths only) is

    [dm/da_d, as the node method averages it] * [da_d/da_u, direct paths only] * [a_u,patch - a_u,clean].

1. One forward pass of the clean prompts in which every site's output is cut: what the model computes there is kept,
   and a detached leaf goes on in its place. Every path between two leaves that remains is direct, whatever the
   architecture (parallel or sequential blocks, post-norms, missing sites): autograd finds the parents.
2. A downstream feature's cotangent at its site is its gradient (W_dec[d] . g) times its encoder row where it is
   active: in the clean run (`clean`, the derivative there, as in the paper's code), or in the clean or the patch run
   (`either`). A feature that only the patch wakes has no derivative on the clean prompts; `clean` gives it no edges
   and its share to the error. That of the error node e = y - y_hat(y) is g - sum_active (W_dec[i] . g) W_enc[i]. One
   vector-Jacobian product gives the edges from all parents at once, for all examples, since examples do not interact,
   and for all positions where positions are summed.
3. R downstream nodes share a backward pass: the forward pass runs R copies of the batch, one lane each.
4. The gradient at a parent's leaf, [R, B, S, d], is contracted with the upstream decoder rows and deltas before it
   is stored: [D, U].
5. A transcoder's feature reads before its MLP: its cotangent goes in there, and not through the MLP's gradient. Its
   error y - y_hat(x_read) takes g at the site and the other terms where it reads; a skip connection, a node between the
   two, takes W_skip^T g there.
6. The metric is a downstream node as well: its edges are the direct effects of the sites that reach the logits. For
   the last site every path is direct, so there the edges are the node effects themselves, with the node method's own
   gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from circuits.attribution.activations import ActivationPair
from circuits.attribution.effects import skip_delta
from circuits.attribution.feature_effects import EdgeInputs, edge_inputs
from circuits.attribution.node_effects import Attribution
from circuits.attribution.nodes import Nodes, SiteNodes
from circuits.options import EdgeActive
from sae.autoencoder import SparseAutoencoder
from sae.formats.token_normalised import edge_refusal
from sae.model.forward import with_gradients
from sae.model.sites import Site
from sae.saes import SAEs

Edges = dict[tuple[Site, Site | None], Tensor]
"""(upstream, downstream) -> weights [D, U] over the two sites' selected nodes; downstream None is the metric, [1,
U].
"""


@dataclass(frozen=True)
class CutGraph:
    """One forward pass in which every site's output is replaced by a leaf."""

    outputs: dict[Site, Tensor]
    """The output of each site as a function of the leaves before it, [R * B, S, d], with its graph; and what each
    transcoder reads, [R * B, S, r].
    """
    leaves: dict[Site, Tensor]
    """The leaf that went on in its place, [R * B, S, d]."""
    m: Tensor
    """The metric, [R * B], a function of the leaves that reach the logits directly."""


def cut_forward(states: ActivationPair, *, sites: Sequence[Site], copies: int = 1) -> CutGraph:
    """Run `copies` of the clean prompts with every site of `sites` cut."""
    outputs: dict[Site, Tensor] = {}
    leaves: dict[Site, Tensor] = {}

    def cut(site: Site) -> Callable[[Tensor], Tensor]:
        def replace(x: Tensor) -> Tensor:
            outputs[site] = x
            leaves[site] = x.detach().clone().requires_grad_()
            return leaves[site]

        return replace

    edits = {site: cut(site) for site in sites}
    reads = {read for site, read in states.setting.saes.read_sites(sites).items() if read != site}
    tokens = states.tokens.repeat(copies)
    run = states.setting.model.run(tokens, edits=edits, capture=reads, grad=True, last_only=True)
    outputs |= run.activations
    return CutGraph(outputs, leaves, states.metric_of_copies(run.logits).flatten())


@dataclass(frozen=True)
class OtherNode:
    """A node of a site that is no feature: the error, or what a skip connection writes."""

    where: Tensor
    """[B or 1, S, n] 1 where it is, in its column among the n selected nodes of the site; else 0."""
    delta: Tensor
    """[B, S, d] its value in the patch run less that in the clean run."""
    cotangent: Tensor
    """[B, S, r] at the place that is read; of an error g - sum_active (W_dec[i] . g) W_enc[i] (a transcoder's without g
    and with -W_skip^T g), of a skip connection W_skip^T g.
    """
    at_site: Tensor | None = None
    """[B, S, d] g, the cotangent of a transcoder's error at its site."""


@dataclass(frozen=True)
class NodeVectors:
    """The n selected nodes of a site, as upstream and as downstream nodes of edges."""

    decoder: Tensor
    """[n, d] decoder rows; zero for nodes that are no features."""
    delta: Tensor
    """[B, S, n] f_patch - f_clean where the node is; zero for nodes that are no features."""
    gain: Tensor
    """[B, S, n] (W_dec . g) where the feature counts as active, else 0; zero for nodes that are no features."""
    encoder: Tensor
    """[n, r] encoder rows; zero for nodes that are no features."""
    others: Sequence[OtherNode]
    """The error and the skip connection, as far as they are selected."""

    def cotangents(self, nodes: slice) -> tuple[Tensor, Tensor | None]:
        """For a slice of R nodes, [R, B, S, r] at the place that is read, and [R, B, S, d] at the site itself where
        that is another place and a node has one there.
        """
        cotangent = torch.einsum("bsr,rd->rbsd", self.gain[..., nodes], self.encoder[nodes])
        at_site: Tensor | None = None
        for other in self.others:
            where = other.where[..., nodes].movedim(-1, 0)[..., None]  # [R, B or 1, S, 1]
            cotangent += where * other.cotangent
            if other.at_site is not None and bool(where.any()):
                at_site = where * other.at_site
        return cotangent, at_site

    def contract(self, gradient: Tensor, *, per_example: bool = False) -> Tensor:
        """Edge weights from the gradient at this site's leaf, [R, B, S, d]: summed over examples, [R, n], or of each,
        [B, R, n].
        """
        out = "brn" if per_example else "rn"
        gradient = gradient.to(self.decoder)
        weight = torch.einsum(f"rbsn,bsn->{out}", gradient @ self.decoder.T, self.delta)
        for other in self.others:
            along = torch.einsum("rbsd,bsd->rbs", gradient, other.delta)
            weight += torch.einsum(f"rbs,bsn->{out}", along, other.where.expand(len(other.delta), -1, -1))
        return weight


def node_vectors(
    batches: Sequence[Attribution], nodes: Nodes, *, active: EdgeActive = "either"
) -> list[dict[Site, NodeVectors]]:
    """The vectors of the selected nodes of every site, for each batch.

    An autoencoder is asked for at its site's turn, for all batches one after the other; see `edge_effects`.
    """
    vectors: list[dict[Site, NodeVectors]] = [{} for _ in batches]
    for site, site_nodes in nodes.items():
        for of_batch, batch in zip(vectors, batches, strict=True):
            if len(site_nodes):
                of_batch[site] = _vectors_of_site(batch, site_nodes, site, active=active)
    return vectors


@torch.no_grad()
def _vectors_of_site(batch: Attribution, nodes: SiteNodes, site: Site, *, active: EdgeActive) -> NodeVectors:
    """The vectors of the selected nodes of one site.

    The whole encoder runs only where there are no edge inputs of the site and the error node is among the nodes, or
    features compete.
    """
    states, gradient = batch.states, batch.gradients[site]
    sae = states.setting.saes[site]
    device = sae.W_dec.device
    is_feature, feature = nodes.is_feature.to(device), nodes.feature.to(device).clamp(max=nodes.n_features - 1)
    is_error = nodes.is_error.to(device)
    inputs = batch.edge_inputs.get(site)
    if inputs is None and (is_error.any() or sae.nonlinearity.needs_k):
        inputs = edge_inputs(states, gradient, site=site, active=active)
    elif inputs is not None:
        inputs = inputs.to(device)
    f_clean, delta = _selected_acts(sae, states, feature, site, inputs)
    awake = (f_clean != 0) | (delta != 0) if active == "either" else f_clean != 0
    decoder = sae.W_dec[feature] * is_feature[:, None]
    is_there = nodes.where(states.prompts).to(device, sae.W_dec.dtype)  # [B or 1, S, n]
    is_real = states.mask.to(device)[:, :, None].to(sae.W_dec.dtype)
    return NodeVectors(
        decoder=decoder,
        delta=delta * is_real * is_there * is_feature,
        gain=(gradient.to(decoder) @ decoder.T) * awake * is_real * is_there,
        encoder=sae.encoder_rows(feature) * is_feature[:, None],
        others=_other_nodes(batch, nodes, site, is_there, inputs),
    )


def _other_nodes(
    batch: Attribution, nodes: SiteNodes, site: Site, is_there: Tensor, inputs: EdgeInputs | None
) -> list[OtherNode]:
    """The error and the skip connection, if they are among the nodes; is_there: [B or 1, S, n]."""
    states, others = batch.states, []
    sae = states.setting.saes[site]
    is_error, is_skip = nodes.is_error.to(is_there.device), nodes.is_skip.to(is_there.device)
    g = batch.gradients[site].to(sae.W_dec)
    if inputs is not None and is_error.any():
        at_site = g * states.live(site, g)[..., None] if sae.config.read else None
        others.append(OtherNode(is_there * is_error, inputs.error_delta, inputs.error_cotangent, at_site))
    if is_skip.any():
        read, real = sae.config.read_site(site), states.mask.to(sae.W_dec)[..., None]
        x_read = states.clean[read].to(sae.W_dec), states.patch[read].to(sae.W_dec)
        delta = skip_delta(sae, *x_read, zero_patch=states.zero_patch)
        assert delta is not None
        others.append(OtherNode(is_there * is_skip, delta * real, sae.skip_gradient(g) * real))
    return others


def _selected_acts(
    sae: SparseAutoencoder, states: ActivationPair, feature: Tensor, site: Site, inputs: EdgeInputs | None
) -> tuple[Tensor, Tensor]:
    """f_clean and f_patch - f_clean of the features [n], two [B, S, n]."""
    if inputs and (acts := inputs.acts(feature, n_features=len(sae.W_dec))):
        return acts
    of_site = states.of_site(site)
    f_clean = sae.encode_some(of_site.read_clean.to(sae.W_dec), feature)
    if states.zero_patch:
        return f_clean, -f_clean
    return f_clean, sae.encode_some(of_site.read_patch.to(sae.W_dec), feature) - f_clean


def check_edges(saes: SAEs) -> None:
    """`UserError` where the features of a site have no edges; nothing is computed for it."""
    for site in saes:
        if saes.config(site).input_norm:
            raise edge_refusal(site.name)


@with_gradients
def edge_effects(
    batch: Attribution,
    nodes: Nodes,
    *,
    active: EdgeActive = "either",
    vectors: Mapping[Site, NodeVectors] | None = None,
    max_rows: int = 64,
    per_example: bool = False,
) -> Edges:
    """Edge weights between all selected nodes of one batch, and from them to the metric.

    Args:
        batch: activations, and dm/dx per site as the node method averages it; inputs of edges that it has (for this
            `active`) are used, others computed.
        nodes: the selected nodes of every site. With positions the prompts must be equally long, or have the spans
            that positions number.
        active: where a downstream feature has a derivative.
        vectors: what `node_vectors` gave for this batch; computed by default.
        max_rows: prompts in the cut forward pass at once, which sets the number of lanes.
        per_example: keep examples apart.

    Returns:
        Weights of the pairs of sites with a direct path, summed over examples, [D, U], or of each example, [B, D, U].
    """
    sites, states = list(nodes), batch.states
    vectors = vectors if vectors is not None else node_vectors([batch], nodes, active=active)[0]
    if not vectors:  # nothing differs between clean and patch
        return {}
    most = max((len(site_nodes) for site_nodes in nodes.values()), default=1)
    lanes = max(1, min(max_rows // len(states.tokens), most))
    graph = cut_forward(states, sites=sites, copies=lanes)
    edges: Edges = {}
    for index, down in enumerate(sites):
        upstream = [site for site in sites[:index] if site in vectors]
        read = states.setting.saes.config(down).read_site(down)
        if down not in vectors or not upstream or not graph.outputs[read].requires_grad:
            continue
        weights: dict[Site, list[Tensor]] = {}
        for start in range(0, len(nodes[down]), lanes):
            at_read, at_site = vectors[down].cotangents(slice(start, start + lanes))
            entered = {read: at_read} if at_site is None else {read: at_read, down: at_site}
            for up, gradient in pull_back(graph, entered, lanes, upstream).items():
                weights.setdefault(up, []).append(vectors[up].contract(gradient, per_example=per_example).cpu())
        edges |= {(up, down): torch.cat(of_pair, dim=-2) for up, of_pair in weights.items()}
    for site, gradient in metric_gradients(graph, lanes, list(vectors), batch.gradients).items():
        edges[site, None] = vectors[site].contract(gradient, per_example=per_example).cpu().contiguous()
    return edges


def metric_gradients(
    graph: CutGraph, lanes: int, sites: Sequence[Site], gradients: Mapping[Site, Tensor]
) -> dict[Site, Tensor]:
    """The metric's gradient [1, B, S, d] along direct paths to every site that reaches the logits directly."""
    first_lane = torch.zeros_like(graph.m).unflatten(0, (lanes, -1))
    first_lane[0] = 1
    direct = _vjp([graph.m], [graph.leaves[site] for site in sites], [first_lane.flatten()])
    last = list(graph.leaves)[-1]
    return {
        site: gradients[site][None] if site == last else gradient.unflatten(0, (lanes, -1))[:1]
        for site, gradient in zip(sites, direct, strict=True)
        if gradient is not None
    }


def pull_back(
    graph: CutGraph, cotangents: Mapping[Site, Tensor], lanes: int, upstream: Sequence[Site]
) -> dict[Site, Tensor]:
    """The gradient [R, B, S, d] at each direct parent's leaf for R <= lanes cotangents [R, B, S, d] at a site's output,
    or at it and at the place that its transcoder reads.
    """
    outputs, full = [graph.outputs[site] for site in cotangents], []
    for cotangent, output in zip(cotangents.values(), outputs, strict=True):
        used = len(cotangent)  # the last lanes may be empty; the graph has them all the same
        lanes_of = cotangent.new_zeros(lanes, *cotangent.shape[1:])
        lanes_of[:used] = cotangent
        full.append(lanes_of.flatten(0, 1).to(output.dtype))
    leaves = [graph.leaves[site] for site in upstream]
    gradients = _vjp(outputs, leaves, full)
    return {
        site: gradient.unflatten(0, (lanes, -1))[:used]
        for site, gradient in zip(upstream, gradients, strict=True)
        if gradient is not None
    }


def _vjp(
    outputs: Sequence[Tensor], leaves: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """sum of cotangent . d output / d leaf for every leaf; None where no path leads to it."""
    return torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True, allow_unused=True)

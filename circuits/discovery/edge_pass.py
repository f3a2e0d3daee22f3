"""The edge pass of a discovery: the cut graph of every batch, after what the edges need of every site.

Finished batches go to the `ResumeFolder`, if there is one, as in the node pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from circuits.attribution import capture_activations
from circuits.attribution.edges import Edges, edge_effects, select_ends
from circuits.attribution.nodes import Nodes, count
from circuits.discovery.batching import DiscoveryRun, lanes_rows
from circuits.discovery.node_pass import EdgeCache, NodePassResult
from sae._progress import ProgressBar
from sae.model.sites import Site

SAMPLE_BYTES = 2**28
"""Most that the edge weights of single examples take; they are kept for intervals."""


def edge_pass(work: DiscoveryRun, batches: Sequence[NodePassResult], nodes: Nodes) -> tuple[Edges, Edges]:
    """Mean edge weights over all examples, [D, U], and those of each example, [N, D, U], where they fit into
    SAMPLE_BYTES (else none).
    """
    indices = work.batches()
    total: Edges = {}
    samples: dict[tuple[Site, Site | None], list[Tensor]] = {}
    with ProgressBar(total=len(indices), desc="edges", unit="batch", disable=not work.progress) as bar:
        for numbers in work.rounds(range(len(indices))):
            for edges in _round_edges(work, numbers, [indices[n] for n in numbers], batches, nodes):
                for pair, weights in edges.items():
                    if weights.ndim == 3:
                        samples.setdefault(pair, []).append(weights)
                        weights = weights.sum(0)
                    total[pair] = total[pair] + weights if pair in total else weights
                bar.update()
    back = torch.cat(indices).argsort()  # from the order of the batches to that of the prompts
    mean = {pair: weights / len(work.prompts) for pair, weights in total.items()}
    return mean, {pair: torch.cat(parts)[back] for pair, parts in samples.items()}


def keeps_examples(n_nodes: int, n_examples: int) -> bool:
    """Whether the weights of every example, at most n^2 / 2 edges each, fit into SAMPLE_BYTES."""
    return 4 * n_examples * n_nodes * (n_nodes + 1) / 2 <= SAMPLE_BYTES


def _round_edges(
    work: DiscoveryRun,
    numbers: Sequence[int],
    indices: Sequence[Tensor],
    batches: Sequence[NodePassResult],
    nodes: Nodes,
) -> Iterator[Edges]:
    """The edges of the batches of one round, in order; those that are finished from their files."""
    known = {n: work.files.get(f"edges-{n:04}") for n in numbers} if work.files is not None else {}
    open_ = [number for number in numbers if known.get(number) is None]
    own = {  # off the disk: what is mapped lies elsewhere in a cache line, and sums end in other bits
        number: batches[number].copied(work.prompts[index]) if work.files is not None else batches[number]
        for number, index in zip(numbers, indices, strict=True)
        if number in open_
    }
    kept = {
        number: own[number].kept or _captured(work, index, nodes)
        for number, index in zip(numbers, indices, strict=True)
        if number in open_
    }
    parts = [(kept[number].states, own[number].gradients, kept[number].ends) for number in open_]
    ends = dict(zip(open_, select_ends(work.saes, parts, nodes, active=work.options.edge_active), strict=True))
    for number in numbers:
        finished = known.get(number)
        if finished is not None:
            yield _edges_of(finished)
            continue
        states = kept[number].states
        edges = edge_effects(
            work.model, work.saes, states, work.metric, own[number].gradients, nodes, selected=ends[number],
            max_rows=lanes_rows(work.rows, states.mask.shape[1], work.model.device),
            per_example=keeps_examples(count(nodes), len(work.prompts)),
        )  # fmt: skip
        if work.files is not None:
            named = {f"{up}/{down or 'metric'}": weights for (up, down), weights in edges.items()}
            work.files.put(f"edges-{number:04}", named)
        yield edges


def _captured(work: DiscoveryRun, index: Tensor, nodes: Nodes) -> EdgeCache:
    """The activations of a batch of which nothing was kept."""
    return EdgeCache(
        capture_activations(work.model, work.saes, work.prompts[index], work.metric, sites=list(nodes)), {}
    )


def _edges_of(named: Mapping[str, Tensor]) -> Edges:
    edges: Edges = {}
    for name, weights in named.items():
        up, down = name.split("/")
        edges[Site.parse(up), None if down == "metric" else Site.parse(down)] = weights.clone()  # see `own` above
    return edges

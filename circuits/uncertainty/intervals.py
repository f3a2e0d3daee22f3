"""Error bars: how much of a circuit is due to the prompts that happened to be drawn.

1. Intervals of the mean effects of all nodes and edges (`circuits.uncertainty.bootstrap`): templates are drawn anew
   where prompts share them, else prompts. A node whose interval leaves out zero is distinguishable from zero; with
   thousands of nodes some are by chance, a share of 1 - level of those without effect at most. Where too few prompts
   or templates, or too few in which a node is active, could say so, there is no interval: too few to tell.
2. Split-half stability: the prompts, by template where they share them, are cut into random halves, the n strongest
   nodes of both are compared. Where half of the prompts name other nodes than the other half, the node set is not to be
   read node by node.

Per-example effects are sparse; they become dense for a chunk of nodes at a time, of CHUNK_BYTES at most.

Shapes: B examples, R resamples, n nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from circuits.attribution.edges import Edges
from circuits.attribution.effects import SiteEffects
from circuits.attribution.nodes import Nodes, SiteNodes, count, distinguishable, select_nodes
from circuits.circuit import Circuit
from circuits.uncertainty.bootstrap import COVERAGE, MIN_ACTIVE, Bootstrap, group_sums, too_few, what_is_drawn
from sae._frames import Result
from sae.model.sites import Site

CHUNK_BYTES = 64 * 2**20
CANDIDATES = 20_000
"""Circuits of parts of the prompts are compared among this many strongest nodes of the whole."""


@dataclass(frozen=True)
class Stability(Result):
    """The agreement of circuits of random halves of the prompts."""

    sizes: list[int]
    """Numbers of strongest nodes compared."""
    overlap: list[float]
    """Mean share of the n strongest nodes of one half that are among the n strongest of the other."""
    chance: list[float]
    """The same for sets drawn at random from all nodes with an effect."""
    correlation: float
    """Mean Pearson correlation of all node effects between the halves."""
    splits: int
    """Random halvings."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    def to_frame(self) -> pd.DataFrame:
        """One row a number of nodes: nodes, overlap, and what chance gives."""
        return pd.DataFrame({"nodes": self.sizes, "overlap": self.overlap, "chance": self.chance})

    def text(self) -> str:
        """The agreement of the halves in a line."""
        agreed = [f"{overlap:.0%} of {n}" for n, overlap in zip(self.sizes, self.overlap, strict=True)]
        return f"two random halves of the prompts agree on {', '.join(agreed[:4])} strongest nodes"


def node_intervals(
    effects: Mapping[Site, SiteEffects],
    nodes: Nodes,
    *,
    n_examples: int,
    groups: Tensor | None = None,
    bootstrap: Bootstrap | None = None,
) -> dict[Site, Tensor]:
    """Intervals of the mean effects of `nodes`, [n, 2] per site in the order of the nodes, NaN where there is none.

    groups: [B], what each prompt is drawn with; each by itself by default.
    """
    bootstrap = bootstrap or Bootstrap()
    groups = torch.arange(n_examples) if groups is None else groups
    sizes = group_sums(torch.ones(n_examples), groups)
    rows = max(bootstrap.resamples, n_examples)
    intervals = {}
    for site, site_nodes in nodes.items():
        chunks = [
            bootstrap.intervals(group_sums(values, groups), sizes, min_active=MIN_ACTIVE)
            for values in example_values(effects[site], site_nodes, n_examples, rows=rows)
        ]
        intervals[site] = torch.cat(chunks) if chunks else torch.zeros(0, 2)
    return intervals


def edge_intervals(samples: Edges, *, groups: Tensor | None = None, bootstrap: Bootstrap | None = None) -> Edges:
    """Intervals of mean edge weights, [D, U, 2], from those of every example, [N, D, U]; NaN where there is none."""
    bootstrap = bootstrap or Bootstrap()
    intervals: Edges = {}
    for pair, values in samples.items():
        flat = values.flatten(1)
        live = (flat != 0).any(0).nonzero()[:, 0]
        bounds = torch.zeros(flat.shape[1], 2)
        drawn = torch.arange(len(flat)) if groups is None else groups
        sizes = group_sums(torch.ones(len(flat)), drawn)
        for columns in live.split(max(1, CHUNK_BYTES // (4 * bootstrap.resamples))) if len(live) else ():
            sums = group_sums(flat[:, columns].float(), drawn)
            bounds[columns] = bootstrap.intervals(sums, sizes, min_active=MIN_ACTIVE)
        intervals[pair] = bounds.unflatten(0, values.shape[1:])
    return intervals


def example_values(effects: SiteEffects, nodes: SiteNodes, n_examples: int, *, rows: int) -> Iterator[Tensor]:
    """Effects of the nodes per example, [B, n] for a chunk of nodes at a time; a [rows, n] tensor fits the budget."""
    by_position = bool((nodes.position >= 0).any())
    stride = nodes.n_features + 2

    def keys(position: Tensor, feature: Tensor) -> Tensor:
        return position.long() * stride + feature.long() if by_position else feature.long()

    entry_keys = keys(effects.position, effects.feature)
    step = max(1, CHUNK_BYTES // (4 * rows))
    for start in range(0, len(nodes), step):
        chunk = nodes[start : start + step]
        node_keys, order = keys(chunk.position, chunk.feature).sort()
        slot = torch.searchsorted(node_keys, entry_keys).clamp(max=len(node_keys) - 1)
        is_chosen = node_keys[slot] == entry_keys
        values = torch.zeros(n_examples, len(chunk))
        index = (effects.example[is_chosen].long(), order[slot[is_chosen]])
        yield values.index_put_(index, effects.value[is_chosen], accumulate=True)


def strongest_values(effects: Mapping[Site, SiteEffects], nodes: Nodes, n_examples: int) -> tuple[Nodes, Tensor]:
    """The strongest of the nodes, `CANDIDATES` at most, and their effects per example, [B, n] site by site."""
    candidates = select_nodes(nodes, top=CANDIDATES)
    chunks = [
        chunk
        for site, site_nodes in candidates.items()
        for chunk in example_values(effects[site], site_nodes, n_examples, rows=n_examples)
    ]
    return candidates, torch.cat(chunks, dim=1)


def split_half(
    effects: Mapping[Site, SiteEffects],
    nodes: Nodes,
    *,
    n_examples: int,
    groups: Tensor | None = None,
    sizes: Sequence[int] = (10, 20, 50, 100, 200),
    splits: int = 50,
    seed: int = 0,
) -> Stability | None:
    """How well random halves of the prompts agree on the strongest nodes; None for fewer than four prompts or groups.

    groups: [B], what each prompt is drawn with, so that it is not in both halves; each by itself by default.
    """
    n_nodes = count(nodes)
    sizes = sorted({size for size in sizes if size < n_nodes}) or [n_nodes]
    groups = torch.arange(n_examples) if groups is None else groups
    n_prompts = group_sums(torch.ones(n_examples), groups)  # [G]
    if len(n_prompts) < 4 or not n_nodes:
        return None
    sums = group_sums(strongest_values(effects, nodes, n_examples)[1], groups)  # [G, n]
    generator = torch.Generator().manual_seed(seed)
    half = len(n_prompts) // 2
    overlaps, correlations = torch.zeros(len(sizes)), 0.0
    for _ in range(splits):
        order = torch.randperm(len(n_prompts), generator=generator)
        first, second = (sums[part].sum(0) / n_prompts[part].sum() for part in order[: 2 * half].split(half))
        correlations += torch.corrcoef(torch.stack([first, second]).double())[0, 1].item()
        for column, size in enumerate(sizes):
            one, other = (x.abs().topk(size).indices for x in (first, second))
            overlaps[column] += torch.isin(one, other).float().mean()
    return Stability(
        list(sizes), (overlaps / splits).tolist(), [size / n_nodes for size in sizes], correlations / splits, splits
    )


def with_uncertainty(circuit: Circuit, bootstrap: Bootstrap | None = None) -> Circuit:
    """The circuit with an interval for every node, and for every edge where discovery kept the weights of single
    examples; in its metadata what is distinguishable and how stable it is. Without intervals where prompts, or their
    templates, are too few.
    """
    bootstrap = bootstrap or Bootstrap()
    n_examples = circuit.metadata["n_examples"]
    groups = torch.arange(n_examples) if circuit.groups is None else circuit.groups
    if reason := too_few(groups):
        return replace(circuit, metadata={**circuit.metadata, "uncertainty": {"too_few": reason}})
    intervals = node_intervals(
        circuit.effects, circuit.nodes, n_examples=n_examples, groups=groups, bootstrap=bootstrap
    )
    of_edges = edge_intervals(circuit.edge_samples, groups=groups, bootstrap=bootstrap)
    stability = split_half(circuit.effects, circuit.nodes, n_examples=n_examples, groups=groups, seed=bootstrap.seed)
    uncertainty = {
        **asdict(bootstrap),
        "drawn": what_is_drawn(groups),
        "n_too_few": sum(int(bounds.isnan().any(-1).sum()) for bounds in intervals.values()),
        "n_distinguishable": count(distinguishable(circuit.nodes, intervals)),
        "n_edges": sum(int(weights.count_nonzero()) for weights in circuit.edges.values()),
        "n_distinguishable_edges": sum(int((bounds.prod(-1) > 0).sum()) for bounds in of_edges.values())
        if of_edges
        else None,
        "split_half": None if stability is None else stability.to_dict(),
    }
    metadata = {**circuit.metadata, "uncertainty": uncertainty}
    return replace(circuit, intervals=intervals, edge_intervals=of_edges, metadata=metadata)


def uncertainty_line(circuit: Circuit) -> str:
    """Two lines for the terminal about a circuit with uncertainty."""
    uncertainty = circuit.metadata["uncertainty"]
    if "too_few" in uncertainty:
        return f"no intervals: {uncertainty['too_few']}"
    edges = ""
    if uncertainty.get("n_distinguishable_edges") is not None:
        edges = f" and {uncertainty['n_distinguishable_edges']} of {uncertainty['n_edges']} edges"
    text = (
        f"{uncertainty['n_distinguishable']} of {count(circuit.nodes)} nodes{edges} are distinguishable from zero, "
        f"{uncertainty['n_too_few']} nodes have an effect on too few prompts to tell\n"
        f"({uncertainty['level']:.0%} bootstrap intervals over {uncertainty['drawn']}; {COVERAGE})"
    )
    if not uncertainty["split_half"]:
        return text
    return f"{text};\n{Stability(**uncertainty['split_half']).text()}"

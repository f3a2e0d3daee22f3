"""Error bars: how much of a circuit is due to the prompts that happened to be drawn.

1. Bootstrap: prompts are drawn with replacement R times; a resample is a row of weights (how often each prompt was
   drawn, over B), so the resampled means of all nodes are one matrix product. Intervals are the percentiles of these
   means (Efron 1979); likewise of edge weights. A node whose interval leaves out zero is distinguishable from zero;
   with thousands of nodes some are by chance, a share of 1 - level of those without effect at most.
2. Ratios (faithfulness, completeness, areas) are computed anew from each resample's means: the prompts in numerator
   and denominator are the same ones.
3. Split-half stability: the prompts are cut into random halves, the n strongest nodes of both are compared. Where half
   of the prompts name other nodes than the other half, the node set is not to be read node by node.

Per-example effects are sparse; they become dense for a chunk of nodes at a time, of CHUNK_BYTES at most.

Shapes: B examples, R resamples, n nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from circuits.attribution.effects import SiteEffects
from circuits.circuit import Circuit
from circuits.edges import Edges
from circuits.nodes import Nodes, SiteNodes, count, distinguishable, select_nodes
from sae.errors import UserError
from sae.sites import Site

CHUNK_BYTES = 64 * 2**20
CANDIDATES = 20_000
"""Split halves are compared among this many strongest nodes of the whole."""


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made."""

    resamples: int = 1000
    """Times the prompts are drawn anew."""
    level: float = 0.95
    """Share of the resamples inside an interval."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise UserError(f"resamples is {self.resamples}: intervals need at least 1")
        if not 0 < self.level < 1:
            raise UserError(f"level is {self.level}: it must be between 0 and 1")

    def weights(self, n_examples: int) -> Tensor:
        """[R, B] share of each prompt in each resample; rows add up to 1."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randint(n_examples, (self.resamples, n_examples), generator=generator)
        counts = torch.zeros(self.resamples, n_examples)
        counts.scatter_add_(1, drawn, torch.ones_like(counts))
        return counts / n_examples

    def interval(self, statistics: Tensor) -> Tensor:
        """[R, n] -> [n, 2], the percentiles of each column."""
        tail = (1 - self.level) / 2
        return torch.quantile(statistics, torch.tensor([tail, 1 - tail], dtype=statistics.dtype), dim=0).T


@dataclass(frozen=True)
class Stability:
    """What random halves of the prompts agree on."""

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


def node_intervals(
    effects: Mapping[Site, SiteEffects], nodes: Nodes, *, n_examples: int, bootstrap: Bootstrap | None = None
) -> dict[Site, Tensor]:
    """Bootstrap intervals of the mean effects of `nodes`, [n, 2] per site in the order of the nodes."""
    bootstrap = bootstrap or Bootstrap()
    weights = bootstrap.weights(n_examples)
    found = {}
    for site, site_nodes in nodes.items():
        parts = [
            bootstrap.interval(weights @ values)
            for values in example_values(effects[site], site_nodes, n_examples, rows=max(weights.shape))
        ]
        found[site] = torch.cat(parts) if parts else torch.zeros(0, 2)
    return found


def edge_intervals(samples: Edges, *, bootstrap: Bootstrap | None = None) -> Edges:
    """Bootstrap intervals of mean edge weights, [D, U, 2], from those of every example, [N, D, U]."""
    bootstrap = bootstrap or Bootstrap()
    found: Edges = {}
    for pair, values in samples.items():
        flat = values.flatten(1)
        live = (flat != 0).any(0).nonzero()[:, 0]
        bounds = torch.zeros(flat.shape[1], 2)
        weights = bootstrap.weights(len(values))
        for part in live.split(max(1, CHUNK_BYTES // (4 * len(weights)))) if len(live) else ():
            bounds[part] = bootstrap.interval(weights @ flat[:, part].float())
        found[pair] = bounds.unflatten(0, values.shape[1:])
    return found


def example_values(effects: SiteEffects, nodes: SiteNodes, n_examples: int, *, rows: int) -> Iterator[Tensor]:
    """Effects of the nodes per example, [B, n] for a chunk of nodes at a time; a [rows, n] tensor fits the budget."""
    by_position = bool((nodes.position >= 0).any())
    stride = nodes.n_features + 1

    def keys(position: Tensor, feature: Tensor) -> Tensor:
        return position.long() * stride + feature.long() if by_position else feature.long()

    entry_keys = keys(effects.position, effects.feature)
    step = max(1, CHUNK_BYTES // (4 * rows))
    for start in range(0, len(nodes), step):
        part = nodes[start : start + step]
        wanted, order = keys(part.position, part.feature).sort()
        slot = torch.searchsorted(wanted, entry_keys).clamp(max=len(wanted) - 1)
        here = wanted[slot] == entry_keys
        values = torch.zeros(n_examples, len(part))
        index = (effects.example[here].long(), order[slot[here]])
        yield values.index_put_(index, effects.value[here], accumulate=True)


def split_half(
    effects: Mapping[Site, SiteEffects],
    nodes: Nodes,
    *,
    n_examples: int,
    sizes: Sequence[int] = (10, 20, 50, 100, 200),
    splits: int = 50,
    seed: int = 0,
) -> Stability | None:
    """How well random halves of the prompts agree on the strongest nodes; None for fewer than four prompts."""
    n_nodes = count(nodes)
    sizes = sorted({size for size in sizes if size < n_nodes}) or [n_nodes]
    if n_examples < 4 or not n_nodes:
        return None
    candidates = select_nodes(nodes, top=CANDIDATES)
    values = torch.cat(
        [
            part
            for site, site_nodes in candidates.items()
            for part in example_values(effects[site], site_nodes, n_examples, rows=n_examples)
        ],
        dim=1,
    )  # [B, n]
    generator = torch.Generator().manual_seed(seed)
    half = n_examples // 2
    overlaps, correlations = torch.zeros(len(sizes)), 0.0
    for _ in range(splits):
        order = torch.randperm(n_examples, generator=generator)
        first, second = values[order[:half]].mean(0), values[order[half : 2 * half]].mean(0)
        correlations += torch.corrcoef(torch.stack([first, second]).double())[0, 1].item()
        for column, size in enumerate(sizes):
            one, other = (x.abs().topk(size).indices for x in (first, second))
            overlaps[column] += torch.isin(one, other).float().mean()
    return Stability(
        list(sizes), (overlaps / splits).tolist(), [size / n_nodes for size in sizes], correlations / splits, splits
    )


def with_uncertainty(circuit: Circuit, bootstrap: Bootstrap | None = None) -> Circuit:
    """The circuit with an interval for every node, and for every edge where discovery kept the weights of single
    examples; in its metadata what is distinguishable and how stable it is.
    """
    bootstrap = bootstrap or Bootstrap()
    n_examples = circuit.metadata["n_examples"]
    intervals = node_intervals(circuit.effects, circuit.nodes, n_examples=n_examples, bootstrap=bootstrap)
    of_edges = edge_intervals(circuit.edge_samples, bootstrap=bootstrap)
    stability = split_half(circuit.effects, circuit.nodes, n_examples=n_examples, seed=bootstrap.seed)
    uncertainty = {
        **asdict(bootstrap),
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
    known = circuit.metadata["uncertainty"]
    edges = ""
    if known.get("n_distinguishable_edges") is not None:
        edges = f" and {known['n_distinguishable_edges']} of {known['n_edges']} edges"
    text = (
        f"{known['n_distinguishable']} of {count(circuit.nodes)} nodes{edges} are distinguishable from zero "
        f"({known['level']:.0%} bootstrap intervals over {circuit.metadata['n_examples']} prompts)"
    )
    if not known["split_half"]:
        return text
    halves = known["split_half"]
    agreed = [f"{o:.0%} of {n}" for n, o in zip(halves["sizes"], halves["overlap"], strict=True)]
    return f"{text};\ntwo random halves of the prompts agree on {', '.join(agreed[:4])} strongest nodes"

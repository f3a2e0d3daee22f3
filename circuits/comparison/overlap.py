"""How much two circuits overlap, and how much of it is chance.

Both circuits are vectors over nodes of one naming (those of the first; see `circuits.comparison.partners`): a_i and b_i
are the effects of node i, and A, B the n nodes of largest |effect| of each.

1. Weighted Jaccard similarity of the nodes, with each circuit's |effects| scaled to add up to one so that behaviours of
   unequal size compare:

       J = Σ_i min(w_i, v_i) / Σ_i max(w_i, v_i),   w_i = |a_i| [i in A] / Σ_A |a|,   v_i = |b_i| [i in B] / Σ_B |b|.

2. The same for the |weights| of the strongest edges, an edge being its two nodes.
3. Pearson and Spearman correlation of a_i and b_i, signs and all, over the union of A and B.
4. The null: the features of each site of the second circuit change names at random, among all names at that site with
   an effect in either circuit; spans and errors keep theirs, and edges follow their nodes. p = (1 + how often the
   shuffled statistic is at least the measured one) / (1 + shuffles) (Phipson & Smyth 2010).

Legend: N names, n nodes of a circuit, E edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from circuits.attribution.nodes import Nodes
from circuits.circuit import Circuit
from circuits.comparison.partners import Partners
from sae.model.sites import Site

Name = tuple[str, int, str]
"""Site, feature (ERROR, SKIP: what is none) and span ("" where positions are summed)."""
METRIC: Name = ("metric", -1, "")
ERROR, SKIP = OTHERS = (-1, -2)
"""Numbers of the error and of the skip connection, which are the same nodes whatever the features are."""
Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class Profile:
    """A circuit as effects of named nodes and weights of named edges."""

    effects: dict[Name, float]
    """All nodes with an effect."""
    edges: dict[tuple[Name, Name], float]
    """(upstream, downstream) -> weight, the metric among the latter."""


@dataclass(frozen=True)
class Tested:
    """A statistic beside its null."""

    value: float
    """The overlap."""
    chance: float
    """Mean over shuffles."""
    p: float | None
    """Share of shuffles that reach it; None without shuffles."""


@dataclass(frozen=True)
class Overlap:
    """How much two circuits overlap."""

    shared: int
    """Nodes among the n strongest of both."""
    nodes: Tested
    """Weighted Jaccard similarity of the nodes."""
    edges: Tested | None
    """Weighted Jaccard similarity of the edges; None where a circuit has none."""
    pearson: Tested
    """Linear correlation of effects."""
    spearman: float
    """Correlation of their ranks."""


def profile(circuit: Circuit, nodes: Nodes, *, n_edges: int, partners: Partners | None = None) -> Profile:
    """A circuit as named nodes and edges.

    Args:
        circuit: the circuit.
        nodes: its nodes, by span or with positions summed; edges are summed alike.
        n_edges: edges taken, the strongest.
        partners: where given, features take the name of their partner, and those without one a name of their own.
    """

    def name(site: Site, feature: int, position: int, spans: tuple[str, ...], n_features: int) -> Name:
        if feature >= n_features:
            feature = OTHERS[feature - n_features]
        elif partners is not None:
            feature = partners.get(site, {}).get(feature, own_number(feature))
        return site.name, feature, spans[position] if spans and position >= 0 and by_span else ""

    by_span = any(of_site.spans for of_site in nodes.values())
    effects: dict[Name, float] = {}
    for site, of_site in nodes.items():
        rows = zip(of_site.feature.tolist(), of_site.position.tolist(), of_site.effect.tolist(), strict=True)
        effects |= {name(site, f, p, of_site.spans, of_site.n_features): effect for f, p, effect in rows}
    names = {
        site: [
            name(site, f, p, of_site.spans, of_site.n_features)
            for f, p in zip(of_site.feature.tolist(), of_site.position.tolist(), strict=True)
        ]
        for site, of_site in circuit.edge_nodes.items()
    }
    edges: dict[tuple[Name, Name], float] = {}
    for (up, down), weights in circuit.edges.items():
        targets = [METRIC] if down is None else names[down]
        for row, column in weights.nonzero().tolist():
            edge = names[up][column], targets[row]
            edges[edge] = edges.get(edge, 0.0) + weights[row, column].item()
    strongest = sorted(edges.items(), key=lambda entry: -abs(entry[1]))[:n_edges]
    return Profile(effects, dict(strongest))


def own_number(feature: int) -> int:
    """The number that a feature of the second circuit goes by where it has no partner, none of the first's; from that
    number, the feature.
    """
    return -1 - len(OTHERS) - feature


def measure_overlap(a: Profile, b: Profile, *, n: int, shuffles: int, seed: int) -> Overlap:
    """Overlap of the n strongest nodes of each, and of their edges, beside the null."""
    names = Names([a, b])
    (x, ends_a, weights_a), (y, ends_b, weights_b) = (names.arrays(one) for one in (a, b))
    in_a, in_b = strongest(x, n), strongest(y, n)
    w, v = shares(np.where(in_a, x, 0.0)), shares(np.where(in_b, y, 0.0))
    generator = np.random.default_rng(seed)
    null: dict[str, list[float]] = {"nodes": [], "edges": [], "pearson": []}
    for shuffle in range(shuffles + 1):
        new = names.shuffled(generator) if shuffle else np.arange(len(names))  # first as it is
        old = np.argsort(new)  # moved[new] = v
        null["nodes"].append(jaccard(w, v[old]))
        null["pearson"].append(correlation(x, y[old], in_a | in_b[old]))
        if len(weights_a) and len(weights_b):
            null["edges"].append(edge_jaccard(ends_a, weights_a, new[ends_b], weights_b, len(names)))
    either = in_a | in_b
    ranks = float(spearmanr(x[either], y[either]).statistic) if either.sum() > 2 else float("nan")
    tested = {key: _tested(values) for key, values in null.items() if values}
    return Overlap(int((in_a & in_b).sum()), tested["nodes"], tested.get("edges"), tested["pearson"], ranks)


class Names:
    """All names of some circuits, numbered; a feature that occurs at all has a name at every span."""

    def __init__(self, profiles: Sequence[Profile]) -> None:
        ends = [name for one in profiles for edge in one.edges for name in edge]
        occurring = dict.fromkeys([*(name for one in profiles for name in one.effects), *ends, METRIC])
        spans = sorted({span for _, feature, span in occurring if feature not in OTHERS}) or [""]
        features = dict.fromkeys((site, feature) for site, feature, _ in occurring if feature not in OTHERS)
        every = [(*feature, span) for feature in features for span in spans]
        self.number = {name: index for index, name in enumerate(dict.fromkeys([*every, *occurring]))}
        rows: dict[str, list[list[int]]] = {}
        for site, feature in features:
            rows.setdefault(site, []).append([self.number[site, feature, span] for span in spans])
        self.tables = [np.array(table) for table in rows.values()]
        """Per site [features, spans] the number of each name."""

    def __len__(self) -> int:
        return len(self.number)

    def arrays(self, circuit: Profile) -> tuple[Floats, Integers, Floats]:
        """The effect of every name [N], and the ends [E, 2] and weights [E] of the edges."""
        effects = np.zeros(len(self))
        for name, effect in circuit.effects.items():
            effects[self.number[name]] = effect
        ends = [(self.number[up], self.number[down]) for up, down in circuit.edges]
        return effects, np.array(ends, dtype=np.int64).reshape(-1, 2), np.array(list(circuit.edges.values()))

    def shuffled(self, generator: np.random.Generator) -> Integers:
        """[N] the new number of each name: features of a site change names, spans, errors and skips keep theirs."""
        new = np.arange(len(self))
        for table in self.tables:
            new[table] = generator.permutation(table)  # rows
        return new


def strongest(x: Floats, n: int) -> NDArray[np.bool_]:
    """[N] bool: the n entries of largest |x|, of those that are not zero."""
    chosen: NDArray[np.bool_] = np.zeros(len(x), dtype=bool)
    chosen[np.argsort(-np.abs(x), kind="stable")[:n]] = True
    return chosen & (x != 0)


def shares(x: Floats) -> Floats:
    """|x| scaled to add up to one."""
    return np.abs(x) / (np.abs(x).sum() or 1.0)


def jaccard(w: Floats, v: Floats) -> float:
    """Σ min(w, v) / Σ max(w, v)."""
    return float(np.minimum(w, v).sum() / (np.maximum(w, v).sum() or 1.0))


def edge_jaccard(ends_a: Integers, a: Floats, ends_b: Integers, b: Floats, n_names: int) -> float:
    """Weighted Jaccard similarity of edges, [E, 2] and [E] of each circuit; both weigh one in all."""
    w, v = shares(a), shares(b)
    key_a, key_b = (ends[:, 0] * n_names + ends[:, 1] for ends in (ends_a, ends_b))
    _, at_a, at_b = np.intersect1d(key_a, key_b, assume_unique=True, return_indices=True)
    common = float(np.minimum(w[at_a], v[at_b]).sum())
    return common / (float(w.sum() + v.sum()) - common)


def correlation(x: Floats, y: Floats, where: NDArray[np.bool_]) -> float:
    """Pearson correlation over some entries; 0 where one side does not vary."""
    x, y = x[where] - x[where].mean(), y[where] - y[where].mean()
    size = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / size) if size else 0.0


def _tested(values: list[float]) -> Tested:
    """The first value beside the others, which are of shuffles."""
    value, shuffled = values[0], values[1:]
    if not shuffled:
        return Tested(value, float("nan"), None)
    reached = sum(bool(other >= value - 1e-12) for other in shuffled)
    return Tested(value, float(np.mean(shuffled)), (1 + reached) / (1 + len(shuffled)))

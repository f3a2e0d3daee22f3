"""Circuits beside each other: of two tasks, methods, checkpoints of a model, or seeds of autoencoders.

1. Features are the same where the autoencoders are; otherwise they are matched by what they write and when they are on
   (`circuits.comparison.partners`).
2. Nodes and edges are held against each other, and against chance (`circuits.comparison.overlap`).
3. Transfer, both ways: the faithfulness of one circuit's n strongest nodes, in its own model and autoencoders, on the
   other's prompts and metric, beside that of the other's own nodes; where the autoencoders differ also that of its
   nodes' partners in the other's. Structure that differs proves nothing without it, since many circuits carry one
   mechanism (arXiv 2606.06267).
4. The verdict: the same mechanism if nodes overlap beyond chance (p <= `LEVEL`) and each circuit carries at least
   `SAME` of what the other's own nodes carry; different if they do not overlap beyond chance or neither carries more
   than `DIFFERENT`; else the same in part.

Nodes are compared by span where both circuits are by the same spans, else with positions summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch

from circuits.attribution.activations import Setting
from circuits.attribution.nodes import Nodes, SiteNodes, aggregate, count, select_nodes
from circuits.circuit import Circuit
from circuits.comparison.circuit_results import CircuitComparison, PairOfCircuits, Transfer
from circuits.comparison.options import CompareCircuitsOptions
from circuits.comparison.overlap import Profile, measure_overlap, profile
from circuits.comparison.partners import Partners, find_partners
from circuits.comparison.union import named_graph
from circuits.faithfulness.nodes import from_start_site, measure_faithfulness
from circuits.metrics.probe import visible_sites
from circuits.options import FaithfulnessOptions
from graphs.feature_graph import FeatureGraph
from sae._progress import ProgressBar
from sae.errors import UserError

LEVEL = 0.05
"""Largest p of an overlap beyond chance."""
SAME, DIFFERENT = 0.8, 0.2
"""Share of what the other circuit's own nodes carry, from which on, and up to which, mechanisms are the same and
different.
"""


def compare_circuits(
    first: Circuit,
    second: Circuit,
    *others: Circuit,
    options: CompareCircuitsOptions | None = None,
    names: Sequence[str] | None = None,
    progress: bool = True,
) -> CircuitComparison:
    """Hold circuits against each other, every two of them: do they describe the same mechanism?

    Args:
        first, second, others: The circuits, found or opened from disk. They may be of other prompts, methods,
            autoencoders or checkpoints, but of models with the same tokens.
        options: How many nodes and edges are compared, how often shuffled, and what ablated nodes become.
        names: What the circuits are called; their titles by default.
        progress: Whether to show a progress bar.

    Returns:
        For every two circuits the overlap of nodes and edges in [0, 1] with a p value, the correlation of effects, the
        transfer of each to the other's prompts in shares of the behaviour (1 is the whole model), a verdict, and a
        picture of both.

    Raises:
        UserError: The circuits share no site, or are of models with different vocabularies.
    """
    options = options or CompareCircuitsOptions()
    circuits = [first, second, *others]
    titles = [str(circuit.metadata.get("title") or f"circuit {i}") for i, circuit in enumerate(circuits, 1)]
    names = _distinct(titles if names is None else list(names))
    pairs = list(combinations(range(len(circuits)), 2))
    compared = []
    with ProgressBar(total=len(pairs), desc="circuits", unit="pair", disable=not progress) as bar:
        for i, j in pairs:
            compared.append(_compare(circuits[i], circuits[j], (names[i], names[j]), options))
            bar.update()
    return CircuitComparison(compared, options)


def _compare(a: Circuit, b: Circuit, names: tuple[str, str], options: CompareCircuitsOptions) -> PairOfCircuits:
    """Everything about two circuits."""
    if not set(a.nodes) & set(b.nodes):
        raise UserError(
            f"the circuits share no site: {names[0]} has {', '.join(map(str, a.nodes))}, {names[1]} "
            f"{', '.join(map(str, b.nodes))}"
        )
    partners, similarity = find_partners(a, b, prompts=options.examples)
    is_same = similarity is None  # the autoencoders
    nodes_a, nodes_b = _comparable(a, b)
    profiles = (
        profile(a, nodes_a, n_edges=options.edges),
        profile(b, nodes_b, n_edges=options.edges, partners=None if is_same else partners),
    )
    overlap = measure_overlap(*profiles, n=options.nodes, shuffles=options.shuffles, seed=options.seed)
    there = back = None
    if options.transfer:
        backwards = {site: {i: j for j, i in of_site.items()} for site, of_site in partners.items()}
        there = _transfer((a, nodes_a), (b, nodes_b), None if is_same else backwards, options)
        back = _transfer((b, nodes_b), (a, nodes_a), None if is_same else partners, options)
    return PairOfCircuits(
        first=names[0],
        second=names[1],
        n=options.nodes,
        matched=None if similarity is None else _matched(nodes_b, partners, options.nodes),
        similarity=similarity,
        overlap=overlap,
        there=there,
        back=back,
        verdict=verdict(overlap.nodes.p, there, back),
        graphs=_graphs((a, b), profiles, None if is_same else partners, names),
    )


def verdict(p: float | None, there: Transfer | None, back: Transfer | None) -> str:
    """`same`, `partly` or `different`; `unknown` where transfer, or chance, was not measured."""
    if p is not None and p > LEVEL:
        return "different"
    if p is None or there is None or back is None:
        return "unknown"
    shares = there.share, back.share
    return "same" if min(shares) >= SAME else "different" if max(shares) <= DIFFERENT else "partly"


def _comparable(a: Circuit, b: Circuit) -> tuple[Nodes, Nodes]:
    """The nodes of both, by span where both have the same, else with positions summed."""
    if a.spans and a.spans == b.spans:
        return a.nodes, b.nodes
    return _summed(a), _summed(b)


def _summed(circuit: Circuit) -> Nodes:
    meta = circuit.metadata
    return aggregate(circuit.effects, n_examples=meta["n_examples"], n_positions=meta["n_positions"])


def _matched(nodes: Nodes, partners: Partners, n: int) -> float:
    """Share of the |effect| of the n strongest features that have a partner."""
    chosen = select_nodes({site: of_site[of_site.is_feature] for site, of_site in nodes.items()}, top=n)
    matched, total = 0.0, 0.0
    for site, of_site in chosen.items():
        for feature, effect in zip(of_site.feature.tolist(), of_site.effect.abs().tolist(), strict=True):
            total += effect
            matched += effect * (feature in partners.get(site, {}))
    return matched / total if total else 0.0


def _transfer(
    one: tuple[Circuit, Nodes], other: tuple[Circuit, Nodes], partners: Partners | None, options: CompareCircuitsOptions
) -> Transfer:
    """Faithfulness of the n strongest nodes of one circuit on the prompts of another, and of that one's own; partners:
    None where the autoencoders are the same.
    """
    (circuit, nodes), (to, nodes_there) = one, other
    chosen = select_nodes(nodes, top=options.nodes)
    sites = visible_sites(to.metric, circuit.model, list(nodes))
    here = Setting.of(circuit.model, circuit.saes, to.metric, sites=sites)
    translated = None
    if partners is not None:
        translated = _faithful(to.setting(), _translated(chosen, nodes_there, partners), to, options)
    return Transfer(
        carried=_faithful(here, {site: chosen[site] for site in sites}, to, options),
        own=_faithful(to.setting(), select_nodes(nodes_there, top=options.nodes), to, options),
        translated=translated,
    )


def _faithful(setting: Setting, nodes: Nodes, to: Circuit, options: CompareCircuitsOptions) -> float:
    """Faithfulness of nodes on the prompts of a circuit; 0 of none."""
    if not (n := count(from_start_site(nodes, options.start_site, errors=options.errors))):
        return 0.0
    prompts = to.prompts[: options.examples]
    measuring = FaithfulnessOptions(
        ablation=options.ablation, start_site=options.start_site, errors=options.errors, random=0, seed=options.seed,
        batch_size=options.batch_size, resamples=0,
    )  # fmt: skip
    curve = measure_faithfulness(setting, nodes, prompts, measuring, sizes=[n], progress=False)
    return curve.faithfulness[-1]


def _translated(chosen: Nodes, nodes_there: Nodes, partners: Partners) -> Nodes:
    """Nodes as those of other dictionaries, at all sites of `nodes_there`; nodes without a partner
    are left out."""
    translated: Nodes = {}
    for site, of_site in nodes_there.items():
        empty = of_site[:0]
        nodes = chosen.get(site)
        if nodes is None:
            translated[site] = empty
            continue
        to = partners.get(site, {})
        features = [
            to.get(feature, -1) if feature < nodes.n_features else of_site.n_features + feature - nodes.n_features
            for feature in nodes.feature.tolist()
        ]
        feature = torch.tensor(features, dtype=torch.long)
        has = feature >= 0
        translated[site] = SiteNodes(
            of_site.n_features, feature[has], nodes.position[has], nodes.effect[has], nodes.spans
        )
    return translated


def _graphs(
    circuits: tuple[Circuit, Circuit],
    profiles: tuple[Profile, Profile],
    partners: Partners | None,
    names: tuple[str, str],
) -> tuple[FeatureGraph, FeatureGraph]:
    """Both graphs under the names of the first, for the picture of both."""
    a, b = circuits
    sites = [site.name for site in sorted({*a.nodes, *b.nodes})]
    first = named_graph(a, profiles[0], sites=sites, title=names[0])
    if partners is None:
        return first, named_graph(b, profiles[1], sites=sites, title=names[1])
    widths = {site.name: of_site.n_features for site, of_site in a.nodes.items()}
    return first, named_graph(b, profiles[1], sites=sites, title=names[1], widths=widths, partners=partners)


def _distinct(names: list[str]) -> list[str]:
    """The names, numbered where they are the same."""
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, 1)]

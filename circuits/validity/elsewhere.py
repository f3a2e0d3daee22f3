"""A circuit elsewhere: on prompts in other words, and in other autoencoders of the same model.

Both are found by the method of the circuit, with positions summed, and compared node by node; and since two circuits
may differ in nodes and not in what they explain, faithfulness stands beside the overlap.

1. Paraphrases: what the circuit's nodes explain of the other prompts, and the overlap with the circuit found on them.
2. Other autoencoders (another seed, say): features are matched by decoder cosine, mutual best partners of at least
   `SAME`; errors of a site match each other. The overlap counts matched nodes as one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from circuits.attribution.activations import Setting
from circuits.attribution.nodes import Nodes, aggregate, select_nodes
from circuits.circuit import Circuit
from circuits.discovery.discover import discover
from circuits.faithfulness.nodes import from_start_site, metrics_of_sets, set_up, share_intervals, shares
from circuits.metrics.metrics import Metric
from circuits.options import DiscoverOptions, ValidityOptions
from circuits.prompts.dataset import PromptSet
from circuits.uncertainty.bootstrap import Bootstrap
from circuits.uncertainty.intervals import strongest_values
from circuits.validity.overlap import Interval, NodeValues, Overlap, overlap_between
from sae.autoencoder import SparseAutoencoder
from sae.errors import UserError
from sae.features.matching import match_features
from sae.model.sites import Site
from sae.saes import SAEs, as_saes
from sae.splice import ensure_checked

SAME = 0.7
"""Decoder cosine from which on mutual partners are one feature."""


@dataclass(frozen=True)
class Elsewhere:
    """A circuit beside that found elsewhere."""

    overlap: Overlap
    """Overlap of both circuits, with positions summed."""
    faithfulness: float
    """What the circuit's nodes (paraphrases), or the other circuit's (other autoencoders), explain there."""
    interval: Interval | None
    """95 % interval of it."""
    matched: float = 1.0
    """Share of the circuit's features that have a partner."""


def on_paraphrases(
    circuit: Circuit, prompts: PromptSet, options: ValidityOptions, *, metric: Metric, progress: bool
) -> Elsewhere:
    """The circuit on prompts of the same behaviour in other words, which are their own reference for ablation; metric:
    the circuit's.
    """
    other = _found_again(circuit, dict(circuit.saes), prompts, metric=metric, progress=progress)
    overlap = overlap_between(_values(circuit, options), _values(other, options), options.nodes, _bootstrap(options))
    setting = Setting.of(circuit.model, circuit.saes, metric, sites=circuit.effects)
    return Elsewhere(overlap, *_explained(setting, circuit.nodes, prompts, options, progress=progress))


def shared_saes(circuit: Circuit, saes: Mapping[Site, SparseAutoencoder], options: ValidityOptions) -> SAEs:
    """Other autoencoders at the sites of the circuit; `UserError` where there are none, none at the start site, or one
    does not fit the model.
    """
    sites = [site for site in circuit.effects if site in saes]
    names = [site.name for site in sites]
    if not sites or (options.start_site is not None and options.start_site not in names):
        lacking = "" if not sites else f", with start site {options.start_site}"
        raise UserError(
            f"the other autoencoders are at {', '.join(map(str, saes))}, the circuit at "
            f"{', '.join(map(str, circuit.effects))}{lacking}: give autoencoders at the same sites"
        )
    ensure_checked(circuit.model, saes, sites)
    return as_saes(saes).subset(sites)


def in_other_saes(
    circuit: Circuit, saes: Mapping[Site, SparseAutoencoder], options: ValidityOptions, *, metric: Metric,
    progress: bool,
) -> Elsewhere:  # fmt: skip
    """The circuit beside that of the same prompts in other autoencoders, at the sites that both have; metric: the
    circuit's.
    """
    others = shared_saes(circuit, saes, options)
    sites = list(others)
    other = _found_again(circuit, others, circuit.prompts, metric=metric, progress=progress)
    partner = {site: _partners(circuit.saes[site], others[site]) for site in sites}
    node_values = _values(circuit, options, sites)
    names = [_renamed(name, partner) for name in node_values.names]
    overlap = overlap_between(
        NodeValues(names, node_values.values, node_values.groups),
        _values(other, options),
        options.nodes,
        _bootstrap(options),
    )
    chosen = node_values.strongest(options.nodes).nonzero()[:, 0].tolist()
    features = [names[column] for column in chosen if not node_values.names[column].endswith(("/error", "/skip"))]
    matched = sum(not name.startswith(UNMATCHED) for name in features) / max(len(features), 1)
    explained = _explained(other.setting(), other.nodes, circuit.prompts, options, progress=progress)
    return Elsewhere(overlap, *explained, matched)


def _found_again(
    circuit: Circuit, saes: Mapping[Site, SparseAutoencoder], prompts: PromptSet, *, metric: Metric, progress: bool
) -> Circuit:
    """The nodes of the behaviour by the circuit's own method, positions summed."""
    options: dict[str, Any] = {**circuit.metadata["options"], "edge_nodes": 0, "aggregation": "sum", "sites": "all"}
    chosen = as_saes(saes).subset([site for site in circuit.effects if site in saes])
    return discover(circuit.model, chosen, prompts, DiscoverOptions(**options), metric=metric, progress=progress)


def _values(circuit: Circuit, options: ValidityOptions, sites: list[Site] | None = None) -> NodeValues:
    """Effects of its nodes on every prompt, positions summed."""
    n_examples = circuit.metadata["n_examples"]
    effects = {site: circuit.effects[site] for site in sites or circuit.effects}
    nodes = aggregate(effects, n_examples=n_examples, n_positions=circuit.metadata["n_positions"])
    start = options.start_site if options.start_site in {site.name for site in nodes} else None
    nodes, values = strongest_values(effects, from_start_site(nodes, start, errors=options.errors), n_examples)
    groups = torch.arange(n_examples) if circuit.groups is None else circuit.groups
    return NodeValues([name for site, of_site in nodes.items() for name in of_site.ids(site)], values, groups)


def _explained(
    setting: Setting, nodes: Nodes, prompts: PromptSet, options: ValidityOptions, *, progress: bool
) -> tuple[float, Interval | None]:
    """Faithfulness of the strongest nodes on prompts that are their own reference, with its interval."""
    every, tested, reference, _ = set_up(setting, nodes, prompts, prompts, options)
    m = metrics_of_sets(
        setting, [(select_nodes(every, top=options.nodes), True)], tested, options, nodes=every,
        reference=reference, seed=options.seed, batch_size=options.batch_size, progress=progress,
    )  # fmt: skip
    low, high = share_intervals(m, tested.groups, _bootstrap(options))[0].tolist()
    return float(shares(m.mean(1))[0]), (low, high) if low == low else None


def _bootstrap(options: ValidityOptions) -> Bootstrap:
    return Bootstrap(resamples=options.resamples, seed=options.seed)


UNMATCHED = "unmatched "
"""How names of features without a partner begin."""


def _partners(a: SparseAutoencoder, b: SparseAutoencoder) -> Tensor:
    """[F_a] the mutual partner of each feature of a in b, -1 where it has none."""
    match = match_features(a.W_dec, b.W_dec)
    return torch.where(match.mutual & (match.similarity >= SAME), match.partner, -1).cpu()


def _renamed(name: str, partner: Mapping[Site, Tensor]) -> str:
    """The name of a node's partner in the other autoencoders; one that nothing else has where there is none."""
    site, _, feature = name.partition("/")
    if feature in ("error", "skip"):
        return name
    number = int(partner[Site.parse(site)][int(feature)])
    return f"{site}/{number}" if number >= 0 else UNMATCHED + name

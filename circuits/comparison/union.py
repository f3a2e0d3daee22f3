"""Two circuits in the names of the first, so that one page shows what is in both and what in one alone."""

from __future__ import annotations

from circuits.circuit import Circuit
from circuits.comparison.overlap import ERROR, METRIC, OTHERS, Name, Profile, own_number
from circuits.comparison.partners import Partners
from graphs.drawing.style import describe
from graphs.feature_graph import FeatureGraph, error_node, feature_node, metric_node, skip_node

NODES, EDGES = 150, 1500
"""Nodes and edges of each circuit in the picture, at most."""


def named_graph(
    circuit: Circuit, profile: Profile, *, sites: list[str], title: str, widths: dict[str, int] | None = None,
    partners: Partners | None = None,
) -> FeatureGraph:  # fmt: skip
    """The strongest nodes and edges of a circuit as a graph.

    Args:
        circuit: the circuit, for what is known of its features.
        profile: its nodes and edges, in the names of the first circuit.
        sites: those of both circuits, in forward order.
        title: what the circuit is called.
        widths: features of the first circuit's autoencoders by site, where the second has others; a feature without a
            partner then goes by its number beyond these.
        partners: of the second circuit's features, where the autoencoders differ.
    """
    shown = ("positions", "tokens", "span_words", "metric", "cases", "last_span", "options")
    metadata = {key: value for key, value in circuit.metadata.items() if key in shown} | {"title": title}
    graph = FeatureGraph(sites, metadata=metadata)
    originals = {} if partners is None else {(s.name, i): j for s, pairs in partners.items() for j, i in pairs.items()}
    strongest = sorted(profile.effects.items(), key=lambda entry: -abs(entry[1]))[:NODES]
    ids: dict[Name, str] = {METRIC: METRIC[0]}
    for name, effect in strongest:
        site, feature, span = name
        position = span or None
        if feature in OTHERS:
            node = (error_node if feature == ERROR else skip_node)(site, effect=effect, position=position)
        else:
            number = feature if feature >= 0 else (widths or {}).get(site, 0) + own_number(feature)
            original = originals.get((site, feature), feature) if feature >= 0 else own_number(feature)
            about = circuit.features.get(f"{site}/{original}", {})
            node = feature_node(site, number, effect=effect, position=position, **about)
            origin = f"{site}/{original} of {title}"
        ids[name] = node.id
        graph.add_node(node)
        if partners is not None and node.kind == "feature":
            node.attributes["automatic_label"] = " ".join(filter(None, [describe(graph, node), f"({origin})"]))
    graph.add_node(metric_node(effect=circuit.metadata.get("total_effect") or 0.0))
    edges = [(up, down, weight) for (up, down), weight in profile.edges.items() if up in ids and down in ids]
    for up, down, weight in sorted(edges, key=lambda edge: -abs(edge[2]))[:EDGES]:
        graph.add_edge(ids[up], ids[down], weight)
    return graph

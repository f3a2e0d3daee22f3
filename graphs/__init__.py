"""A feature graph and every way to see it: drawings, a page to explore it in, other tools' formats.

    from graphs import FeatureGraph, draw, explore

    graph = FeatureGraph.load("runs/pythia/circuit/circuit.json")
    draw(graph, "circuit.svg")
    explore(graph, "circuit.html")

Names are imported when they are first used, and none of them imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphs.annotations import read_annotations, write_annotations
    from graphs.drawing.dot import draw, to_dot, to_svg
    from graphs.errors import GraphError
    from graphs.explorer import explore
    from graphs.feature_graph import Edge, FeatureGraph, Node
    from graphs.formats.circuit_tracer import write_circuit_tracer
    from graphs.formats.eap_ig import read_eap_ig, write_eap_ig
    from graphs.formats.graphml import read_graphml, write_graphml
    from graphs.formats.neuronpedia import read_neuronpedia, write_neuronpedia
    from graphs.pruning import influence, reachable

_MODULES = {
    "annotations": ("read_annotations", "write_annotations"),
    "drawing.dot": ("draw", "to_dot", "to_svg"),
    "errors": ("GraphError",),
    "explorer": ("explore",),
    "feature_graph": ("Edge", "FeatureGraph", "Node"),
    "formats.circuit_tracer": ("write_circuit_tracer",),
    "formats.eap_ig": ("read_eap_ig", "write_eap_ig"),
    "formats.graphml": ("read_graphml", "write_graphml"),
    "formats.neuronpedia": ("read_neuronpedia", "write_neuronpedia"),
    "pruning": ("influence", "reachable"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Edge", "FeatureGraph", "GraphError", "Node", "draw", "explore", "influence", "reachable", "read_annotations",
    "read_eap_ig", "read_graphml", "read_neuronpedia", "to_dot", "to_svg", "write_annotations", "write_circuit_tracer",
    "write_eap_ig", "write_graphml", "write_neuronpedia",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

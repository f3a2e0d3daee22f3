"""`sfc render` and `sfc explore`: a picture of the circuit, and a page to explore it in."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from circuits.cli.options import HasCircuit, Output, Overwrites, Prints
from circuits.cli.results import circuit_file
from graphs._outputs import has_mark
from graphs.schema import Colour
from sae._options import Count, Magnitude, Positive

if TYPE_CHECKING:
    from graphs import FeatureGraph

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Cut(Prints, Overwrites, HasCircuit):
    """How much of the circuit is shown."""

    node_threshold: Magnitude | None = None
    """Only nodes with a larger |effect|."""
    edge_threshold: Magnitude | None = None
    """Only edges with a larger |weight|."""
    significant: bool = False
    """Only nodes whose bootstrap interval leaves out zero."""
    reachable: bool = False
    """Only nodes with a path to the metric."""
    annotations: Path | None = None
    """JSON lines {"Name": "resid_3/120", "Annotation": "plural nouns"} that label features; their top tokens do
    otherwise.
    """

    def cut(self, *, nodes: int | None, edges: int | None) -> FeatureGraph:
        """The graph to show, of at most the nodes that have edges; re-thresholding never runs the model."""
        from circuits.circuit import GRAPH_FILE, Circuit, circuit_folder
        from circuits.circuit_source import has_other_saes
        from graphs.annotations import apply, read_annotations
        from graphs.pruning import reachable

        circuit = Circuit.load(self.circuit)
        with_edges = sum(len(site_nodes) for site_nodes in circuit.edge_nodes.values())
        nodes = min(with_edges if nodes is None else nodes, with_edges) if with_edges else nodes
        graph = circuit.graph(
            nodes=nodes,
            node_threshold=self.node_threshold,
            edges=edges,
            edge_threshold=self.edge_threshold,
            significant=self.significant,
            attributes=circuit.features,
        )
        if has_other_saes(circuit.metadata, circuit_folder(self.circuit) / GRAPH_FILE):
            title = graph.metadata.get("title") or "Feature circuit"
            graph.metadata = {**graph.metadata, "title": f"{title} (of autoencoders that were trained again since)"}
            log.warning("the autoencoders were trained again after this circuit was found: discover it again")
        if self.reachable:
            graph = reachable(graph)
        return graph if self.annotations is None else apply(graph, read_annotations(self.annotations))


@dataclass(frozen=True, kw_only=True)
class RenderCommand(_Cut):
    """Draw the circuit: one row a site, features coloured by class, errors as triangles, edges by weight."""

    out: Path | None = None
    """Drawing to write: .svg, .png, .pdf or .dot; graph/circuit.svg in the run folder by default."""
    nodes: Positive | None = 40
    """Nodes drawn at most, the strongest."""
    edges: Count | None = 150
    """Edges drawn at most, the strongest."""
    colour: Colour = "class"
    """Colours stand for the class of prompts a feature is on for, or for whether its effect lowers or raises the
    metric.
    """

    def run(self) -> Output:
        from graphs import draw

        is_own = has_mark(".svg" if self.out is None else self.out.suffix)
        with circuit_file(self.circuit, self.out, "circuit.svg", is_own, overwrite=self.overwrite) as out:
            graph = self.cut(nodes=self.nodes, edges=self.edges)
            draw(graph, out, colour=self.colour, overwrite=True)  # it was checked
        return wrote(graph, out)


@dataclass(frozen=True, kw_only=True)
class ExploreCommand(_Cut):
    """Write the circuit as one interactive page that needs no server and no network."""

    out: Path | None = None
    """Page to write; graph/circuit.html in the run folder by default."""
    nodes: Positive | None = 300
    """Nodes on the page at most, the strongest; sliders show fewer."""
    edges: Count | None = 3000
    """Edges on the page at most, the strongest."""
    compare: Path | None = None
    """Run folder of a second circuit: the page tells what is in the first, in both, and in the second alone."""

    def run(self) -> Output:
        from circuits.circuit import circuit_folder
        from circuits.feature_pages import existing_links, read_index, write_page
        from graphs import explore

        is_own = has_mark(".html")
        with circuit_file(self.circuit, self.out, "circuit.html", is_own, overwrite=self.overwrite) as out:
            run = circuit_folder(self.circuit).parent
            graph, other = self.graph(), None
            if self.compare is not None:
                other = replace(self, circuit=self.compare).cut(nodes=self.nodes, edges=self.edges)
                other.metadata["title"] = circuit_folder(self.compare).parent.resolve().name
            fingerprint, is_new = graph.metadata.get("saes_fingerprint"), not out.exists()
            pages = run / "features" / "index.html" if read_index(run, fingerprint) else run / "no pages"
            links = existing_links(out, {"features": pages, "report": run / "report.html"})
            explore(graph, out, compare_with=other, links=links, overwrite=True)
            if is_new and "features" in links:
                write_page(run)  # which can lead here now
        return wrote(graph, out)

    def graph(self) -> FeatureGraph:
        """The graph on the page, with what is known of its features and the circuit's curve of faithfulness."""
        from circuits.circuit import circuit_folder
        from circuits.feature_pages import with_pages
        from circuits.report.files import Curves, read_result

        graph = with_pages(self.cut(nodes=self.nodes, edges=self.edges), circuit_folder(self.circuit).parent)
        curve = read_result(circuit_folder(self.circuit) / "faithfulness.json", graph, Curves)
        graph.metadata.update({"faithfulness": curve} if curve else {})
        return graph


def wrote(graph: FeatureGraph, out: Path) -> Output:
    """Say which file was written, and how much is in it."""
    nodes, edges = len(graph) - 1, graph.graph.number_of_edges()
    return Output(f"wrote {out} ({nodes} nodes, {edges} edges)", {"out": str(out), "nodes": nodes, "edges": edges})

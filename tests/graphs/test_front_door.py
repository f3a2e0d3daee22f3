"""The names that `graphs` offers, tables of a graph, and its picture in a notebook."""

import subprocess
import sys

import pytest

import graphs


@pytest.mark.slow
def test_every_public_name_is_there_and_none_imports_torch():
    code = "import sys, graphs; [getattr(graphs, name) for name in graphs.__all__]; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
    assert set(graphs.__all__) <= set(dir(graphs))


def test_tables_have_a_row_a_node_and_a_row_an_edge(make_circuit):
    graph = make_circuit()
    nodes, edges = graph.nodes_frame(), graph.edges_frame()
    assert nodes["id"].tolist() == [node.id for node in graph.nodes()]
    assert nodes["effect"].tolist() == [node.effect for node in graph.nodes()]
    assert edges[["source", "target", "weight"]].values.tolist() == [list(edge[:3]) for edge in graph.edges()]
    empty = graphs.FeatureGraph(["a"])
    assert len(empty.nodes_frame()) == len(empty.edges_frame()) == 0


def test_a_graph_draws_itself_in_a_notebook(make_circuit):
    assert make_circuit()._repr_html_().startswith("<svg")

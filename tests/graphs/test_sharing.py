"""What leaves the machine with a graph says nothing of its folders."""

from __future__ import annotations

import pytest

from graphs.explorer import explore, unpacked
from graphs.feature_graph import FeatureGraph, feature_node, metric_node
from graphs.formats.eap_ig import write_eap_ig
from graphs.formats.graphml import write_graphml
from graphs.formats.neuronpedia import write_neuronpedia
from graphs.sharing import shared, without_folders

PATHS = {
    "model": "/home/anna/models/pythia",
    "saes": "/home/anna/runs/x/",
    "options": {"metric": "probe:/home/anna/probe.safetensors", "files": ["C:\\Users\\anna\\a.json", "~/anna/b.json"]},
}


def test_paths_become_names():
    found = shared({**PATHS, "tokens": ["/", "/home/anna"], "hub": "EleutherAI/pythia", "n": 3})
    assert found["model"] == "pythia" and found["saes"] == "x" and found["hub"] == "EleutherAI/pythia"
    assert found["options"] == {"metric": "probe:probe.safetensors", "files": ["a.json", "b.json"]}
    assert found["tokens"] == ["/", "/home/anna"] and found["n"] == 3
    assert without_folders("resid=model.layers.{layer}") == "resid=model.layers.{layer}"
    assert without_folders("file:/home/anna/metric.py:f") == "file:metric.py:f"


@pytest.mark.parametrize("name", ["graph.html", "graph.graphml", "neuronpedia.json", "eap_ig.json"])
def test_exports_hold_no_absolute_paths(tmp_path, name):
    graph = FeatureGraph(["mlp_0"], metadata={"title": "t", **PATHS})
    graph.add_node(feature_node("mlp_0", 1, effect=0.5))
    graph.add_node(metric_node(effect=1.0))
    shape = {"n_layers": 1, "n_heads": 1, "d_model": 4}
    writers = {
        "graph.html": explore,
        "graph.graphml": write_graphml,
        "neuronpedia.json": write_neuronpedia,
        "eap_ig.json": lambda graph, path: write_eap_ig(graph, path, **shape),
    }
    writers[name](graph, tmp_path / name)
    text = (tmp_path / name).read_text()
    text = str(unpacked(text)) if name == "graph.html" else text
    assert "anna" not in text and "pythia" in text

"""What backs a circuit, on the command line: verification, intervals, errors, edges; and its way to other programs."""

from __future__ import annotations

import json

import pytest

from circuits.circuit import Circuit
from graphs.feature_graph import FeatureGraph
from graphs.formats.eap_ig import read_eap_ig
from graphs.formats.graphml import read_graphml
from graphs.formats.neuronpedia import read_neuronpedia

READERS = {"eap-ig": read_eap_ig, "neuronpedia": read_neuronpedia, "graphml": read_graphml}


@pytest.fixture(scope="module")
def verified_run(tmp_path_factory, model_folder, prompts_file, run_folder):
    return tmp_path_factory.mktemp("verified"), [
        "--model", model_folder, "--saes", run_folder, "--prompts", prompts_file, "--nodes", 20, "--edge-nodes", 20
    ]  # fmt: skip


@pytest.mark.slow
def test_discover_verifies_and_bounds_its_effects(sfc, verified_run):
    run, options = verified_run
    result = sfc(
        "discover", *options, "--out", run, "--verify", 5, "--resamples", 200, "--method", "attrib", "--overwrite"
    )
    assert result.status == 0
    assert "verified 5 nodes by exact patching" in result.out
    assert "edges are distinguishable from zero" in result.out and "intervals over 8 prompts; in sim" in result.out
    graph = FeatureGraph.load(run / "circuit" / "circuit.json")
    nodes = [node for node in graph.nodes() if node.kind != "metric"]
    assert sum("exact_effect" in node.attributes for node in nodes) == 5
    assert 0 < sum("interval" in node.attributes for node in nodes) <= len(nodes)
    drawn = sfc("render", "--circuit", run, "--out", run / "all.svg", "--json")
    certain = sfc("render", "--circuit", run, "--out", run / "certain.svg", "--significant", "--json")
    assert 0 < json.loads(certain.out)["nodes"] <= json.loads(drawn.out)["nodes"] == 20
    assert "exact effect" in (run / "certain.svg").read_text() and "interval" in (run / "certain.svg").read_text()


def test_without_intervals_nothing_is_significant(sfc, verified_run, tmp_path):
    _, options = verified_run
    plain = sfc("discover", *options, "--out", tmp_path, "--resamples", 0, "--method", "attrib")
    assert plain.status == 0 and "distinguishable" not in plain.out
    assert not Circuit.load(tmp_path).intervals
    result = sfc("render", "--circuit", tmp_path, "--significant")
    assert result.status == 2 and "no intervals" in result.err


@pytest.mark.parametrize("errors", ["nodes", "keep", "ablate"])
def test_faithfulness_says_what_happens_to_errors(sfc, run_folder, errors):
    result = sfc(
        "faithfulness", "--circuit", run_folder, "--sizes", "10", "--errors", errors, "--random", 0, "--overwrite"
    )
    assert result.status == 0 and "[" in result.out
    said = {"nodes": "", "keep": "all errors left in", "ablate": "all errors ablated"}[errors]
    assert said in result.out
    wrong = sfc("faithfulness", "--circuit", run_folder, "--errors", errors + "s")
    assert wrong.status == 2 and "nodes, keep, ablate" in wrong.err


@pytest.mark.slow
def test_faithfulness_of_edges(sfc, run_folder):
    options = [
        "--circuit",
        run_folder,
        "--sizes",
        "10",
        "--random",
        1,
        "--edges",
        "--edge-sizes",
        "20,50",
        "--overwrite",
    ]
    result = sfc("faithfulness", *options)
    assert result.status == 0 and "edges have a weight" in result.out
    data = json.loads((run_folder / "circuit" / "edge_faithfulness.json").read_text())
    assert data["sizes"] == [20, 50] and len(data["random"]) == 1
    assert (run_folder / "circuit" / "edge_faithfulness.svg").is_file()
    assert json.loads(sfc("faithfulness", *options, "--json").out)["edges"] == data


@pytest.mark.parametrize("name", READERS)
def test_export(sfc, run_folder, tmp_path, name):
    result = sfc("export", "--circuit", run_folder, "--format", name, "--out", tmp_path / "exported")
    assert result.status == 0 and "30 nodes" in result.out
    exported = READERS[name](tmp_path / "exported")
    graph = FeatureGraph.load(run_folder / "circuit" / "circuit.json")
    assert sorted(exported.edges()) == sorted(graph.edges())
    assert exported.nodes() == graph.nodes()


def test_export_has_a_place_of_its_own(sfc, run_folder):
    result = json.loads(sfc("export", "--circuit", run_folder, "--format", "eap-ig", "--json").out)
    data = json.loads((run_folder / "graph" / "circuit.eap_ig.json").read_text())
    assert result["out"].endswith("circuit.eap_ig.json")
    assert data["cfg"] == {"n_layers": 2, "n_heads": 4, "parallel_attn_mlp": True, "d_model": 32}


@pytest.mark.slow
def test_how_far_to_trust_a_circuit(sfc, run_folder, prompts_file):
    options = ["--circuit", run_folder, "--nodes", 10, "--removed", 3, "--verify", 3, "--resamples", 20, "--overwrite"]
    options += ["--paraphrases", prompts_file, "--other-saes", run_folder]
    result = sfc("validate", *options, "--json")
    assert result.status == 0
    data = json.loads(result.out)
    assert data == json.loads((run_folder / "circuit" / "validity.json").read_text())
    checks = {check["name"]: check for check in data["checks"]}
    assert checks["other-saes"]["value"] == 1 and checks["families"]["verdict"] == "untold"  # 8 prompts are too few
    assert sfc("report", "--circuit", run_folder, "--overwrite").status == 0
    page = (run_folder / "report.html").read_text()
    assert all(check["question"] in page for check in checks.values())


@pytest.mark.slow
def test_why_attention_looks_there(sfc, run_folder):
    """Of a circuit that adds up positions the edges are split; queries and keys have to be named."""
    result = sfc("attention", "--circuit", run_folder, "--edges", 3, "--examples", 4, "--overwrite")
    assert result.status == 0 and "give --query and --key" in result.out and "head 3" in result.out
    for words, why in (
        (["--query", "last"], "give both"),
        (["--head", 1], "give these too"),
        (["--query", "last", "--key", 0, "--layer", 7], "layers 0, 1 with heads 0 to 3"),
    ):
        refused = sfc("attention", "--circuit", run_folder, *words, "--name", "other")
        assert refused.status == 2 and refused.err.count("sfc:") == 1 and why in refused.err

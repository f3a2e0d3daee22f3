"""Comparing methods and circuits of neurons, as a user types it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from circuits.circuit import Circuit
from circuits.cli.commands.tests.circuits import CompareCircuitsCommand


@pytest.fixture
def place(model_folder, prompts_file):
    return ["--model", model_folder, "--prompts", prompts_file]


@pytest.mark.slow
def test_compare_methods(sfc, run_folder, place, tmp_path):
    small = ["--methods", "attrib,relp,ig-adaptive", "--neurons", "attrib", "--sizes", "5,10", "--sample", 20]
    small += ["--sites", "resid_1,mlp_1", "--resamples", 20]
    arguments = ["compare-methods", *place, "--saes", run_folder, "--out", tmp_path / "run"]
    result = sfc(*arguments, *small)
    assert result.status == 0, result.err
    assert "relp" in result.out and "attrib (neurons)" in result.out and "CPR" in result.out
    folder = tmp_path / "run" / "comparison"
    data = json.loads((folder / "comparison.json").read_text())
    assert data["n_train"] == 4 and data["n_test"] == 4
    assert {row["method"] for row in data["rows"]} == {"attrib", "relp", "ig-adaptive"}
    assert (folder / "comparison.svg").is_file()
    assert "relp" in (folder / "comparison.txt").read_text()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["compare-methods"]["options"]["sample"] == 20
    again = sfc(*arguments, *small)
    assert again.status == 2
    assert "not empty" in again.err
    small = ["--methods", "attrib", "--sizes", "5", "--sample", 5]
    whole = sfc(*arguments, *small, "--overwrite", "--json", "--test", place[-1])
    assert json.loads(whole.out)["n_test"] == 8


@pytest.mark.slow
def test_compare_circuits(sfc, run_folder, tmp_path):
    small = ["--nodes", 10, "--shuffles", 20]
    result = sfc("compare-circuits", run_folder, run_folder / "circuit", "--out", tmp_path / "both", *small)
    assert result.status == 0, result.err
    written = sorted(path for path in (tmp_path / "both").iterdir() if path.suffix)
    assert [path.name for path in written] == ["circuits.json", "circuits.txt", "circuits_1_2.html"]
    assert result.out.splitlines()[-3:] == [f"wrote {path}" for path in written]
    data = json.loads((tmp_path / "both" / "circuits.json").read_text())
    assert data["pairs"][0]["overlap"]["nodes"]["value"] == 1 and data["pages"] == ["circuits_1_2.html"]
    assert sfc("compare-circuits", run_folder).status == 2


@pytest.mark.slow
def test_compared_circuits_are_each_in_the_number_type_they_were_found_in(run_folder, tmp_path):
    other = shutil.copytree(run_folder, tmp_path / "other")
    content = json.loads((other / "circuit" / "circuit.json").read_text())
    content["metadata"]["dtype"] = "bfloat16"
    (other / "circuit" / "circuit.json").write_text(json.dumps(content))
    first, second, third = CompareCircuitsCommand(circuits=(run_folder, other, run_folder))._load()
    assert (first.model.dtype, second.model.dtype) == (torch.float32, torch.bfloat16) and third.model is first.model


@pytest.mark.slow
def test_behaviours(sfc, run_folder, model_folder, text_file, tmp_path):
    """Clusters of contexts are circuits that every command takes."""
    out, place = tmp_path / "found", ["--model", model_folder, "--saes", run_folder, "--text", text_file]
    small = ["--contexts", 40, "--tokens", 400, "--clusters", 3, "--circuits", 1, "--nodes", 10, "--surprise", 20]
    arguments = ["behaviours", *place, "--out", out, *small]
    result = sfc(*arguments)
    assert result.status == 0, result.err
    data = json.loads((out / "behaviours.json").read_text())
    assert sum(len(one["members"]) for one in data["clusters"]) == data["n_contexts"] == 40
    assert data["clusters"][0]["circuit"] == "cluster_01/circuit" and not (out / "partial").exists()
    assert "open its circuit" in (out / "index.html").read_text()
    assert sfc("render", "--circuit", out / "cluster_01").status == 0
    measured = sfc("faithfulness", "--circuit", out / "cluster_01", "--sizes", 5, "--random", 0, "--ablation", "zero")
    assert measured.status == 0, measured.err
    assert sfc(*arguments).status == 2 and "ended" in sfc(*arguments, "--resume").err
    assert sfc(*arguments, "--overwrite", "--json").status == 0


def test_unknown_method_is_one_sentence(sfc, run_folder, place, tmp_path):
    result = sfc("compare-methods", *place, "--saes", run_folder, "--out", tmp_path, "--methods", "ig,relpp")
    assert result.status == 2 and "relp" in result.err and "Traceback" not in result.err


@pytest.mark.slow
def test_neurons_take_the_place_of_autoencoders(sfc, place, tmp_path):
    """A neuron circuit is found, scored and ablated like any other."""
    run = tmp_path / "run"
    found = sfc("discover", *place, "--saes", "neurons", "--out", run, "--edge-nodes", 20, "--nodes", 10, "--json",
                "--method", "ig-adaptive", "--residual", 0.01)  # fmt: skip
    assert found.status == 0, found.err
    data = json.loads(found.out)
    assert data["saes"] == "neurons" and data["path_nodes"]["embed"] >= 2
    assert data["completeness"]["worst_residual"] <= 0.0101
    assert not any(nodes.is_error.any() for nodes in Circuit.load(run).nodes.values())
    scored = sfc("faithfulness", "--circuit", run, "--sizes", "10,40", "--random", 0, "--json")
    assert scored.status == 0 and len(json.loads(scored.out)["faithfulness"]) == 3  # the last is all nodes
    assert sfc("ablate", "--circuit", run, "--top", 3, "--random", 1).status == 0

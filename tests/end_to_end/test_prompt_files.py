"""Prompt, probe and annotation files that commands read again or that other projects wrote."""

from __future__ import annotations

import json

import pytest

from circuits.circuit import Circuit
from tests.conftest import tiny_hf, word_tokenizer


@pytest.mark.slow
def test_prompts_that_are_no_longer_those_of_the_circuit_are_refused(
    sfc, run_folder, model_folder, prompts_file, tmp_path
):
    prompts, run = tmp_path / "prompts.jsonl", tmp_path / "run"
    prompts.write_text(prompts_file.read_text())
    found = ["--model", model_folder, "--saes", run_folder, "--prompts", prompts, "--out", run, "--examples", 6]
    assert sfc("discover", *found, "--edge-nodes", 10, "--nodes", 10).status == 0
    measure = ["faithfulness", "--circuit", run, "--sizes", 5, "--random", 0, "--resamples", 0]
    assert sfc(*measure).status == 0
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    prompts.write_text("\n".join(json.dumps(row | {"patch_answer": " sees"}) for row in rows))
    refused = sfc(*measure)
    assert refused.status == 2 and "are not those the circuit was found on" in refused.err
    prompts.write_text("\n".join(map(json.dumps, rows)))
    assert sfc(*measure).status == 0
    elsewhere = ["--prompts", prompts_file, "--reference", prompts_file, "--overwrite"]
    prompts.unlink()
    assert sfc(*measure, *elsewhere).status == 0


def test_a_probe_reads_no_other_model_and_no_other_place(sfc, model_folder, run_folder, prompts_file, tmp_path):
    probe = tmp_path / "probe.safetensors"
    rows = [json.loads(line) for line in prompts_file.read_text().splitlines()]
    by_case = tmp_path / "by_case.jsonl"  # the first six have one label alone
    by_case.write_text("\n".join(json.dumps(row) for row in sorted(rows * 2, key=lambda row: row["case"])))
    labelled = ["probe", "--prompts", by_case, "--site", "resid_0", "--out", probe, "--examples", 6]
    assert sfc(*labelled, "--model", model_folder).status == 0
    discover = ["discover", "--saes", "neurons", "--prompts", prompts_file, "--metric", f"probe:{probe}"]
    discover += ["--edge-nodes", 5, "--nodes", 5, "--model", model_folder]
    moved = sfc(*discover, "--out", tmp_path / "a", "--site-paths", "resid=gpt_neox.layers.{layer}.mlp")
    assert moved.status == 2 and "reads resid_0 at its usual place, which is now at" in moved.err
    other = tmp_path / "other"
    tiny_hf("gpt_neox", seed=1).save_pretrained(other)
    word_tokenizer().save_pretrained(other)
    elsewhere = sfc(*discover, "--out", tmp_path / "b", "--model", other)
    assert elsewhere.status == 2 and "was made in another model" in elsewhere.err


@pytest.mark.slow
def test_compare_methods_holds_out_prompts_of_each_case_and_leaves_neurons_out(
    sfc, run_folder, model_folder, prompts_file, tmp_path
):
    """The file has each pair followed by its mirror image."""
    said = sfc(
        "compare-methods", "--model", model_folder, "--saes", run_folder, "--prompts", prompts_file, "--out", tmp_path,
        "--methods", "attrib", "--neurons", "", "--sizes", 10, "--sample", 0, "--resamples", 0, "--json",
    )  # fmt: skip
    assert said.status == 0
    found = json.loads(said.out)
    assert (found["n_train"], found["n_test"]) == (4, 4) and len(found["rows"]) == 1


def test_annotations_as_the_paper_has_them_label_a_drawing(sfc, run_folder, tmp_path):
    circuit = Circuit.load(run_folder)
    name = next(node.name for node in circuit.graph(nodes=5).nodes() if "/" in node.name and "error" not in node.name)
    site, feature = name.split("/")
    component, _, layer = site.partition("_")
    annotated = {"Component": component, "Layer": layer, "Feature": feature, "Name": name, "Annotation": "plural nouns"}
    rows = [{"Component": "embed", "Feature": "9", "Name": "embed/9"}, {key: key for key in annotated}, annotated]
    path, out = tmp_path / "labels.jsonl", tmp_path / "circuit.dot"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert sfc("render", "--circuit", run_folder, "--annotations", path, "--out", out).status == 0
    assert "plural nouns" in out.read_text()
    path.write_text('{"Name": "resid_0/1", "Annotation": 5}\n')
    refused = sfc("render", "--circuit", run_folder, "--annotations", path, "--out", out)
    assert refused.status == 2 and "labels.jsonl, line 1: key 'Annotation' is 5" in refused.err

"""Every command of `sfc` on a tiny model, as a user types it."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

from circuits.attribution.nodes import select_nodes
from circuits.circuit import Circuit
from circuits.cli.commands.edits.edit import AblateCommand
from circuits.cli.common import load_circuit
from graphs.explorer import unpacked
from graphs.feature_graph import FeatureGraph
from sae.saes import load_saes


@pytest.mark.slow
def test_a_run_leaves_the_files_it_should(run_folder):
    assert len(load_saes(run_folder)) == 7
    for name in ("config.json", "saes/training.jsonl", "circuit/circuit.json", "circuit/effects.safetensors"):
        assert (run_folder / name).is_file(), name
    config = json.loads((run_folder / "config.json").read_text())
    assert config["train"]["config"]["features"] == 48 and config["discover"]["options"]["method"] == "ig"
    graph = FeatureGraph.load(run_folder / "circuit" / "circuit.json")
    assert len(graph) == 31
    features = [node for node in graph.nodes() if node.kind == "feature"]
    assert features and all(node.attributes["top_tokens"] is not None for node in features)


@pytest.mark.slow
def test_evaluate(sfc, run_folder, model_folder, text_file):
    result = sfc(
        "evaluate", "--model", model_folder, "--saes", run_folder, "--text", text_file, "--tokens", 500, "--overwrite"
    )
    assert result.status == 0 and "resid_1" in result.out
    data = json.loads((run_folder / "saes" / "evaluation.json").read_text())
    assert data["sites"]["embed"]["l0"] <= 6 and data["sites"]["embed"]["ce_error_kept"] > 0
    assert {"shrinkage", "relative_bias", "density_histogram"} <= set(data["sites"]["embed"])
    assert (run_folder / "saes" / "evaluation.svg").is_file() and "error matters" in result.out


@pytest.mark.slow
def test_evaluate_on_tasks_and_beside_another_seed(sfc, run_folder, model_folder, text_file, tmp_path):
    """The tasks join the numbers on text; other options are told apart, and of tasks only where there are some."""
    texts = tmp_path / "animals.jsonl"
    rows = [{"text": f"the {noun} {word}", "label": noun in ("dog", "cat")} for noun in ("dog", "cat", "man", "king")
            for word in ("runs", "sees", "walks", "sings", "likes")]  # fmt: skip
    texts.write_text("\n".join(map(json.dumps, rows)))
    words = ["evaluate", "--model", model_folder, "--saes", run_folder, "--text", text_file, "--tokens", 100,
             "--skip-errors", "--out", tmp_path / "out"]  # fmt: skip
    tasks = ["--suite", texts, "--suite-sites", "resid_1", "--other", run_folder]
    result = sfc(*words, *tasks)
    assert result.status == 0 and "sparse probing" in result.out and "evaluation.suite.svg" in result.out, result.err
    suite = json.loads((tmp_path / "out" / "evaluation.json").read_text())["suite"]
    assert {entry["site"] for entry in suite["probing"]} == {"resid_1"} and "absorption" in suite["left_out"]
    assert all(entry["similarity"] > 0.999 for entry in suite["stability"]) and len(suite["stability"]) > 3
    assert "--overwrite replaces it" in sfc(*words, *tasks, "--probe-sizes", "3").err
    assert sfc(*words, "--overwrite").status == 0 and not (tmp_path / "out" / "evaluation.suite.svg").exists()
    assert sfc(*words, "--probe-sizes", "3").status == 0  # an option of tasks says nothing where there are none


@pytest.mark.slow
def test_faithfulness_reads_model_and_saes_from_the_circuit(sfc, run_folder, prompts_file):
    result = sfc(
        "faithfulness", "--circuit", run_folder, "--sizes", "5,20", "--start-site", "attn_1", "--json", "--overwrite"
    )
    data = json.loads(result.out)
    assert result.status == 0 and data["sizes"][:2] == [5, 20] and data["start_site"] == "attn_1"
    assert json.loads((run_folder / "circuit" / "faithfulness.json").read_text()) == data
    assert (run_folder / "circuit" / "faithfulness.svg").is_file()
    words = ["faithfulness", "--circuit", run_folder / "circuit", "--prompts", prompts_file, "--ablation", "zero"]
    refused = sfc(*words)
    assert refused.status == 2 and "ablation 'mean', not 'zero'" in refused.err and "--name" in refused.err
    others = sfc(*words, "--name", "zero")
    assert others.status == 0 and "completeness" in others.out
    config = json.loads((run_folder / "config.json").read_text())
    assert config["faithfulness"]["sizes"] == "5,20" and config["faithfulness zero"]["name"] == "zero"


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["svg", "png", "pdf", "dot"])
def test_render(sfc, run_folder, tmp_path, suffix):
    out = tmp_path / "new" / f"circuit.{suffix}"
    result = sfc("render", "--circuit", run_folder, "--out", out, "--nodes", 12, "--edges", 20, "--json")
    assert result.status == 0 and out.stat().st_size > 500
    assert json.loads(result.out)["nodes"] == 12


@pytest.mark.slow
def test_a_circuit_with_few_edge_nodes_is_drawn_by_default(sfc, run_folder, tmp_path):
    """Fewer nodes have edges than `render` draws: all of them are drawn, and no more."""
    circuit = Circuit.load(run_folder)
    few = select_nodes(circuit.nodes, top=5)
    small = replace(circuit, edge_nodes=few, edges={}, edge_intervals={}, edge_cases={})
    small.save(tmp_path / "circuit", graph=small.graph(nodes=5))
    for all_of_them in ([], ["--nodes", "None"]):
        result = sfc("render", "--circuit", tmp_path, "--out", tmp_path / "few.svg", "--json", *all_of_them)
        assert result.status == 0 and json.loads(result.out)["nodes"] == 5


def test_examples_limit_the_prompts_of_the_circuit_too(sfc, run_folder):
    result = sfc(
        "ablate", "--circuit", run_folder, "--top", 2, "--examples", 3, "--random", 0, "--name", "few", "--json"
    )
    assert json.loads(result.out)["n_prompts"] == 3


@pytest.mark.slow
def test_a_new_circuit_leaves_nothing_measured_of_the_old_one(sfc, run_folder, model_folder, prompts_file, tmp_path):
    words = ["--model", model_folder, "--saes", run_folder, "--prompts", prompts_file, "--out", tmp_path]
    words += ["--method", "attrib", "--edge-nodes", 30, "--nodes", 20]
    assert sfc("discover", *words).status == 0
    assert sfc("faithfulness", "--circuit", tmp_path, "--sizes", "5").status == 0
    assert (tmp_path / "circuit" / "faithfulness.json").is_file()
    edit = ["ablate", "--circuit", tmp_path, "--features", "resid_1/3", "--random", 0, "--name", "one"]
    for again in (1, 2):
        assert sfc(*edit).status == 0
        assert sfc("discover", *words, "--overwrite", "--steps", 2).status == 0
        assert not list((tmp_path / "circuit").glob("faithfulness.*")) and not list((tmp_path / "edits").glob("*.json"))
        assert len(list((tmp_path / "edits" / "earlier").glob("one*.json"))) == again


@pytest.mark.slow
def test_a_circuit_is_reopened_in_the_precision_it_was_found_in(sfc, run_folder, model_folder, prompts_file, tmp_path):
    words = ["--model", model_folder, "--saes", run_folder, "--prompts", prompts_file, "--out", tmp_path]
    words += ["--method", "attrib", "--edge-nodes", 0, "--dtype", "bfloat16"]
    assert sfc("discover", *words).status == 0
    assert load_circuit(AblateCommand(circuit=tmp_path)).model.dtype == torch.bfloat16
    assert load_circuit(AblateCommand(circuit=tmp_path, dtype="float32")).model.dtype == torch.float32
    assert load_circuit(AblateCommand(circuit=run_folder)).model.dtype == torch.float32


@pytest.mark.slow
def test_user_site_paths_hold_for_all_commands(sfc, model_folder, text_file, prompts_file, tmp_path):
    """Hidden neurons of the MLP, of another width than its output: later commands take the paths from the circuit."""
    paths = ["--site-paths", "mlp=gpt_neox.layers.{layer}.mlp.dense_4h_to_h:input"]
    train = ["--features", 24, "--k", 4, "--tokens", 4000, "--context-length", 16]
    words = ["--model", model_folder, "--out", tmp_path, *paths]
    assert sfc("train", *words, "--text", text_file, *train, "--sites", "mlp,resid").status == 0
    found = sfc("discover", *words, "--saes", tmp_path, "--prompts", prompts_file, "--edge-nodes", 30, "--json")
    assert json.loads(found.out)["kept"]["nodes"] == 30  # no more than have edges
    assert sfc("ablate", "--circuit", tmp_path, "--top", 2, "--random", 1).status == 0


@pytest.mark.slow
def test_render_with_another_threshold_and_annotations(sfc, run_folder, tmp_path):
    """More nodes than circuit.json holds are drawn from effects.safetensors, without the model."""
    names = Circuit.load(run_folder).strongest_features(1)
    (tmp_path / "notes.jsonl").write_text(json.dumps({"Name": names[0], "Annotation": "singular nouns"}))
    out = tmp_path / "circuit.svg"
    result = sfc(
        "render", "--circuit", run_folder, "--out", out, "--nodes", 50, "--annotations", tmp_path / "notes.jsonl",
        "--json"
    )  # fmt: skip
    assert json.loads(result.out)["nodes"] == 50
    assert "singular" in out.read_text()


def test_explore(sfc, run_folder):
    assert sfc("explore", "--circuit", run_folder, "--compare", run_folder).status == 0
    page = (run_folder / "graph" / "circuit.html").read_text()
    assert "<html" in page and "https://" not in page.replace("https://arxiv.org", "").replace("http://www.w3.org", "")
    assert unpacked(page)["comparison"]["only_nodes"] == []


@pytest.mark.slow
def test_ablate_steer_and_report(sfc, run_folder, text_file):
    result = sfc(
        "ablate", "--circuit", run_folder, "--top", 3, "--text", text_file, "--texts", 5, "--generate", 1, "--json"
    )
    data = json.loads(result.out)
    assert result.status == 0 and len(data["features"]) == 3 and len(data["random"]) == 5
    assert (run_folder / "edits" / "mean_top3.json").is_file()
    name = data["features"][0]
    steered = sfc("steer", "--circuit", run_folder, "--features", name, "--value", 2, "--random", 1, "--name", "push")
    assert steered.status == 0 and (run_folder / "edits" / "push.json").is_file()
    mean = sfc("ablate", "--circuit", run_folder, "--features", name, "--operation", "mean", "--random", 0)
    assert mean.status == 0
    assert sfc("report", "--circuit", run_folder).status == 0
    page = (run_folder / "report.html").read_text()
    assert (name in page and "zero_top3" in page) or "zero" in page


@pytest.mark.slow
def test_discover_by_position_with_another_method(sfc, run_folder, model_folder, prompts_file, tmp_path):
    result = sfc(
        "discover", "--model", model_folder, "--saes", run_folder, "--prompts", prompts_file, "--out", tmp_path / "pos",
        "--aggregation", "position", "--method", "attrib", "--node-threshold", "0.001", "--edge-threshold", "0.001",
        "--sites", "resid,mlp_1",
    )  # fmt: skip
    assert result.status == 0 and "sum check" in result.out
    graph = FeatureGraph.load(tmp_path / "pos" / "circuit" / "circuit.json")
    assert graph.sites == ["resid_0", "mlp_1", "resid_1"]
    assert all(abs(node.effect) > 0.001 and node.position is not None for node in graph.nodes() if node.id != "metric")
    assert sfc("render", "--circuit", tmp_path / "pos").status == 0


def test_help_has_every_option_explained(sfc):
    result = sfc("discover", "--help")
    assert result.status == 0 and "Quadrature nodes of ig" in result.out
    assert sfc("--help").status == 0


@pytest.mark.slow
def test_a_circuit_by_span_from_a_template(sfc, run_folder, model_folder, prompts_file, tmp_path):
    """Prompts of two lengths: found, kept, masked, tested by edges, drawn, exported and reported by the name of the
    span.
    """
    rows = [json.loads(line) for line in prompts_file.read_text().splitlines()]
    for row in rows[::2]:
        row |= {side: row[side].replace("the ", "the old ", 1) for side in ("clean_prefix", "patch_prefix")}
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--model", model_folder, "--saes", run_folder, "--out", tmp_path, "--prompts", tmp_path / "mixed.jsonl"]
    words += ["--aggregation", "spans", "--edge-nodes", 40, "--nodes", 30, "--verify", 4, "--steps", 2]
    refused = sfc("discover", *words)
    assert refused.status == 2 and "spans" in refused.err
    found = sfc("discover", *words, "--span-template", "the {subject} near the {attractor}")
    strongest = found.out.partition("the strongest:\n")[2].splitlines()[0]
    assert re.match(r"  \w+/\w+@\w+ +[+-][\d.]+  (singular|plural|both)? +\S", strongest), strongest
    assert found.status == 0 and "@subject" in found.out
    sizes = ("--sizes", "5,20", "--edges", "--edge-sizes", "20", "--random", 1)
    measured = sfc("faithfulness", "--circuit", tmp_path, *sizes, "--json")
    assert measured.status == 0 and json.loads(measured.out)["n_uncovered"] == 0
    pooled = sfc(
        "faithfulness", "--circuit", tmp_path, "--sizes", 5, "--ablation", "mean-pooled", "--random", 0, "--overwrite"
    )
    assert pooled.status == 0 and "mean-pooled" in pooled.out
    masked = sfc("mask", "--circuit", tmp_path, "--steps", 2, "--smallest", 3, "--sizes", "5")
    assert masked.status == 0
    title = explain_attention(sfc, tmp_path)
    for command in (["render", "--out", tmp_path / "c.svg"], ["explore"], ["report"]):
        assert sfc(command[0], "--circuit", tmp_path, *command[1:]).status == 0
    assert ">subject</text>" in (tmp_path / "c.svg").read_text()
    assert (tmp_path / "report.html").read_text().count(f"<h3>{title}</h3>") == 2
    for name in ("graphml", "neuronpedia", "eap-ig", "circuit-tracer"):
        assert sfc("export", "--circuit", tmp_path, "--format", name).status == 0
    exported = json.loads((tmp_path / "graph" / "circuit.neuronpedia.json").read_text())
    traced = [node["qk_tracing_results"] for node in exported["nodes"] if "qk_tracing_results" in node]
    ids = {node["node_id"] for node in exported["nodes"]} | {*exported["qk_only_nodes"]}
    assert traced and all({*pair[:2]} <= ids for pair in traced[0]["pair_wise_contributors"])


def explain_attention(sfc, run) -> str:
    """Explain the heads that carry most, then one of them by name; what its score is called."""
    data = json.loads(sfc("attention", "--circuit", run, "--edges", 6, "--scores", 2, "--json").out)
    assert data == json.loads((run / "circuit" / "attention.json").read_text()) and data["loadings"]["edges"]
    score = data["scores"][0]
    options = ["--query", score["query"], "--key", score["key"], "--layer", score["layer"], "--head", score["head"]]
    asked = sfc("attention", "--circuit", run, *options, "--name", "asked")
    assert asked.status == 0 and f"{score['title']}: score {score['score']:+.3f}" in asked.out
    return score["title"]


@pytest.mark.slow
def test_a_probe_is_learned_and_explained(sfc, run_folder, model_folder, prompts_file, tmp_path):
    """From labelled prompts to a circuit of the probe's margin, its faithfulness and an edit."""
    out = tmp_path / "number.safetensors"
    words = ["--model", model_folder, "--prompts", prompts_file]
    learn = ["probe", *words, "--site", "resid_0", "--out", out, "--span-template", "the {subject} near the {thing}"]
    result = sfc(*learn, "--position", "subject", "--json")
    assert result.status == 0 and json.loads(result.out)["classes"] == ["plural", "singular"]
    assert sfc(*learn, "--position", "verb").status == 2
    words += ["--saes", run_folder, "--out", tmp_path, "--edge-nodes", 20, "--nodes", 10, "--steps", 2]
    words += ["--metric", f"probe-margin:{out}"]
    refused = sfc("discover", *words)
    assert refused.status == 2 and "says nothing of spans" in refused.err
    found = sfc("discover", *words, "--span-template", "the {subject} near the {thing}", "--json")
    assert found.status == 0 and json.loads(found.out)["sites"] == ["embed", "attn_0", "mlp_0", "resid_0"]
    measured = sfc("faithfulness", "--circuit", tmp_path, "--sizes", "5", "--edges", "--edge-sizes", "20")
    assert measured.status == 0
    edited = sfc("ablate", "--circuit", tmp_path, "--top", 2, "--random", 1, "--json")
    assert edited.status == 0 and json.loads(edited.out)["metric"] == "margin, logit of probe number"

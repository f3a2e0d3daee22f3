"""Contexts out for any labeller, names and scores back; delphi's cache and results."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from circuits.circuit import Circuit
from graphs.formats.neuronpedia import to_neuronpedia
from sae.errors import UserError
from sae.features.delphi import write_delphi_cache
from sae.model.load import load_model
from sae.model.tokens import Tokens
from sae.saes import load_saes


@pytest.fixture
def run(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / "run" / "saes" / "labels.jsonl").unlink(missing_ok=True)
    return tmp_path / "run"


@pytest.mark.slow
def test_contexts_go_out_and_names_with_scores_come_back(sfc, run, tmp_path):
    file = tmp_path / "contexts.jsonl"
    assert sfc("labels", "--circuit", run, "--contexts", file).status == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(line["label"] is None and isinstance(line["feature"], int) for line in lines)
    assert any("<<" in context["text"] for line in lines for context in line["contexts"])
    assert [abs(line["effect"]) for line in lines] == sorted((abs(line["effect"]) for line in lines), reverse=True)
    empty = sfc("labels", "--circuit", run, "--read", file)
    assert empty.status == 2 and "no line has an annotation" in empty.err
    lines[0] |= {"label": "plural nouns", "score": 0.875}
    file.write_text("\n".join(map(json.dumps, lines)))
    name = f"{lines[0]['site']}/{lines[0]['feature']}"
    words = ["labels", "--circuit", run, "--read", file, "--by", "a model", "--automatic", "--json"]
    first = json.loads(sfc(*words).out)["labels"]
    assert first[name]["score"] == 0.875 and first[name]["automatic"] and list(first) == [name]
    before = (run / "saes" / "labels.jsonl").read_text()
    assert json.loads(sfc(*words).out)["labels"] == first
    lines[0]["score"] = 0.5
    file.write_text("\n".join(map(json.dumps, lines)))
    assert "score 0.50" in sfc(*words[:-1]).out
    assert (run / "saes" / "labels.jsonl").read_text() != before
    again = sfc("labels", "--circuit", run, "--contexts", file)
    assert again.status == 0  # its own file
    file.write_text("mine")
    assert sfc("labels", "--circuit", run, "--contexts", file).status == 2 and file.read_text() == "mine"
    lines[0]["score"] = "good"
    file.write_text(json.dumps(lines[0]))
    wrong = sfc("labels", "--circuit", run, "--read", file)
    assert wrong.status == 2 and "key 'score' is \"good\"" in wrong.err


def test_a_program_names_features_and_another_scores_the_names(sfc, run, tmp_path):
    name = tmp_path / "name.py"
    name.write_text("import sys, json\nfor line in sys.stdin: print(json.loads(line)['site'], 'thing')")
    words = ["labels", "--circuit", run, "--feature", "resid_1/3", "--label", "mine"]
    named = sfc(*words, "--explain", f"{sys.executable} {name}", "--json")
    labels = json.loads(named.out)["labels"]
    assert labels["resid_1/3"]["label"] == "mine" and len(labels) > 3
    assert all(
        line["label"].endswith(" thing") and line["automatic"] for key, line in labels.items() if key != "resid_1/3"
    )
    shutil.rmtree(run / "features", ignore_errors=True)
    judged = sfc("labels", "--circuit", run, "--score", "/no/such/program")
    assert f"0 of {len(labels)} names scored" in judged.out and "sfc features --samples 20" in judged.out


def test_names_come_from_a_viewer_and_from_delphi(sfc, run, tmp_path):
    graph = Circuit.load(run).graph(nodes=20)
    data = to_neuronpedia(graph)
    node = next(item for item in data["nodes"] if item["feature_type"] == "cross layer transcoder")
    name = node["sparse_feature_circuit"]["id"]
    data["qParams"]["clerps"] = json.dumps([[str(node["feature"]), "named in a viewer"]])
    (tmp_path / "saved.json").write_text(json.dumps(data))
    read = sfc("labels", "--circuit", run, "--read", tmp_path / "saved.json", "--json")
    assert json.loads(read.out)["labels"][name]["label"] == "named in a viewer"
    other = next(n.name for n in graph.nodes() if n.kind == "feature" and n.name != name)
    for folder in ("explanations", "scores"):
        (tmp_path / folder).mkdir()
    file = f"{other.replace('/', '_latent')}.txt"
    (tmp_path / "explanations" / file).write_text(json.dumps("Names of animals."))
    (tmp_path / "scores" / file).write_text(json.dumps([{"correct": True}, {"correct": False}, {"correct": None}]))
    words = ["labels", "--circuit", run, "--read", tmp_path / "explanations"]
    read = json.loads(sfc(*words, "--scores", tmp_path / "scores", "--json").out)["labels"][other]
    assert (read["label"], read["score"]) == ("Names of animals.", 0.5)
    (tmp_path / "explanations" / file).write_text("{")
    assert "not the JSON of an explanation" in sfc(*words).err
    (tmp_path / "explanations" / file).unlink()
    assert "holds no results of delphi" in sfc(*words).err
    assert sfc("labels", "--circuit", run, "--scores", tmp_path / "scores").status == 2


@pytest.mark.slow
def test_delphis_cache_has_every_activation(sfc, run, model_folder, text_file, tmp_path):
    out, length = tmp_path / "cache", 8
    words = ["export", "--circuit", run, "--format", "delphi", "--out", out, "--tokens", 400]
    done = sfc(*words, "--text", text_file, "--context-length", length, "--json")
    assert done.status == 0, done.err
    circuit, model = Circuit.load(run), load_model(str(model_folder), device="cpu")
    saes, features = load_saes(run, device="cpu"), circuit.features_with_edges()
    assert sorted(path.name for path in out.iterdir()) == sorted(site.name for site in features)
    for site in list(features)[:2]:
        config = json.loads((out / site.name / "config.json").read_text())
        assert config["cache_ctx_len"] == length and config["n_tokens"] <= 400 and config["model_name"] == model.name
        total = torch.zeros(0)
        for path in sorted((out / site.name).glob("*.safetensors")):
            first, last = map(int, path.stem.split("_"))
            state = load_file(path)
            tokens = state["tokens"]
            run_ = model.run(Tokens(tokens, torch.ones_like(tokens)), capture=[site])
            f = saes[site].encode(run_.activations[site])[..., first : last + 1]
            wanted = [i - first for i in features[site] if first <= i <= last]
            expected = torch.zeros_like(f)
            expected[..., wanted] = f[..., wanted]
            row, position, feature = state["locations"].long().T
            there = torch.zeros_like(f).index_put((row, position, feature), state["activations"].float())
            assert torch.allclose(there, expected, atol=2e-3 * float(f.max()) + 1e-5)
            total = torch.cat([total, state["activations"].float()])
        assert len(total)
    assert sfc(*words, "--text", text_file).status == 2  # the folder holds something
    assert "give --text" in sfc(*words).err
    short = tmp_path / "short.txt"
    short.write_text("the man")
    words[words.index(out)] = tmp_path / "other"
    assert "fewer than one row of 8" in sfc(*words, "--text", short, "--context-length", length).err
    assert "only format delphi reads it" in sfc("export", "--circuit", run, "--format", "graphml", "--text", "x").err
    text = "the man sees the old dog " * 9  # one document of several rows
    written = write_delphi_cache(model, saes, [text], tmp_path / "all", length=8)
    n = json.loads((written / next(iter(saes)).name / "config.json").read_text())["n_tokens"]
    assert n == len(model.tokenizer(text)["input_ids"]) // 8 * 8 > 8
    with pytest.raises(UserError, match="takes 64 at most"):
        write_delphi_cache(model, saes, [text] * 9, tmp_path / "long", length=65)
    assert "no folder" in sfc("labels", "--circuit", run, "--read", short, "--scores", tmp_path / "none").err

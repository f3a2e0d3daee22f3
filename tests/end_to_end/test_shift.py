"""A probe is debiased from the command line: the circuit is found once, and results keep their options."""

from __future__ import annotations

import json
from itertools import product

import pytest


@pytest.fixture(scope="module")
def labelled_file(tmp_path_factory):
    nouns = {"singular": ["man", "boy", "king"], "plural": ["men", "boys", "kings"]}
    rows = [
        {
            "text": f"the {a} near the {b}",
            "intended": first,
            "spurious": second,
            "template": "the {subject} near the {other}",
        }
        for first, second in product(nouns, repeat=2)
        for a, b in product(nouns[first], nouns[second])
    ]
    path = tmp_path_factory.mktemp("labelled") / "labelled.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.slow
def test_a_probe_is_debiased(sfc, run_folder, model_folder, labelled_file, tmp_path):
    out, drop = tmp_path / "out", tmp_path / "drop.txt"
    words = ["shift", "--model", model_folder, "--saes", run_folder, "--data", labelled_file, "--test", labelled_file,
             "--position", "last", "--site", "resid_1", "--sites", "resid", "--method", "attrib", "--random", 1,
             "--out", out]  # fmt: skip
    first = sfc(*words)
    assert first.status == 0 and "features to judge" in first.out and (out / "circuit" / "shift.svg").is_file(), (
        first.err
    )
    effects = out / "circuit" / "effects.safetensors"
    found = effects.stat().st_mtime_ns
    name = json.loads((out / "circuit" / "shift.json").read_text())["features"][0]["feature"]
    assert name.partition("@")[2] in ("other", "first", "last") and sfc("report", "--circuit", out).status == 0
    of_circuit = json.loads((out / "circuit" / "circuit.json").read_text())["metadata"]
    alone = sfc("faithfulness", "--circuit", out, "--sizes", 5, "--random", 0, "--json")  # on the texts it was found on
    assert json.loads(alone.out)["n_prompts"] == of_circuit["n_examples"], alone.err
    edited = sfc("ablate", "--circuit", out, "--top", 2, "--random", 0, "--json")
    assert edited.status == 0 and json.loads(edited.out)["before"]["overall"]["accuracy"] is None, edited.err
    assert json.loads(edited.out)["before"]["overall"]["metric"] == pytest.approx(of_circuit["m_clean"], rel=1e-3)
    few = ("--nodes", 5, "--removed", 3, "--verify", 3, "--resamples", 20)
    validated = sfc("validate", "--circuit", out, *few)
    assert validated.status == 0 and "exact: " in validated.out, validated.err
    without = sfc("faithfulness", "--circuit", out, "--edges", "--name", "edges")
    assert without.status == 2 and "no edges" in without.err
    drop.write_text(name)
    refused = sfc(*words, "--drop", drop)
    assert refused.status == 2 and "drop None, not 'drop.txt" in refused.err and "--name gives" in refused.err
    judged = sfc(*words, "--drop", drop, "--name", "judged", "--json")
    assert json.loads(judged.out)["dropped"] == [name] and effects.stat().st_mtime_ns == found
    assert json.loads((out / "circuit" / "shift_judged.json").read_text())["judge"] == "list"
    another = sfc(*words, "--name", "more", "--penalty", 2)
    assert another.status == 2 and "the circuit of another probe (penalty 1.0, not 2.0)" in another.err
    elsewhere = sfc(*words[:-1], run_folder)
    assert elsewhere.status == 2 and "holds another circuit" in elsewhere.err
    moved = sfc("faithfulness", "--circuit", out.rename(tmp_path / "moved"), "--sizes", 5, "--random", 0, "--json")
    assert json.loads(moved.out)["faithfulness"] == json.loads(alone.out)["faithfulness"], moved.err


@pytest.mark.slow
def test_targeted_probes(sfc, run_folder, model_folder, labelled_file, tmp_path):
    rows = [json.loads(line) for line in labelled_file.read_text().splitlines()]
    for row in rows:
        row["label"] = row["text"].split()[1]
    path = tmp_path / "classes.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    words = ["tpp", "--model", model_folder, "--saes", run_folder, "--data", path, "--test", path, "--sizes", "1,2"]
    result = sfc(*words, "--out", tmp_path / "tpp.json")
    assert result.status == 0 and "on_target" in result.out and sfc(*words, "--out", tmp_path / "tpp.json").status == 0
    assert set(json.loads((tmp_path / "tpp.json").read_text())["tpp"]) == {"1", "2"}
    assert "three classes" in sfc(*words, "--classes", "man,men").err

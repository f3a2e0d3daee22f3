"""Edits from the command line: files, chosen features, strengths, and a suite of behaviours."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import yaml

from circuits.circuit import Circuit
from circuits.cli.commands.edits.edit import AblateCommand
from circuits.editing.declaration import Edit, load_edits, save_edits
from circuits.editing.measures import answers_of
from circuits.editing.suite import Suite


@pytest.mark.slow
def test_an_edit_is_made_again_from_its_report(sfc, run_folder, text_file):
    common = ["--circuit", run_folder, "--text", text_file, "--texts", 5, "--random", 0, "--json"]
    first = json.loads(
        sfc("ablate", *common, "--top", 2, "--scales", "0,1,2", "--freeze", "attention", "--name", "first").out
    )
    path = run_folder / "edits" / "first.json"
    assert load_edits(path)[0].operation == "mean" and len(load_edits(path)[0].reference) == 2
    assert load_edits(path)[0].freeze == "attention"
    again = json.loads(sfc("ablate", *common, "--edit", path, "--name", "again").out)
    assert again["after"] == first["after"] and [dose["scale"] for dose in first["doses"]] == [0, 1, 2]
    assert sfc("report", "--circuit", run_folder).status == 0
    assert "CE elsewhere" in (run_folder / "report.html").read_text()
    wrong = sfc("ablate", *common, "--top", 2, "--scales", "0,much")
    assert wrong.status == 2 and "scales '0,much'" in wrong.err


def test_options_that_would_change_nothing_are_refused(sfc, run_folder, text_file, tmp_path):
    path = save_edits(Edit("resid_0/1", "steer", 2.0), tmp_path / "edit.json")
    choose = ["--choose", "surgical", "--text", text_file]
    for words, unused in (
        (["ablate", "--edit", path, "--where", "generated"], "--edit says .* leave out --where"),
        (["ablate", "--edit", path, "--operation", "zero"], "leave out --operation"),
        (["steer", "--edit", path, "--value", 3], "leave out --value"),
        (["ablate", *choose, "--where", "active"], "--choose says .* leave out --where"),
        (["ablate", "--top", 1, "--penalty", 1], "--penalty is of --choose surgical"),
        (["ablate", "--features", "resid_0/1@last", "--where", "generated"], "resid_0/1@last is of tokens of prompts"),
    ):
        result = sfc(*words, "--circuit", run_folder)
        assert result.status == 2 and re.search(unused, result.err), result.err
    words = [
        "ablate",
        "--circuit",
        run_folder,
        "--features",
        "resid_0/1@last,resid_0/1@3",
        "--everywhere",
        "--random",
        0,
    ]
    result = sfc(*words, "--where", "prompt", "--operation", "zero", "--json")
    assert [edit["features"] for edit in json.loads(result.out)["edits"]] == [["resid_0/1"]]
    assert json.loads(result.out)["edits"][0]["where"] == "prompt"


@pytest.mark.slow
def test_other_text_does_without_the_circuits_own_prompts(sfc, run_folder, text_file, prompts_file, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    content = json.loads((run / "circuit" / "circuit.json").read_text())
    content["metadata"]["prompts"] = str(tmp_path / "moved.jsonl")
    (run / "circuit" / "circuit.json").write_text(json.dumps(content))
    words = ["ablate", "--circuit", run, "--top", 1, "--random", 0, "--text", text_file, "--texts", 5]
    assert "moved.jsonl" in sfc(*words).err
    result = sfc(*words, "--prompts", prompts_file)
    assert result.status == 0 and "elsewhere" in result.out, result.err
    for folder in (run, run_folder):
        command = AblateCommand(circuit=folder, prompts=prompts_file)
        assert command._answers(Circuit.load(folder)) == answers_of(Circuit.load(run_folder).prompts) != []


@pytest.mark.slow
def test_features_are_chosen(sfc, run_folder, text_file):
    words = ["ablate", "--circuit", run_folder, "--choose", "surgical", "--penalty", "0.01", "--random", 1]
    chosen = sfc(*words, "--text", text_file, "--texts", 5)
    assert chosen.status == 0 and "in the order of choice" in chosen.out and "zeroing the ten strongest" in chosen.out
    data = json.loads((run_folder / "edits" / "surgical.json").read_text())
    flip = sfc(
        "steer", "--circuit", run_folder, "--choose", "flip", "--text", text_file, "--texts", 5, "--random", 0, "--json"
    )
    assert flip.status == 0 and json.loads(flip.out)["edits"][0]["strength"] > 1, flip.err
    wrong = sfc("steer", "--circuit", run_folder, "--choose", "surgical", "--text", text_file)
    assert wrong.status == 2 and "here it can be flip" in wrong.err
    assert data["choice"]["features"] == data["edits"][0]["features"] and data["is_surgical"] in (True, False)
    assert "--text" in sfc(*words).err


@pytest.mark.parametrize("cases", [("one", "one"), ("one", "other")])
def test_wrong_answers_are_no_behaviour_and_reversed_ones_not_gone(tiny_model, tmp_path, cases):
    """Of two prompts both answers are wrong."""
    texts = ["the man near the dogs", "the women near a cat"]
    logits = [tiny_model.run(tiny_model.tokenize_prompts([text]), last_only=True).logits[0, -1] for text in texts]
    rows = []
    for text, case, of_prompt in zip(texts, cases, logits, strict=True):
        best, worst = (int(ids[0]) for ids in (of_prompt.topk(1).indices, of_prompt.topk(1, largest=False).indices))
        rows.append({"clean_prefix": text, "clean_answer": worst, "patch_answer": best, "case": case})
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expect = {"accuracy": "<= 0", "logit_difference": ">= 1"}
    behaviours = [{"name": "wrong", "prompts": str(prompts), "expect": expect}]
    behaviours.append({"name": "gone", "prompts": str(prompts), "expect": {"logit_difference": "<= 1"}})
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump({"model": "tiny", "behaviours": behaviours}))
    checks = list(Suite.load(suite).run(tiny_model, None))
    assert [check.passed for check in checks] == [True, False, False]
    assert checks[1].value < -1 < 1 < checks[2].value


def test_a_suite_passes_or_fails_line_by_line(sfc, run_folder, model_folder, prompts_file, tmp_path):
    edit = tmp_path / "edit.json"
    steered = {"features": ["resid_1/3"], "operation": "steer", "value": 1.0}
    edit.write_text(json.dumps({"schema_version": 1, "kind": "edits", "edits": [steered]}))
    behaviours = [
        {"name": "some are right", "prompts": str(prompts_file), "expect": {"accuracy": 0, "worst_accuracy": ">= 0"}},
        {"name": "edited", "prompts": str(prompts_file), "edit": "edit.json", "expect": {"left": "> 1000"}},
    ]
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump({"model": str(model_folder), "saes": str(run_folder), "behaviours": behaviours}))
    failed = sfc("test", suite)
    assert failed.status == 1 and failed.out.count("pass  some are right") == 2
    assert "FAIL  edited: left" in failed.out and "2 of 3 passed" in failed.out
    suite.write_text(yaml.safe_dump({"model": str(model_folder), "behaviours": behaviours[:1]}))
    passed = sfc("test", suite, "--json")
    assert passed.status == 0 and json.loads(passed.out)["passed"]
    for change, message in (({"expct": {}}, "unknown key 'expct'"), ({"expect": {"accuracy": "good"}}, "'good'"),
                            ({"expect": {"acuracy": 1}}, "unknown quantity 'acuracy'")):  # fmt: skip
        suite.write_text(yaml.safe_dump({"model": str(model_folder), "behaviours": [{**behaviours[0], **change}]}))
        wrong = sfc("test", suite)
        assert wrong.status == 2 and message in wrong.err
    for change, message in (({"behaviours": []}, "behaviours is empty"), ({"texts": -1}, "'texts' is -1"),
                            ({"texst": 1}, "unknown key 'texst'"),
                            ({"behaviours": [{**behaviours[0], "expect": {}}]}, "expect is empty"),
                            ({"behaviours": [{**behaviours[0], "examples": 0}]}, "examples' is 0")):  # fmt: skip
        suite.write_text(yaml.safe_dump({"model": str(model_folder), "behaviours": behaviours[:1], **change}))
        wrong = sfc("test", suite)
        assert wrong.status == 2 and message in wrong.err
    for text in ("[" * 3000, f"model: {'9' * 5000}", "model: &a [x]\nbehaviours: [*a, *a]", "behaviours: {", "\x07"):
        suite.write_text(text)
        wrong = sfc("test", suite)
        assert wrong.status == 2 and "suite.yaml" in wrong.err and "Traceback" not in wrong.err
        assert ("aliases" in wrong.err) == ("&a" in text)

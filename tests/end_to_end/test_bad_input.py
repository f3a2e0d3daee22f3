"""A mistake ends with status 2 and one sentence that names the value and the way out; nothing made before is lost."""

from __future__ import annotations

import gzip
import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from sae.training.trainer import Trainer
from tests.conftest import tiny_hf, word_tokenizer


def sentence(result) -> str:
    """The one line on standard error that begins with `sfc:`; fails on a traceback or on another status than 2."""
    assert result.status == 2, result.err
    assert "Traceback" not in result.err and result.out == ""
    lines = [line for line in result.err.replace("\r", "\n").splitlines() if line.startswith("sfc:")]
    assert len(lines) == 1, result.err
    return lines[0]


@pytest.fixture
def discover(sfc, run_folder, model_folder, prompts_file, tmp_path):
    """Discover with some options replaced."""

    def run(**changes):
        options = {"model": model_folder, "saes": run_folder, "prompts": prompts_file, "out": tmp_path / "out"}
        options |= changes
        return sfc("discover", *(word for key, value in options.items() for word in (f"--{key}", value)))

    return run


@pytest.mark.slow
def test_unknown_model(discover, tmp_path):
    assert "no/such-model" in sentence(discover(model="no/such-model"))
    assert str(tmp_path / "nothing") in sentence(discover(model=tmp_path / "nothing"))


@pytest.mark.slow
def test_unknown_site(discover):
    said = sentence(discover(sites="resd_1"))
    assert "'resd_1'" in said and "resid_1" in said


@pytest.mark.parametrize(("name", "nearest"), [("resd_1/3", "resid_1"), ("resid_1/4800", "47"), ("resid_1", "/")])
def test_unknown_feature(sfc, run_folder, name, nearest):
    said = sentence(sfc("ablate", "--circuit", run_folder, "--features", name))
    assert name.split("/")[0] in said and nearest in said


def test_saes_of_another_model(discover, run_folder, tmp_path):
    shutil.copytree(run_folder / "saes", tmp_path / "saes")
    path = tmp_path / "saes" / "mlp_0" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_fingerprint": "0123456789abcdef"}))
    assert "mlp_0" in sentence(discover(saes=tmp_path / "saes"))


def test_saes_of_another_width(sfc, run_folder, text_file, tmp_path, prompts_file):
    tiny_hf("gpt_neox", width=16).save_pretrained(tmp_path / "narrow")
    word_tokenizer().save_pretrained(tmp_path / "narrow")
    shutil.copytree(run_folder / "saes", tmp_path / "saes")
    for path in (tmp_path / "saes").glob("*/config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_fingerprint": ""}))
    said = sentence(sfc("evaluate", "--model", tmp_path / "narrow", "--saes", tmp_path / "saes", "--text", text_file))
    assert "32" in said and "16" in said


def test_damaged_autoencoders(discover, run_folder, tmp_path):
    """Cut short, not finite, and with a config that is none: each time the site or the file is named."""
    shutil.copytree(run_folder / "saes", tmp_path / "saes")
    weights, config = (tmp_path / "saes" / "mlp_0" / name for name in ("sae.safetensors", "config.json"))
    whole, known = weights.read_bytes(), config.read_text()
    weights.write_bytes(whole[: len(whole) // 2])
    assert str(weights) in sentence(discover(saes=tmp_path / "saes"))
    weights.write_bytes(whole)
    tensors = load_file(weights)
    tensors["W_enc"][0, 0] = float("nan")
    save_file(tensors, weights)
    said = sentence(discover(saes=tmp_path / "saes"))
    assert str(weights) in said and "'W_enc' holds numbers that are not finite" in said
    save_file(tensors | {"W_enc": tensors["W_enc"][0]}, weights)
    assert "'W_enc' has shape [32], expected [48, 32]" in sentence(discover(saes=tmp_path / "saes"))
    weights.write_bytes(whole)
    for text, reason in (
        ("[]", "expected an object"),
        (known.replace("48", '"48"'), "key 'n_features' is \"48\""),
        ('{"schema_version": 1}', "is missing"),
        (known[:-20], "malformed"),
    ):
        config.write_text(text)
        said = sentence(discover(saes=tmp_path / "saes"))
        assert str(config) in said and reason in said


def test_no_saes(discover, tmp_path):
    assert str(tmp_path) in sentence(discover(saes=tmp_path))


def rows(prompts_file) -> list[dict]:
    return [json.loads(line) for line in prompts_file.read_text().splitlines()]


@pytest.mark.slow
def test_unusable_prompts_are_skipped_and_counted(discover, prompts_file, tmp_path):
    made = rows(prompts_file)
    made[0]["clean_prefix"] += " girl"
    made[1]["clean_answer"] = " runs run"
    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, made)))
    result = discover(prompts=tmp_path / "some.jsonl")
    assert result.status == 0
    assert "6 pairs" in result.out
    assert "1 (clean and patch differ" in result.out and "1 (answer is not one token" in result.out


def test_no_usable_prompt_left(discover, prompts_file, tmp_path):
    made = [row | {"clean_answer": " runs run"} for row in rows(prompts_file)]
    (tmp_path / "none.jsonl").write_text("\n".join(map(json.dumps, made)))
    assert "8 x answer is not one token" in sentence(discover(prompts=tmp_path / "none.jsonl"))


def test_empty_prompts_and_text(sfc, discover, model_folder, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl" in sentence(discover(prompts=tmp_path / "empty.jsonl"))
    (tmp_path / "empty.txt").write_text("\n\n")
    said = sentence(sfc("train", "--model", model_folder, "--text", tmp_path / "empty.txt", "--out", tmp_path / "run"))
    assert "empty" in said


def test_malformed_line_is_located(discover, prompts_file, tmp_path):
    lines = prompts_file.read_text().splitlines()
    lines[2] = lines[2][:-5]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    said = sentence(discover(prompts=tmp_path / "bad.jsonl"))
    assert "bad.jsonl" in said and "3" in said


def test_nan_names_the_site(sfc, model_folder, text_file, tmp_path):
    shutil.copytree(model_folder, tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["gpt_neox.layers.1.mlp.dense_4h_to_h.bias"][0] = float("nan")
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    said = sentence(sfc("train", "--model", tmp_path / "broken", "--text", text_file, "--out", tmp_path / "run"))
    assert "mlp_1" in said


def test_existing_output_is_refused_and_untouched(sfc, discover, run_folder, model_folder, text_file):
    before = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*") if path.is_file()}
    assert "overwrit" in sentence(discover(out=run_folder))
    said = sentence(sfc("train", "--model", model_folder, "--text", text_file, "--out", run_folder))
    assert "overwrit" in said and str(run_folder) in said
    assert before == {path: path.stat().st_mtime_ns for path in run_folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_interrupted_training_leaves_its_checkpoint(sfc, model_folder, text_file, tmp_path, monkeypatch):
    arguments = [
        "train", "--model", model_folder, "--text", text_file, "--out", tmp_path / "run", "--features", 32, "--k", 4,
        "--tokens", 20_000, "--sites", "resid_0", "--context-length", 16, "--json",
    ]  # fmt: skip
    step = Trainer._one_step

    def interrupted(self):
        if self.step == 30:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(Trainer, "_one_step", interrupted)
    result = sfc(*arguments)
    assert result.status == 130 and "Traceback" not in result.err
    assert any((tmp_path / "run" / "checkpoints").iterdir())
    monkeypatch.setattr(Trainer, "_one_step", step)
    assert sfc(*arguments, "--resume").status == 0
    assert (tmp_path / "run" / "saes" / "resid_0" / "sae.safetensors").is_file()


def test_places_that_cannot_be_written(sfc, discover, run_folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert "folder" in sentence(discover(out=tmp_path / "file" / "run"))
    for command, name in (("render", "a.svg"), ("explore", "a.html"), ("export", "a.graphml")):
        words = ["--format", "graphml"] if command == "export" else []
        said = sentence(sfc(command, "--circuit", run_folder, "--out", tmp_path / "file" / name, *words))
        assert str(tmp_path / "file") in said
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "cannot be written" in sentence(discover(out=tmp_path / "read_only"))


def test_a_name_that_is_nearly_right(sfc, discover, prompts_file, model_folder, text_file, tmp_path):
    for given, run in (
        (prompts_file, lambda path: discover(prompts=path)),
        (model_folder, lambda path: discover(model=path)),
        (text_file, lambda path: sfc("train", "--model", model_folder, "--text", path, "--out", tmp_path / "run")),
    ):
        wrong = given.with_name(given.stem[:-1] + "_" + given.suffix)
        assert f"did you mean {str(given)!r}" in sentence(run(wrong))


@pytest.mark.parametrize("sizes", ["10,x", "0", ""])
def test_sizes(sfc, run_folder, sizes):
    assert "10,20,50" in sentence(sfc("faithfulness", "--circuit", run_folder, "--sizes", sizes))


def test_neither_top_nor_features(sfc, run_folder):
    assert "--top" in sentence(sfc("ablate", "--circuit", run_folder))


def test_no_circuit(sfc, tmp_path):
    assert "sfc discover" in sentence(sfc("render", "--circuit", tmp_path))


def test_unknown_drawing(sfc, run_folder, tmp_path):
    assert ".svg" in sentence(sfc("render", "--circuit", run_folder, "--out", tmp_path / "circuit.gif"))


def test_unknown_behaviour_of_the_demo(sfc, tmp_path):
    said = sentence(sfc("demo", "--behaviour", "nounp", "--out", tmp_path / "demo"))
    assert "nounpp" in said


@pytest.mark.parametrize(
    ("option", "value"),
    [("examples", 0), ("examples", -2), ("nodes", 0), ("nodes", 400), ("edges", -1), ("resamples", -1), ("verify", -1)],
)
def test_numbers_out_of_range_are_told_before_any_work(discover, tmp_path, option, value):
    said = sentence(discover(**{option: value}))
    assert f"{option} is {value}" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("ablate", "--top", 2, "--random", -1),
        ("ablate", "--top", 2, "--examples", 0),
        ("render", "--nodes", -3),
        ("render", "--node-threshold", -1.0),
    ],
)
def test_negative_numbers(sfc, run_folder, words):
    said = sentence(sfc(*words, "--circuit", run_folder))
    assert f"{words[-2].removeprefix('--')} is {words[-1]}" in said


def test_a_value_that_is_no_number(sfc, discover, run_folder):
    assert "edge-threshold is nan" in sentence(sfc("render", "--circuit", run_folder, "--edge-threshold", "nan"))
    assert "node-threshold is nan" in sentence(discover(**{"node-threshold": "nan"}))
    assert "nan" in sentence(sfc("steer", "--circuit", run_folder, "--top", 2, "--value", "nan"))


def test_options_that_contradict_each_other(sfc, model_folder, text_file, tmp_path):
    arguments = ["--model", model_folder, "--text", text_file, "--out", tmp_path / "run"]
    assert "k is 64" in sentence(sfc("train", *arguments, "--features", 32, "--k", 64))
    assert "'topk'" in sentence(sfc("train", *arguments, "--architecture", "topkk"))
    assert "context-length is 0" in sentence(sfc("train", *arguments, "--context-length", 0))


def test_pairs_that_do_not_differ(discover, prompts_file, tmp_path):
    rows = [json.loads(line) for line in prompts_file.read_text().splitlines()]
    same = [json.dumps(row | {"patch_prefix": row["clean_prefix"]}) for row in rows]
    (tmp_path / "same.jsonl").write_text("\n".join(same))
    assert "same prompt" in sentence(discover(prompts=tmp_path / "same.jsonl"))
    (tmp_path / "same.jsonl").write_text(json.dumps(rows[0] | {"patch_prefix": rows[0]["clean_prefix"] + " "}))
    assert "are the same tokens" in sentence(discover(prompts=tmp_path / "same.jsonl"))


def test_text_that_is_no_text(sfc, model_folder, tmp_path):
    (tmp_path / "bytes.txt").write_bytes(bytes(range(256)))
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"the man runs\n" * 100)[:30])
    (tmp_path / "plain.txt.gz").write_bytes(b"the man runs")
    for name, reason in (("bytes.txt", "UTF-8"), ("cut.txt.gz", "gzip"), ("plain.txt.gz", "gzip")):
        said = sentence(sfc("train", "--model", model_folder, "--text", tmp_path / name, "--out", tmp_path / name[:3]))
        assert name in said and reason in said
        assert not (tmp_path / name[:3]).exists()


def test_autoencoders_that_were_trained_again(sfc, run_folder, tmp_path):
    """Feature 120 is another one then, and nothing else would tell."""
    shutil.copytree(run_folder / "saes", tmp_path / "saes")
    path = tmp_path / "saes" / "resid_0" / "sae.safetensors"
    tensors = load_file(path)
    save_file({name: x.flip(0) if x.ndim == 2 else x for name, x in tensors.items()}, path)
    said = sentence(sfc("faithfulness", "--circuit", run_folder, "--saes", tmp_path / "saes", "--overwrite"))
    assert "other autoencoders" in said and str(tmp_path / "saes") in said


@pytest.mark.parametrize("paths", ["resid", "resid=", "=gpt_neox.layers.{layer}", "resid=gpt_neox.layers.{layer},,"])
def test_site_paths_that_are_no_pairs(discover, paths):
    assert "SITE=MODULE" in sentence(discover(**{"site-paths": paths}))

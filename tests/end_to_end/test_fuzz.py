"""Damaged files end in a sentence or do not matter: never a traceback, whatever is damaged and however.

Every example is one damaged file (`tests.end_to_end.mutations`) and one command that reads it. The outcome is status 0,
or status 2 with one line. The examples are the same in every run; about 2,000 of them:

    FUZZ=11 python -m pytest tests/end_to_end/test_fuzz.py
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from circuits.cli.main import main
from circuits.prompts.dataset import load_prompts
from circuits.report.files import read_run
from circuits.report.sections import edit_block
from graphs.errors import GraphError
from graphs.formats.eap_ig import read_eap_ig
from graphs.formats.graphml import read_graphml
from graphs.formats.neuronpedia import read_neuronpedia
from sae.errors import UserError
from tests.end_to_end.mutations import mutate_file

SEEDS = st.integers(0, 2**32 - 1)
TIMES = int(os.environ.get("FUZZ", "1"))


def fuzz(examples: int):
    """As many examples, the same every time, none of them kept between runs."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=examples * TIMES, derandomize=True, deadline=None, database=None, suppress_health_check=checks
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory, run_folder, model_folder, prompts_file, text_file):
    """A folder with a run of everything, its model, prompts in several formats and exports."""
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(run_folder, folder / "run")
    shutil.copytree(model_folder, folder / "model")
    rows = [json.loads(line) for line in prompts_file.read_text().splitlines()]
    spans = [row | {"template": "the {subject} near the {other}"} for row in rows]
    (folder / "near.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "spans.jsonl").write_text("\n".join(map(json.dumps, spans)))
    csv = ["clean,corrupted,clean_answer,corrupted_answer"]
    csv += [
        ",".join(row[key] for key in ("clean_prefix", "patch_prefix", "clean_answer", "patch_answer")) for row in rows
    ]
    (folder / "pairs.csv").write_text("\n".join(csv))
    steered = {"features": ["resid_1/3"], "operation": "steer", "value": 1.0}
    edits = {
        "schema_version": 1,
        "kind": "edits",
        "edits": [steered],
        "groups": [{"name": "g", "nodes": ["resid_1/4"]}],
    }
    (folder / "edit.json").write_text(json.dumps(edits))
    behaviour = {"name": "b", "prompts": "../near.jsonl", "edit": "../edit.json", "expect": {"left": "> 1"}}
    (folder / "suite.json").write_text(json.dumps({"model": "../model", "saes": "../run", "behaviours": [behaviour]}))
    labels = [{"site": "resid_1", "feature": i, "label": "x", "score": 0.5, "contexts": []} for i in range(3)]
    (folder / "labels.jsonl").write_text("\n".join(map(json.dumps, labels)))
    (folder / "names.jsonl").write_text('{"Name": "resid_1/3", "Annotation": "x"}\n' * 3)
    run = folder / "run"
    for words in (
        ["faithfulness", "--sizes", "5", "--random", "1", "--resamples", "20", "--edges", "--edge-sizes", "9"],
        ["validate", "--nodes", "5", "--removed", "2", "--verify", "2", "--resamples", "9"],
        ["attention", "--query", "last", "--key", "0", "--layer", "1", "--examples", "2"],
        ["mask", "--sizes", "5", "--steps", "1", "--examples", "4"],
        ["ablate", "--top", "2", "--random", "1", "--examples", "4"],
        ["supernodes", "--similarity", "0.3"],
        ["export", "--format", "graphml"],
        ["export", "--format", "neuronpedia"],
        ["convert", "--format", "saelens", "--out", str(folder / "saelens"), "--saes", str(run)],
    ):
        place = [] if words[0] == "convert" else ["--circuit", str(run)]
        if words[0] in (
            "faithfulness",
            "validate",
            "attention",
            "mask",
            "ablate",
        ):  # others may have written theirs
            place.append("--overwrite")
        with pytest.raises(SystemExit) as stop:
            main([words[0], *place, *words[1:]])
        assert not stop.value.code, words
    return folder


def damaged(
    base: Path, tmp_path: Path, parts: list[str], patterns: list[str], random: Random
) -> tuple[Path, Path, str]:
    """(a copy of these parts of the base, the file in it that is damaged, how)."""
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    for part in parts:
        source = base / part
        shutil.copytree(source, copy / part) if source.is_dir() else copy.mkdir(exist_ok=True)
        if source.is_file():
            shutil.copy(source, copy / part)
    files = sorted(path for pattern in patterns for path in copy.glob(pattern) if path.is_file())
    path = random.choice(files)
    return copy, path, mutate_file(path, random)


def check(result, path: Path, what: str) -> None:
    """Fails unless the command did its work or said one sentence."""
    said = [line for line in result.err.replace("\r", "\n").splitlines() if line.startswith("sfc:")]
    assert result.status == 0 or (result.status == 2 and len(said) == 1), (path, what, result)
    assert "Traceback" not in result.err


@pytest.mark.slow
@fuzz(20)
@given(seed=SEEDS)
def test_circuits(sfc, base, tmp_path, seed):
    random = Random(seed)
    patterns = ["run/circuit/circuit.json", "run/circuit/features.json", "run/circuit/*.safetensors"]
    copy, path, what = damaged(base, tmp_path, ["run/circuit"], patterns, random)
    command, *more = random.choice([["explore"], *[["export", "--format", "graphml"]] * 4])  # a page takes longest
    check(sfc(command, "--circuit", copy / "run", *more), path, what)


@pytest.mark.slow
@fuzz(40)
@given(seed=SEEDS)
def test_what_a_report_reads(base, tmp_path, small_pages, seed):
    patterns = ["run/circuit/*.json", "run/edits/*.json"]
    _, path, what = damaged(base, tmp_path, ["run/circuit", "run/edits"], patterns, Random(seed))
    try:
        for name, edit in read_run(tmp_path / "copy" / "run").edits.items():
            assert edit_block(name, edit)["rows"], what
    except (UserError, GraphError) as error:
        assert str(path) in str(error)


@pytest.mark.slow
@fuzz(2)
@given(seed=SEEDS)
def test_reports(sfc, base, tmp_path, seed):
    copy, path, what = damaged(base, tmp_path, ["run"], ["run/*/*.json", "run/config.json"], Random(seed))
    check(sfc("report", "--circuit", copy / "run"), path, what)


@pytest.mark.slow
@fuzz(2)
@given(seed=SEEDS)
def test_labels_of_a_drawing(sfc, base, tmp_path, seed):
    copy, path, what = damaged(base, tmp_path, ["names.jsonl"], ["names.jsonl"], Random(seed))
    check(sfc("explore", "--circuit", base / "run", "--annotations", path, "--out", copy / "a.html"), path, what)


@pytest.mark.slow
@fuzz(20)
@given(seed=SEEDS)
def test_autoencoders(sfc, base, tmp_path, seed):
    random = Random(seed)
    part = random.choice(["run/saes", "saelens"])
    copy, path, what = damaged(base, tmp_path, [part], [f"{part}/*/*"], random)
    words = random.choice([["match"], ["convert", "--format", "ours", "--out", copy / "out"]])
    check(sfc(*words, "--saes", copy / part), path, what)


@pytest.mark.slow
@fuzz(2)
@given(seed=SEEDS)
def test_models_and_tokenizers(sfc, base, tmp_path, seed):
    random = Random(seed)
    copy, path, what = damaged(base, tmp_path, ["model", "near.jsonl"], ["model/*"], random)
    words = ["--saes", base / "run", "--prompts", base / "near.jsonl", "--out", copy / "out", "--estimate"]
    check(sfc("discover", "--model", copy / "model", *words), path, what)


@pytest.mark.slow
@fuzz(6)
@given(seed=SEEDS)
def test_edits_groups_names_and_suites(sfc, base, tmp_path, seed):
    random = Random(seed)
    copy, path, what = damaged(
        base, tmp_path, ["run/circuit", "edit.json", "suite.json", "labels.jsonl"],
        [random.choice(["edit.json", "suite.json", "labels.jsonl", "run/circuit/supernodes.json"])], random,
    )  # fmt: skip
    circuit = ["--circuit", copy / "run"]
    words = {
        "edit.json": ["supernodes", *circuit, "--read", path],
        "suite.json": ["test", path],
        "labels.jsonl": ["labels", "--saes", base / "run", "--read", path, "--out", copy / "names.jsonl"],
        "supernodes.json": random.choice([["supernodes", *circuit], ["export", *circuit, "--format", "eap-ig"]]),
    }[path.name]
    result = sfc(*words)
    check(replace(result, status=0) if words[0] == "test" and result.status == 1 else result, path, what)


@fuzz(60)
@given(seed=SEEDS)
def test_prompts(tiny_model, base, tmp_path, seed):
    random = Random(seed)
    name = random.choice(["near.jsonl", "spans.jsonl", "pairs.csv"])
    _, path, what = damaged(base, tmp_path, [name], [name], random)
    try:
        assert len(load_prompts(path, tiny_model, need_spans=name == "spans.jsonl")), (what, path)
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.slow
@fuzz(30)
@given(seed=SEEDS)
def test_graphs_of_other_programs(base, tmp_path, seed):
    random = Random(seed)
    _, path, what = damaged(base, tmp_path, ["run/graph"], ["run/graph/*"], random)
    read = {".graphml": [read_graphml]}.get(path.suffix, [read_neuronpedia, read_eap_ig])
    try:
        assert random.choice(read)(path).sites is not None, what
    except GraphError as error:
        assert str(path) in str(error)

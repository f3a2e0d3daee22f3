"""Every command that writes refuses a file of somebody else where it would write, before it computes anything."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from circuits.cli.main import COMMANDS
from sae.model.language_model import LanguageModel

SVG = '<svg xmlns="http://www.w3.org/2000/svg"/>'
NOTES = json.dumps({"title": "my notes"})
TRAIN = "--model MODEL --text TEXT --features 24 --k 4 --tokens 2000 --context-length 16 --sites resid"
CASES = {
    "train": [("OUT/thesis.tex", "x"), ("OUT/report.html", "<html>")],
    "finetune": [("OUT/saes/notes.txt", "x")],
    "sweep": [("OUT/plots/mine.svg", SVG), ("OUT/sweep.json", NOTES), ("OUT/sweep.txt", "x")],
    "cache": [("OUT/manifest.json", NOTES)],
    "evaluate": [
        ("OUT/evaluation.svg", SVG),
        ("OUT/evaluation.json", NOTES),
        ("OUT/evaluation.txt", "x"),
        ("OUT/evaluation.suite.svg", SVG),
    ],
    "match": [("OUT", NOTES)],
    "convert": [("OUT/resid_0/cfg.json", NOTES)],
    "discover": [("OUT/circuit/circuit.json", NOTES), ("OUT/circuit/faithfulness.svg", SVG)],
    "behaviours": [("OUT/behaviours.json", NOTES), ("OUT/index.html", "<html>"), ("OUT/cluster_01/x.txt", "x")],
    "probe": [("OUT", NOTES)],
    "attention": [("RUN/circuit/attention.json", NOTES)],
    "faithfulness": [("RUN/circuit/faithfulness.json", NOTES), ("RUN/circuit/faithfulness.svg", SVG)],
    "mask": [("RUN/circuit/mask.json", NOTES), ("RUN/circuit/mask.safetensors", "")],
    "validate": [("RUN/circuit/validity.json", NOTES)],
    "compare-methods": [("OUT/comparison/comparison.svg", SVG), ("OUT/comparison/comparison.txt", "x")],
    "compare-circuits": [("OUT/circuits.json", NOTES), ("OUT/circuits_1_2.html", "<html>"), ("OUT/x.txt", "x")],
    "render": [("OUT.svg", SVG)],
    "explore": [("OUT.html", "<html>")],
    "report": [("RUN/report.html", "<html>")],
    "features": [
        ("RUN/features/index.html", "<html>"),
        ("RUN/features/notes.txt", "x"),
        ("RUN/features/automata.svg", SVG),
    ],
    "labels": [("OUT", NOTES)],
    "supernodes": [("RUN/circuit/supernodes.json", NOTES)],
    "export": [("OUT", NOTES)],
    "ablate": [("RUN/edits/mine.json", NOTES)],
    "steer": [("RUN/edits/mine.json", NOTES)],
    "shift": [("OUT/circuit/shift.json", NOTES), ("OUT/circuit/shift.svg", SVG), ("OUT/circuit/circuit.json", NOTES)],
    "tpp": [("OUT", NOTES)],
    "demo": [("OUT/thesis.tex", "x"), ("OUT/report.html", "<html>")],
}
WORDS = {
    "train": f"{TRAIN} --out OUT",
    "finetune": "--model MODEL --text TEXT --saes RUN --out OUT",
    "sweep": f"{TRAIN.replace('--sites resid', '--sites resid_0')} --out OUT",
    "cache": "--model MODEL --text TEXT --out OUT",
    "evaluate": "--model MODEL --text TEXT --saes RUN --out OUT",
    "match": "--saes RUN --out OUT",
    "convert": "--saes RUN --format saelens --out OUT",
    "discover": "--model MODEL --saes RUN --prompts PROMPTS --nodes 5 --out OUT",
    "behaviours": "--model MODEL --saes RUN --text TEXT --out OUT",
    "probe": "--model MODEL --prompts PROMPTS --site resid_0 --out OUT",
    "attention": "--circuit RUN --edges 5",
    "faithfulness": "--circuit RUN --sizes 5",
    "mask": "--circuit RUN --steps 1",
    "validate": "--circuit RUN --nodes 5",
    "compare-methods": "--model MODEL --saes RUN --prompts PROMPTS --out OUT",
    "compare-circuits": "RUN RUN --out OUT",
    "render": "--circuit RUN --out OUT.svg",
    "explore": "--circuit RUN --out OUT.html",
    "report": "--circuit RUN",
    "features": "--circuit RUN",
    "labels": "--circuit RUN --out OUT",
    "supernodes": "--circuit RUN",
    "export": "--circuit RUN --format neuronpedia --out OUT",
    "ablate": "--circuit RUN --top 2 --name mine",
    "steer": "--circuit RUN --top 2 --value 1 --name mine",
    "shift": "--model MODEL --saes RUN --data PROMPTS --out OUT",
    "tpp": "--model MODEL --saes RUN --data PROMPTS --out OUT",
    "demo": "--out OUT",
}
WITHOUT_OUTPUT = {"test", "serve", "saes"}
"""They write nothing by themselves; an edit asked for in the browser is written as `ablate` writes it."""
OVERWRITING = (
    "train",
    "finetune",
    "sweep",
    "cache",
    "convert",
    "discover",
    "compare-methods",
    "compare-circuits",
    "shift",
    "demo",
)
"""Commands of folders: --overwrite is for what the program wrote there, and a file of somebody else stays."""


def test_every_command_is_tried():
    assert {*CASES} == {*WORDS} == {*COMMANDS} - WITHOUT_OUTPUT


@pytest.mark.parametrize("command", CASES)
def test_a_file_of_somebody_else_is_kept(
    sfc, command, tmp_path, monkeypatch, run_folder, model_folder, prompts_file, text_file
):
    monkeypatch.setattr("sae.model.load.check_model", lambda model: None)
    monkeypatch.setattr("sae.model.language_model.is_parallel", lambda model: False)
    monkeypatch.setattr(LanguageModel, "run", lambda *args, **options: pytest.fail("something is computed"))
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    shutil.rmtree(run / "graph", ignore_errors=True)
    for name in ("faithfulness", "mask"):  # results of an earlier command, of whatever options
        (run / "circuit" / f"{name}.json").write_text('{"schema_version": 1}')
    places = {"MODEL": model_folder, "TEXT": text_file, "PROMPTS": prompts_file, "RUN": run}
    for number, (name, content) in enumerate(CASES[command]):
        out = tmp_path / f"out{number}"
        path = tmp_path / name.replace("OUT", out.name).replace("RUN", "run")
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_bytes() if path.exists() else None
        path.write_text(content)
        if path.suffix == ".safetensors":
            save_file({"weight": torch.ones(2)}, path)
        foreign = path.read_bytes()
        words = WORDS[command].replace("OUT", str(out))
        for place, where in places.items():
            words = words.replace(place, str(where))
        for more in ([], ["--overwrite"] if command in OVERWRITING else []):
            result = sfc(command, *words.split(), *more)
            said = [line for line in result.err.splitlines() if line.startswith("sfc:")]
            assert result.status == 2 and len(said) == 1, result
            assert path.read_bytes() == foreign
        path.unlink()
        if before is not None:
            path.write_bytes(before)

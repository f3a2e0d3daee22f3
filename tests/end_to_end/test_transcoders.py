"""Transcoders of the MLPs, with a skip connection, beside autoencoders elsewhere: what reads a circuit takes both."""

from __future__ import annotations

import json
import shutil

import pytest
from starlette.testclient import TestClient

from circuits.cli.commands.pictures.serve import ServeCommand
from circuits.cli.live.app import make_app
from circuits.cli.live.jobs import Worker
from circuits.cli.live.serving import open_run
from sae.saes import load_saes


@pytest.fixture
def run(sfc, tmp_path, model_folder, text_file, prompts_file):
    """A run whose MLPs have transcoders, and its circuit."""
    out = tmp_path / "run"
    common = ("--model", model_folder, "--out", out)
    trained = sfc(
        "train", *common, "--text", text_file, "--kind", "transcoder", "--skip", "--features", 32, "--k", 6,
        "--tokens", 4000, "--context-length", 16, "--sites", "mlp,resid",
    )  # fmt: skip
    found = sfc(
        "discover", *common, "--saes", out, "--prompts", prompts_file, "--nodes", 30, "--edge-nodes", 40, "--resamples",
        0, "--method", "attrib",
    )  # fmt: skip
    assert trained.status == found.status == 0, trained.err + found.err
    assert "through skip connections: " in found.out
    return out


@pytest.mark.slow
def test_commands_take_transcoders_beside_autoencoders(sfc, run, tmp_path, text_file):
    saes = load_saes(run)
    assert {site.name: sae.has_skip for site, sae in saes.items()} == {
        "mlp_0": True, "resid_0": False, "mlp_1": True, "resid_1": False,
    }  # fmt: skip
    other = shutil.copytree(run, tmp_path / "other")
    commands = [
        ("faithfulness", "--circuit", run, "--sizes", "10", "--random", 0, "--resamples", 0),
        ("render", "--circuit", run, "--out", tmp_path / "circuit.svg"),
        ("explore", "--circuit", run),
        ("features", "--circuit", run, "--text", text_file, "--tokens", 400),
        ("ablate", "--circuit", run, "--top", 3, "--random", 1),
        ("steer", "--circuit", run, "--features", "mlp_0/3", "--value", 2, "--generate", 1, "--new-tokens", 2),
        ("export", "--circuit", run, "--format", "neuronpedia", "--out", tmp_path / "graph.json"),
        ("compare-circuits", run, other, "--out", tmp_path / "compared", "--shuffles", 5, "--no-transfer"),
        ("report", "--circuit", run),
    ]
    for command in commands:
        result = sfc(*command)
        assert result.status == 0, (command, result.err)
    page = (run / "report.html").read_text()
    assert "</b> skip connections" in page and "a diamond what a transcoder" in page and "mlp_0/skip" in page
    assert "2: topk with 32 features, k = 6 (transcoder, reads mlp_in) at mlp_0, mlp_1" in page
    assert "skip connection" in (tmp_path / "circuit.svg").read_text()
    lines = [json.loads(line) for line in (run / "features" / "mlp_0.jsonl").read_text().splitlines()]
    assert lines and all(line["site"] == "mlp_0" for line in lines)
    served(run)


def served(run):
    """A prompt is read, and a transcoder's feature edited, as `sfc serve` does."""
    experiments = open_run(ServeCommand(circuit=run))
    worker = Worker(experiments.model)
    app = make_app(experiments, worker, token="token", port=8765)
    client = TestClient(app, base_url="http://127.0.0.1:8765", headers={"x-sfc-token": "token"})
    request = {"prompt": "the man near the girl", "answer": 30, "against": 31, "features": ["mlp_0/3"], "new_tokens": 2}
    for kind, given in (("prompt", {"prompt": request["prompt"]}), ("edit", request)):
        answer = client.post("/jobs", json={"kind": kind, **given})
        lines = client.get(f"/jobs/{answer.json()['id']}").text.splitlines()
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
        assert events[-1]["kind"] == "done", events
    worker.close()

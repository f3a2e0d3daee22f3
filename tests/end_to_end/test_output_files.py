"""A file that the program did not write is not replaced, unless it is told to; its own files are."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file

from circuits.benchmark import components
from circuits.circuit import Circuit
from circuits.report import write_report
from graphs import _files
from sae._run.locks import lock
from sae._run.outputs import MARK, check_output, has_mark
from sae.errors import UserError
from sae.features.matching import match_features
from sae.saes import load_saes

COMMANDS = {
    "paper.svg": ["render", "--nodes", 5],
    "paper.png": ["render", "--nodes", 5],
    "paper.pdf": ["render", "--nodes", 5],
    "paper.dot": ["render", "--nodes", 5],
    "notes.html": ["explore", "--nodes", 5],
    "data.graphml": ["export", "--format", "graphml"],
    "viewer.json": ["export", "--format", "neuronpedia"],
    "scores.json": ["export", "--format", "eap-ig"],
}
FOREIGN = {
    ".svg": '<svg xmlns="http://www.w3.org/2000/svg"><title>circuit</title></svg>',
    ".dot": "digraph circuit { a -> b }",
    ".html": "<html><body>what I found with sparse-feature-circuits</body></html>",
    ".graphml": '<graphml xmlns="http://graphml.graphdrawing.org/xmlns"/>',
    ".json": json.dumps({"schema_version": 1, "cfg": {}, "nodes": {}, "edges": {}, "metadata": {}, "links": []}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_another_programs_file_is_kept_and_an_own_one_replaced(sfc, run_folder, tmp_path, name):
    out = tmp_path / name
    out.write_text(before := FOREIGN.get(out.suffix, "a photograph"))
    words = [*COMMANDS[name], "--circuit", run_folder, "--out", out]
    refused = sfc(*words)
    assert refused.status == 2 and refused.err.count("\n") == 1
    assert "--overwrite" in refused.err and name in refused.err
    assert out.read_text() == before
    assert sfc(*words, "--overwrite").status == 0
    first = out.read_bytes()
    assert sfc(*words).status == 0
    assert out.suffix == ".pdf" or out.read_bytes() == first  # Cairo dates its PDFs


def test_a_submission_to_mib(sfc, run_folder, tmp_path, monkeypatch):
    words = ["export", "--format", "mib", "--circuit", run_folder, "--out", tmp_path / "mib"]
    for more, message in (
        ([], "give --task"),
        (["--task", "ioi"], "MIB has gpt2, qwen2.5, gemma2, llama3"),
        (["--task", "greater-than", "--scan", "gpt2"], "MIB has ioi"),
    ):
        refused = sfc(*words, *more)
        assert refused.status == 2 and message in refused.err and refused.err.count("\n") == 1
    effects = Mock(side_effect=components.component_effects)  # by the method as the circuit was found with it
    monkeypatch.setattr(components, "component_effects", effects)
    result = sfc(*words, "--task", "ioi", "--scan", "gpt2", "--json")
    found_with = json.loads((run_folder / "circuit" / "circuit.json").read_text())["metadata"]["options"]
    assert {name: effects.call_args.kwargs[name] for name in ("method", "rule", "steps", "residual")} == {
        name: found_with[name] for name in ("method", "rule", "steps", "residual")
    }
    data = json.loads(result.out)
    assert result.status == 0 and len(data["files"]) == len(list((tmp_path / "mib" / "ioi_gpt2").iterdir())) == 9
    assert sfc("export", "--circuit", run_folder, "--format", "graphml", "--task", "ioi").status == 2


def test_matches_and_probes_replace_only_their_own_files(sfc, run_folder, model_folder, prompts_file, tmp_path):
    probe, matches = tmp_path / "probe.safetensors", tmp_path / "data.json"
    save_file({"weight": torch.ones(3)}, probe, {"format": "pt"})
    matches.write_text('{"schema_version": 3, "title": "mine"}')
    for out, words in (
        (probe, ["probe", "--model", model_folder, "--prompts", prompts_file, "--site", "resid_0"]),
        (matches, ["match", "--saes", run_folder, "--sites", "mlp_0,mlp_1"]),
    ):
        before = out.read_bytes()
        refused = sfc(*words, "--out", out)
        assert refused.status == 2 and "--overwrite" in refused.err and out.read_bytes() == before
        assert sfc(*words, "--out", out, "--overwrite").status == 0
        assert sfc(*words, "--out", out).status == 0


@pytest.mark.slow
def test_a_report_is_not_written_over_a_page_of_somebody_else(sfc, run_folder, tmp_path):
    page = tmp_path / "report.html"
    page.write_text(FOREIGN[".html"])
    with pytest.raises(UserError, match="not written by this program"):
        write_report(run_folder, out=page)
    assert MARK not in write_report(run_folder, out=page, overwrite=True).read_text()[:20]
    write_report(run_folder, out=page)


@pytest.mark.slow
def test_the_same_holds_in_python(run_folder, tmp_path):
    circuit = Circuit.load(run_folder)
    saes = [*load_saes(run_folder, device="cpu").values()]
    match = match_features(saes[0].W_dec, saes[1].W_dec)
    for write, name in ((circuit.plot, "a.svg"), (circuit.explore, "a.html"), (match.save, "a.json")):
        path = tmp_path / name
        path.write_text(FOREIGN[path.suffix])
        with pytest.raises(UserError, match="overwrite=True"):
            write(path)
        write(path, overwrite=True)
        write(path)
        link = tmp_path / f"link{path.suffix}"
        link.symlink_to(path)
        with pytest.raises(UserError, match="is a link"):
            write(link, overwrite=True)
        assert link.is_symlink()


@pytest.mark.slow
def test_files_of_earlier_versions_are_known_and_both_packages_write_one_mark(run_folder, tmp_path):
    circuit = Circuit.load(run_folder)
    assert _files.MARK == MARK
    circuit.plot(tmp_path / "a.svg")
    circuit.plot(tmp_path / "a.dot")
    circuit.explore(tmp_path / "a.html")
    write_report(run_folder, out=tmp_path / "b.html")
    for path in tmp_path.iterdir():
        check_output(path, has_mark(path.suffix))
        path.write_text(path.read_text().replace(f"Generator: {MARK}", "").replace(f'content="{MARK}"', ""))
        check_output(path, has_mark(path.suffix))


@pytest.mark.parametrize("name", ["circuit.svg", "circuit.png"])
def test_the_usual_names_in_the_folder_of_drawings_are_the_runs(sfc, run_folder, name):
    out = run_folder / "graph" / name
    out.parent.mkdir(exist_ok=True)
    out.write_bytes(b"of an earlier version, without a mark")
    assert sfc("render", "--circuit", run_folder, "--out", out, "--nodes", 3).status == 0


def test_commands_that_write_a_file_wait_for_its_folder(sfc, forked, run_folder, tmp_path):
    for words in (
        ["export", "--circuit", run_folder, "--format", "graphml", "--out", tmp_path / "a.graphml"],
        ["match", "--saes", run_folder, "--out", tmp_path / "a.json"],
    ):
        with lock(tmp_path):
            refused = forked.run(*words)
        assert refused.status == 2 and "another command is writing" in refused.err


@pytest.mark.slow
def test_a_circuit_says_that_its_autoencoders_were_trained_again(
    sfc, run_folder, model_folder, text_file, prompts_file, tmp_path
):
    train = ["train", "--model", model_folder, "--text", text_file, "--out", tmp_path, "--sites", "mlp_0,mlp_1"]
    train += ["--features", 24, "--k", 4, "--tokens", 2000, "--context-length", 16]
    words = ["--model", model_folder, "--saes", tmp_path, "--prompts", prompts_file, "--out", tmp_path]
    assert sfc(*train).status == 0
    assert sfc("discover", *words, "--method", "attrib", "--edge-nodes", 10, "--nodes", 5).status == 0
    note = "trained again"
    assert sfc("report", "--circuit", tmp_path).status == 0 and note not in (tmp_path / "report.html").read_text()
    assert sfc(*train, "--overwrite").status == 0  # the same ones: newer files, equal bits
    assert sfc("report", "--circuit", tmp_path).status == 0 and note not in (tmp_path / "report.html").read_text()
    assert sfc(*train, "--seed", 1, "--overwrite").status == 0
    for command in (["faithfulness"], ["ablate", "--top", 2]):
        refused = sfc(*command, "--circuit", tmp_path)
        assert refused.status == 2 and "found with other autoencoders" in refused.err
    for command, page in (("report", "report.html"), ("render", "graph/circuit.svg")):
        assert sfc(command, "--circuit", tmp_path).status == 0
        assert note in Path(tmp_path, page).read_text()

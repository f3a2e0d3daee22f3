"""`sfc mask` as a user types it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from circuits.circuit import Circuit
from sae.errors import UserError


@pytest.mark.slow
def test_mask_is_learned_and_measured_beside_the_effects(sfc, run_folder, prompts_file, tmp_path):
    options = ("--sizes", "5,20", "--start-site", "attn_1", "--steps", 3, "--batch-size", 4, "--overwrite")
    result = sfc("mask", "--circuit", run_folder, "--prompts", prompts_file, *options, "--json")
    data = json.loads(result.out)
    assert result.status == 0 and data["held_out"] and len(data["losses"]) == 3
    assert data["mask"]["sizes"] == data["effects"]["sizes"] and data["mask"]["sizes"][:2] == [5, 20]
    assert data["mask"]["m_empty"] == data["effects"]["m_empty"]
    assert json.loads((run_folder / "circuit" / "mask.json").read_text()) == data
    tensors = load_file(run_folder / "circuit" / "mask.safetensors")
    n = sum(len(tensor) for name, tensor in tensors.items() if name.endswith("/score"))
    assert n == data["mask"]["n_nodes"] and {name.split("/")[0] for name in tensors} == {"attn_1", "mlp_1", "resid_1"}
    text = sfc("mask", "--circuit", run_folder, *options, "--circuit-nodes", 7)
    mask = run_folder / "mask"
    circuit = Circuit.load(mask)
    kept = set().union(*(nodes.ids(site) for site, nodes in circuit.nodes.items()))
    assert len(kept) == 7 and all(name.split("_")[0] in ("attn", "mlp", "resid") for name in kept)
    whole = Circuit.load(run_folder).nodes
    for site, nodes in circuit.nodes.items():  # the effects they had
        effects = dict(zip(whole[site].ids(site), whole[site].effect.tolist(), strict=True))
        assert nodes.effect.tolist() == pytest.approx([effects[name] for name in nodes.ids(site)], rel=1e-3, abs=1e-5)
    shutil.copytree(run_folder, tmp_path / "moved")
    assert Path(Circuit.load(tmp_path / "moved" / "mask").metadata["saes"]) == tmp_path / "moved"
    for command in (["render"], ["explore"], ["ablate", "--top", 2, "--random", 0]):
        assert sfc(*command, "--circuit", mask).status == 0
    assert text.status == 0 and "prompts, those learned on" in text.out and "mask" in text.out
    assert sfc("mask", "--circuit", run_folder, "--smallest", 9, "--largest", 3).status == 2


def test_learned_scores_outlive_an_interrupted_measurement(sfc, run_folder, prompts_file, monkeypatch):
    scores = run_folder / "circuit" / "mask.safetensors"
    scores.unlink(missing_ok=True)

    def interrupted(*args, **options):
        raise UserError("interrupted")

    monkeypatch.setattr("circuits.faithfulness.nodes.measure_faithfulness", interrupted)
    options = ["--steps", 2, "--smallest", 3, "--sizes", "5", "--overwrite"]
    assert sfc("mask", "--circuit", run_folder, "--prompts", prompts_file, *options).status == 2
    assert load_file(scores)


@pytest.mark.slow
def test_a_mask_on_edges(sfc, run_folder, prompts_file):
    options = ("--edges", "--edge-sizes", "5,20", "--steps", 2, "--batch-size", 4, "--overwrite")
    result = sfc("mask", "--circuit", run_folder, "--prompts", prompts_file, *options, "--circuit-edges", 12, "--json")
    data = json.loads(result.out)
    assert result.status == 0 and data["held_out"] and len(data["losses"]) == 2
    assert data["mask"]["sizes"] == data["effects"]["sizes"] == [5, 20]
    assert data["mask"]["all_joined"] == pytest.approx(data["effects"]["all_joined"], abs=1e-4)
    assert json.loads((run_folder / "circuit" / "edge_mask.json").read_text()) == data
    names = load_file(run_folder / "circuit" / "edge_mask.safetensors")
    assert {name.partition("/")[0] for name in names} == {"edges", "nodes"}
    mask = run_folder / "edge_mask"
    circuit, whole = Circuit.load(mask), Circuit.load(run_folder)
    weights = {(row.source, row.target): row.weight for row in whole.edges_frame().itertuples()}
    shown = list(circuit.edges_frame().itertuples())
    assert 0 < len(shown) <= 12
    assert [row.weight for row in shown] == pytest.approx([weights[row.source, row.target] for row in shown], rel=1e-3)
    for command in (["render"], ["ablate", "--top", 2, "--random", 0]):
        assert sfc(*command, "--circuit", mask).status == 0
    faithfulness = sfc("faithfulness", "--circuit", mask, "--edges", "--edge-sizes", "5", "--random", 0)
    assert faithfulness.status == 0 and "edges have a weight" in faithfulness.out
    assert sfc("mask", "--circuit", run_folder, "--edges", "--circuit-nodes", 3).status == 2
    assert sfc("mask", "--circuit", run_folder, "--circuit-edges", 3).status == 2

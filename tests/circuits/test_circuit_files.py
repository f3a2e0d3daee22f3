"""A circuit's files are checked before anything is built from them, small files stay small, and runs can be moved."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from circuits.attribution.effects import SiteEffects
from circuits.attribution.nodes import SiteNodes
from circuits.circuit import Circuit, circuit_digest
from graphs.drawing.dot import draw
from graphs.drawing.style import tooltip
from graphs.errors import GraphError
from sae.errors import UserError
from sae.model.sites import Site

EMBED, RESID = Site("embed"), Site("resid", 0)


def small_circuit(run, *, n_features: int = 4) -> Circuit:
    """Two sites, two examples of three tokens, an edge and a patch side."""

    def effects(*rows) -> SiteEffects:
        example, position, feature, value = zip(*rows, strict=True)
        return SiteEffects(n_features, *(torch.tensor(x, dtype=torch.int32) for x in (example, position, feature)),
                           torch.tensor(value))  # fmt: skip

    def nodes(*features) -> SiteNodes:
        n = len(features)
        return SiteNodes(n_features, torch.tensor(features), torch.full((n,), -1), torch.ones(n))

    metadata = {
        "options": {"aggregation": "sum", "metric": "logit_difference"}, "sites": ["embed", "resid_0"],
        "n_examples": 2, "n_positions": 3, "total_effect": 1.5, "saes": str(run / "saes"), "model": "/elsewhere/model",
        "title": "small",
    }  # fmt: skip
    return Circuit(
        {EMBED: effects((0, 0, 1, 0.5), (1, 2, 3, -1.0)), RESID: effects((0, 1, 2, 0.25), (1, 0, n_features, 1.0))},
        {EMBED: nodes(1, 3), RESID: nodes(2, n_features)},
        {(EMBED, RESID): torch.tensor([[0.5, 0.0], [0.0, 1.0]]), (RESID, None): torch.tensor([[0.25, 1.0]])},
        metadata,
    )


@pytest.fixture
def folder(tmp_path):
    circuit = small_circuit(tmp_path)
    circuit.save(tmp_path / "circuit", graph=circuit.graph())
    return tmp_path / "circuit"


def test_a_run_can_be_moved(folder, tmp_path):
    written = json.loads((folder / "circuit.json").read_text())["metadata"]
    assert written["saes"] == "./saes" and written["model"] == "/elsewhere/model"
    shutil.copytree(folder, tmp_path / "moved" / "circuit")
    assert Circuit.load(tmp_path / "moved").metadata["saes"] == str(tmp_path / "moved" / "saes")
    small_circuit(tmp_path / "other").save(tmp_path / "other" / "circuit")
    assert circuit_digest(tmp_path / "other" / "circuit") == written["digest"]  # of the circuit, not of where it stands
    written["saes"] = "/as/before"
    for old in ("/as/before", "owner/name"):
        change_json(folder / "circuit.json", lambda data, old=old: data["metadata"].update(saes=old))
        assert Circuit.load(folder).metadata["saes"] == old


def change_json(path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def change_tensors(path, **changes) -> None:
    tensors = load_file(path)
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "/")) if tensor is None else tensors.update({name.replace("__", "/"): tensor})
    save_file(tensors, path)


INT = torch.int32


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"effects__embed__feature": None}, "'effects/embed/feature' is missing"),
        ({"effects__embed__feature": torch.tensor([1, 5], dtype=INT)}, "from 1 to 5, expected 0 to 4"),
        ({"effects__embed__feature": torch.tensor([-1, 3], dtype=INT)}, "from -1 to 3"),
        ({"effects__embed__feature": torch.tensor([1.0, 3.0])}, "is float32, expected int numbers"),
        ({"effects__embed__feature": torch.tensor([1], dtype=INT)}, "has shape [1], expected [2]"),
        ({"effects__embed__example": torch.tensor([0, 2], dtype=INT)}, "from 0 to 2, expected 0 to 1"),
        ({"effects__embed__position": torch.tensor([0, 3], dtype=INT)}, "from 0 to 3, expected -1 to 2"),
        ({"effects__embed__value": torch.tensor([0.5, float("nan")])}, "not finite"),
        ({"effects__embed__n_features": torch.tensor([-5])}, "n_features' is -5"),
        ({"effects__embed__n_features": torch.tensor([10**11])}, "n_features' is 100000000000"),
        ({"effects__embed__n_features": torch.tensor([2**62])}, "n_features' is 4611686018427387904"),
        ({"effects__embed__n_features": torch.tensor(4)}, "has shape [], expected [1]"),
        ({"edge_nodes__embed__effect": torch.ones(3)}, "has shape [3], expected [2]"),
        ({"edge_nodes__embed__feature": torch.tensor([1, 9])}, "from 1 to 9"),
        ({"edges__embed__resid_0": torch.ones(2, 3)}, "has shape [2, 3], expected [2, 2]"),
        ({"edges__embed__mlp_7": torch.ones(1, 2)}, "'edges/embed/mlp_7' joins no two sites"),
        ({"edges__embed": torch.ones(1, 2)}, "'edges/embed' joins no two sites"),
        ({"edge_intervals__embed__metric": torch.ones(1, 2, 2)}, "has no weights"),
        ({"intervals__embed": torch.ones(3, 2)}, "has shape [3, 2], expected [2, 2]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, changes, said):
    change_tensors(folder / "effects.safetensors", **changes)
    with pytest.raises(UserError) as caught:
        Circuit.load(folder)
    assert said in str(caught.value) and "effects.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.pop("options"), "'options' is missing"),
        (lambda m: m.update(options=[]), "'options' is []"),
        (lambda m: m["options"].update(aggregation="mean"), "'options.aggregation' is \"mean\": expected 'sum'"),
        (lambda m: m.update(n_examples="<img>"), "'n_examples' is \"<img>\": expected a valid integer"),
        (lambda m: m.update(n_examples=0), "'n_examples' is 0"),
        (lambda m: m.update(n_examples=True), "'n_examples' is true"),
        (lambda m: m.update(n_positions=10**30), "'n_positions' is"),
        (lambda m: m.update(total_effect="1"), 'total_effect\' is "1"'),
        (lambda m: m.update(sites=["rsid_0"]), "'sites[0]' is \"rsid_0\": expected a site: embed"),
        (lambda m: m.update(sites=[3]), "'sites[0]' is 3"),
        (lambda m: m.update(verification={"nodes": {"embed/1": {"exact_effect": "<b>"}}}), 'exact_effect\' is "<b>"'),
        (lambda m: m.update(model=["x"]), "'model' is [\"x\"]"),
    ],
)
def test_metadata_that_do_not_fit_are_named(folder, change, said):
    change_json(folder / "circuit.json", lambda data: change(data["metadata"]))
    with pytest.raises((UserError, GraphError)) as caught:
        Circuit.load(folder)
    assert said in str(caught.value) and "circuit.json" in str(caught.value)


def test_many_features_take_no_memory(tmp_path):
    """Only features that have an effect are counted, whatever the file says of their number."""
    circuit = small_circuit(tmp_path, n_features=2**31 - 2)
    circuit.save(tmp_path / "circuit", graph=circuit.graph())
    again = Circuit.load(tmp_path)
    assert again.nodes[EMBED].feature.tolist() == [3, 1] and again.nodes[RESID].is_error.tolist() == [True, False]
    feature, effect = again.effects[EMBED].by_feature(2)
    assert feature.tolist() == [1, 3] and effect.tolist() == [0.25, -0.5]


def test_circuits_without_a_patch_side_show_no_total_effect(tmp_path):
    circuit = small_circuit(tmp_path)
    without = replace(circuit, metadata={**circuit.metadata, "total_effect": None})
    for graph, shown in ((circuit.graph(), True), (without.graph(), False)):
        assert ("total effect" in tooltip(graph, graph.node("metric"))) == shown
        assert ("total effect" in draw(graph, tmp_path / "a.svg").read_text()) == shown

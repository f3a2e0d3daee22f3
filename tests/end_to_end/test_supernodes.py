from __future__ import annotations

import json
import shutil

import pytest

from circuits.circuit import Circuit
from graphs.formats.neuronpedia import to_neuronpedia


@pytest.mark.slow
def test_sfc_groups_draws_exports_and_edits_them(sfc, run_folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(run_folder, run, ignore=shutil.ignore_patterns("edits"))  # of tests that came before
    made = sfc("supernodes", "--circuit", run, "--similarity", 0.3, "--json")
    groups = json.loads(made.out)["supernodes"]
    assert made.status == 0 and groups and all(len(g["nodes"]) > 1 and g["automatic"] for g in groups)
    two = groups[0]["nodes"][:2]
    by_hand = sfc("supernodes", "--circuit", run, "--name", "My pair", "--members", ",".join(two))
    assert by_hand.status == 0 and "My pair" in by_hand.out and "(by hand)" in by_hand.out
    circuit = Circuit.load(run)
    assert list(circuit.supernode("my-pair")) == two and "supernodes" not in circuit.metadata
    assert circuit.graph(nodes=60).supernodes["My pair"] == two
    again = sfc("supernodes", "--circuit", run, "--similarity", 0.9, "--json")
    assert "My pair" in [g["name"] for g in json.loads(again.out)["supernodes"]]
    exported = sfc("export", "--circuit", run, "--format", "circuit-tracer", "--json")
    assert "My+pair" in json.loads(exported.out)["address"]
    saved = to_neuronpedia(circuit.graph(nodes=60))
    saved["qParams"]["supernodes"] = [["theirs", *saved["qParams"]["supernodes"][0][1:]]]
    (tmp_path / "saved.json").write_text(json.dumps(saved))
    assert "theirs" in sfc("supernodes", "--circuit", run, "--read", tmp_path / "saved.json").out
    assert "theirs" in sfc("supernodes", "--circuit", run, "--show").out
    words = ["ablate", "--circuit", run, "--random", 2, "--examples", 8]
    edited = sfc(*words, "--features", "supernode:theirs", "--json")
    assert edited.status == 0, edited.err
    report = json.loads(edited.out)
    assert report["features"] == sorted(two, key=report["features"].index)
    assert len(report["random_equal_effect"]) == len(report["equal_effect_shares"]) >= 1
    refused = sfc(*words, "--features", "supernode:thers")
    assert refused.status == 2 and "did you mean 'theirs'" in refused.err
    assert sfc("supernodes", "--circuit", run, "--members", "a/1").status == 2

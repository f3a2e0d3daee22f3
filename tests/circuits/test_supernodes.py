from __future__ import annotations

import json

import pytest

from circuits.editing.random_features import draws_of_equal_effect
from circuits.labels import SUPERNODES_FILE, LabelsFile, read_supernodes, with_group, write_supernodes
from sae.errors import UserError


def group(name: str, *nodes: str, automatic: bool = False) -> dict:
    return {"name": name, "nodes": list(nodes), "collapsed": True, "automatic": automatic}


def test_groups_of_people_stay_and_automatic_ones_are_of_one_circuit(tmp_path):
    groups = [group("by hand", "a/1", "a/2"), group("found", "a/2", "a/3", "a/4", automatic=True)]
    write_supernodes(tmp_path, groups, digest="one", similarity=0.7)
    assert read_supernodes(tmp_path, "one") == [groups[0], group("found", "a/3", "a/4", automatic=True)]
    assert read_supernodes(tmp_path, "two") == groups[:1]
    (tmp_path / SUPERNODES_FILE).write_text(json.dumps({"schema_version": 1, "groups": [groups[0]]}))  # the explorer's
    assert read_supernodes(tmp_path, "one") == groups[:1]
    groups[1] |= {"name": "By hand"}
    write_supernodes(tmp_path, groups, digest="one", similarity=0.7)
    assert [g["name"] for g in read_supernodes(tmp_path, "one")] == ["by hand", "By hand 2"]  # each can be named
    (tmp_path / SUPERNODES_FILE).write_text('{"groups": [{"name": 3}]}')
    with pytest.raises(UserError, match=r"groups\[0\]"):
        read_supernodes(tmp_path, "one")


def test_names_that_are_there_are_not_written_again(tmp_path):
    file, bot = LabelsFile(None, tmp_path), {"by": "a program", "automatic": True}
    assert [file.add({"resid_0/1": "nouns"}, **bot) for _ in range(2)] == [1, 0]
    assert [file.add({"resid_0/1": name}, by="a person") for name in ("", "nouns", "nouns")] == [0, 1, 0]
    assert file.add({"resid_0/1": "nouns"}, **bot) == 0
    assert file.add({"resid_0/1": ""}, by="a person") == 1
    assert len(file.lines()) == 3 and file.read()["resid_0/1"]["automatic"]


def test_groups_are_made_changed_and_removed_by_name():
    groups = with_group([group("old", "a/1", "a/2")], "new one", ["a/2", "a/3", "a/2"], ["a/1", "a/2", "a/3"])
    assert [(g["name"], g["nodes"]) for g in groups] == [("new one", ["a/2", "a/3"]), ("old", ["a/1"])]
    assert [g["name"] for g in with_group(groups, "old", ["a/2"], ["a/2"])] == ["old", "new one"]
    assert [g["name"] for g in with_group(groups, "new-one", [], [])] == ["old"]
    for name, nodes, said in (
        ("a/b", ["a/1"], "no name"),
        ("x", ["a/9"], "'a/9' is no node"),
        ("x", [], "no supernode 'x'"),
    ):
        with pytest.raises(UserError, match=said):
            with_group(groups, name, nodes, ["a/1"])


def test_draws_of_equal_effect_are_as_many_and_come_near():
    effects = {f"a/{i}": (-1) ** i * float(i) for i in range(30)}
    like = ["a/20", "a/11", "a/3"]
    draws = draws_of_equal_effect(effects, like, n_draws=8, seed=0)
    assert len(draws) > 3 and len({tuple(draw.features) for draw in draws}) == len(draws)
    for draw in draws:
        assert len(set(draw.features)) == 3 and not {*draw.features} & {*like}
        assert draw.share == pytest.approx(sum(abs(effects[name]) for name in draw.features) / 34)
        assert draw.share == pytest.approx(1, abs=0.03)
    (strongest,) = draws_of_equal_effect(effects, ["a/29", "a/28"], n_draws=8, seed=0)
    assert {*strongest.features} == {"a/26", "a/27"}  # there are none as strong
    assert draws_of_equal_effect(effects, ["a/99"], n_draws=3, seed=0) == []
    assert draws_of_equal_effect({"a/1": 1.0, "a/2": 1.0}, ["a/1", "a/2"], n_draws=3, seed=0) == []

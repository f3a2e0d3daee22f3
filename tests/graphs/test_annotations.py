from __future__ import annotations

import json

import pytest

from graphs.annotations import apply, read_annotations, unmatched, write_annotations
from graphs.errors import GraphError
from graphs.feature_graph import FeatureGraph, error_node, feature_node


def write_lines(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_lines_of_the_papers_files_become_labels(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl",
        {
            "Component": "resid",
            "Layer": 5,
            "Feature": 3036,
            "Name": "resid_5/3036",
            "Annotation": "plural",
            "Notes": "x",
        },
        "",
        {"Component": "embed", "Layer": None, "Feature": 7, "Annotation": " nouns \u2028 verbs "},
        {"Component": "mlp", "Layer": 0, "Feature": 7, "Annotation": "old"},
        {"Name": "mlp_0/7", "Annotation": "new"},
        {"Name": "mlp_0/8", "Annotation": ""},
        {"Name": "resid_5/1@2", "Annotation": "here only"},
    )
    assert read_annotations(path) == {
        "resid_5/3036": "plural",
        "embed/7": "nouns \u2028 verbs",
        "mlp_0/7": "new",
        "resid_5/1@2": "here only",
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "not valid JSON"),
        ([1, 2], r"\[1, 2\]"),
        ({"Name": "resid_5/1", "Annotation": 3}, "key 'Annotation' is 3"),
        ({"Name": ["resid_5/1"], "Annotation": "x"}, "key 'Name' is "),
        ({"Name": "resid_5/1", "Layer": 5.5, "Annotation": "x"}, "key 'Layer' is 5.5"),
        ("[" * 100_000, "nested too deeply"),
        ({"Annotation": "x"}, "Name is None"),
        ({"Name": "resid_5", "Annotation": "x"}, "'resid_5'"),
        ({"Component": "resid", "Layer": 5, "Feature": "many", "Annotation": "x"}, "Name is None"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    path = write_lines(tmp_path / "a.jsonl", {"Name": "resid_0/1", "Annotation": "fine"}, line)
    with pytest.raises(GraphError, match=rf"a\.jsonl, line 2: .*{message}"):
        read_annotations(path)


def test_headings_and_lines_without_annotation_are_skipped_and_counted(tmp_path, caplog):
    """As in the paper's two files, where layers and features are text."""
    path = write_lines(
        tmp_path / "a.jsonl",
        {"Component": "embed", "Feature": "1425", "Name": "embed/1425"},
        {"Component": "resid", "Layer": "5", "Feature": "3036", "Name": "resid_5/3036", "Annotation": "verbs"},
        {"Component": "Component", "Layer": "", "Name": "Name", "Annotation": "Annotation", "notes": "Notes"},
        {"Component": "embed", "Layer": "", "Feature": "293", "Annotation": "plural", "Notes": ""},
        {"Component": "mlp", "Layer": "2", "Feature": "error", "Annotation": "missed"},
        {"Name": "resid_5/3036@subject", "Annotation": "at the subject"},
        {"Name": "resid_5/1", "Annotation": None},
    )  # fmt: skip
    with caplog.at_level("WARNING", logger="graphs"):
        labels = read_annotations(path)
    names = ("resid_5/3036", "embed/293", "mlp_2/error", "resid_5/3036@subject")
    assert labels == dict(zip(names, ("verbs", "plural", "missed", "at the subject"), strict=True))
    assert [record.message for record in caplog.records] == [
        f"{path}: 4 annotations; skipped lines: 2 without an annotation, 1 with headings"
    ]


def test_a_file_without_any_annotation_is_refused(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"Name": "resid_5/1", "annotation": "x"})
    with pytest.raises(GraphError, match=r"a\.jsonl: no line has an annotation"):
        read_annotations(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(GraphError, match=r"none\.jsonl: no such file"):
        read_annotations(tmp_path / "none.jsonl")


def test_unknown_names_are_ignored_and_counted(caplog):
    graph = FeatureGraph(["resid_0"])
    for position in (1, 2):
        graph.add_node(feature_node("resid_0", 4, effect=1.0, position=position))
    graph.add_node(error_node("resid_0", effect=1.0, position=1))
    labels = {"resid_0/4": "both", "resid_0/4@2": "second", "mlp_9/1": "absent"}
    with caplog.at_level("INFO", logger="graphs"):
        assert [node.label for node in apply(graph, labels).nodes()] == ["both", "second", None]
    assert unmatched(graph, labels) == ["mlp_9/1"] and "1 of 3 annotations" in caplog.text
    assert all(node.label is None for node in graph.nodes())


def test_labels_round_trip(tmp_path):
    labels = {"resid_5/3036": "a\nb", "embed/7": "ü", "resid_1/error": "odd", "mlp_2/9@subject": "x"}
    write_annotations(labels, tmp_path / "a.jsonl")
    assert read_annotations(tmp_path / "a.jsonl") == labels
    assert json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])["Layer"] == 5

"""The split of cases into two classes is found in the activations, whatever the cases are called."""

from __future__ import annotations

import pytest

from graphs.classes import case_means, find_classes
from graphs.drawing.dot import to_dot
from graphs.feature_graph import FeatureGraph, feature_node, metric_node

CASES = ("plural_plural", "plural_singular", "singular_plural", "singular_singular")


def graph_of(*profiles: tuple[float, ...], cases: tuple[str, ...] = CASES, effects=None) -> FeatureGraph:
    """A graph of features with these mean activations by case, at span `verb`."""
    graph = FeatureGraph(["resid_0"])
    for feature, profile in enumerate(profiles):
        by_case = {case: {"verb": mean, "other": 0.1} for case, mean in zip(cases, profile, strict=True)}
        effect = 1.0 if effects is None else effects[feature]
        graph.add_node(feature_node("resid_0", feature, effect=effect, by_case=by_case))
    graph.add_node(metric_node(effect=2.0))
    return graph


def test_classes_are_what_the_features_tell_apart():
    classes = find_classes(graph_of((5, 6, 0, 0), (0, 0, 3, 3), (1, 1, 1, 1), (0, 0, 4, 12)))
    assert classes is not None
    assert classes.names == ("plural", "singular")
    assert classes.cases == (CASES[:2], CASES[2:])
    assert classes.contrast == {"resid_0/0": -1, "resid_0/1": 1, "resid_0/2": 0, "resid_0/3": 1}
    assert [classes.side(id) for id in ("resid_0/0", "resid_0/1", "resid_0/2", "metric")] == [
        "plural", "singular", "both", "",
    ]  # fmt: skip


def test_strong_nodes_count_more():
    by_first_noun, by_second_noun = (9.0, 9.0, 0.0, 0.0), (0.0, 9.0, 0.0, 9.0)
    strong_second = find_classes(graph_of(by_first_noun, by_second_noun, effects=(1.0, -3.0)))
    assert strong_second is not None and strong_second.cases == ((CASES[0], CASES[2]), (CASES[1], CASES[3]))
    assert strong_second.contrast["resid_0/1"] == 1


def test_a_class_without_a_common_word_is_called_by_its_cases():
    classes = find_classes(graph_of((2, 0, 2), cases=("is", "has", "was in a town")))
    assert classes is not None and set(classes.names) == {"has", "is / was in a town"}


@pytest.mark.parametrize("cases", [(), ("one",), tuple(map(str, range(11)))])
def test_no_classes_without_two_cases_or_with_too_many(cases):
    assert find_classes(graph_of(tuple(float(n) for n in range(len(cases))), cases=cases)) is None


def test_a_node_is_read_at_its_span_or_where_it_is_strongest():
    by_case = {"a": {"subject": 4.0, "verb": 1.0}, "b": {"subject": 0.0, "verb": 2.0}}
    assert case_means(feature_node("resid_0", 1, effect=1.0, position="verb", by_case=by_case)) == {"a": 1, "b": 2}
    assert case_means(feature_node("resid_0", 1, effect=1.0, by_case=by_case)) == {"a": 4, "b": 0}


def test_colours_stand_for_classes_by_default_and_for_effects_on_request():
    graph = graph_of((5, 5, 0, 0), (0, 0, 5, 5), (2, 2, 2, 2))
    by_class, by_effect = to_dot(graph), to_dot(graph, colour="effect")
    assert "on for plural" in by_class and "raises the metric" not in by_class
    assert "raises the metric" in by_effect and "on for" not in by_effect
    assert by_class.count("bar-resid_0/") == 3 and "bar-" not in by_effect

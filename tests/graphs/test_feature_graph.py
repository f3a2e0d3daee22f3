from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphs._files import atomic_write
from graphs.errors import GraphError
from graphs.feature_graph import FeatureGraph, Node, error_node, feature_node, metric_node


def small_graph() -> FeatureGraph:
    graph = FeatureGraph(["embed", "resid_0"], metadata={"title": "t", "tokens": ["a", "b"]})
    graph.add_node(feature_node("embed", 3, effect=0.5, position=1, top_tokens=["x</script>", "é", "\ud800"]))
    graph.add_node(error_node("resid_0", effect=-0.25, position="verb"))
    graph.add_node(metric_node(effect=1.5))
    graph.add_edge("embed/3@1", "resid_0/error@verb", -0.125, interval=(-0.5, 0.25), by_case={"a": -0.5, "b": 0.25})
    graph.add_edge("resid_0/error@verb", "metric", 2.0)
    return graph


def test_round_trip_through_a_file_keeps_everything(tmp_path):
    graph = small_graph().with_labels({"embed/3": "three"})
    graph.save(tmp_path / "circuit.json")
    loaded = FeatureGraph.load(tmp_path / "circuit.json")
    assert loaded.to_json() == graph.to_json()
    assert loaded.node("embed/3@1") == graph.node("embed/3@1")
    assert loaded.edges() == graph.edges() and loaded.sites == graph.sites
    assert [path.name for path in tmp_path.iterdir()] == ["circuit.json"]


@pytest.mark.slow
@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),
            st.one_of(st.none(), st.integers(0, 5)),
            st.one_of(st.none(), st.integers(0, 9), st.text("abc", min_size=1)),
            st.floats(allow_nan=False, allow_infinity=False),
        ),
        unique_by=lambda item: item[:3],
    )
)
def test_any_graph_survives_json(items):
    graph = FeatureGraph(["a", "b", "c"])
    for site, feature, position, effect in items:
        name = graph.sites[site]
        node = (
            error_node(name, effect=effect, position=position)
            if feature is None
            else feature_node(name, feature, effect=effect, position=position)
        )
        if node.id not in graph:
            graph.add_node(node)
    again = FeatureGraph.from_json(json.loads(json.dumps(graph.to_json())))
    assert again.nodes() == graph.nodes()


def broken(change) -> dict:
    data = json.loads(json.dumps(small_graph().to_json()))
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda d: d.pop("sites"), ["'sites' is missing"]),
        (lambda d: d.update(schema_version=99), ["'schema_version' is 99", "expected 1"]),
        (lambda d: d["nodes"][0].pop("effect"), ["'nodes[0].effect' is missing"]),
        (lambda d: d["nodes"][1].update(effect="big"), ["'nodes[1].effect' is \"big\"", "number"]),
        (lambda d: d["nodes"][1].update(effect=None), ["'nodes[1].effect' is null", "number"]),
        (lambda d: d["nodes"][1].update(position=[1]), ["'nodes[1].position' is [1]", "integer or a valid string"]),
        (lambda d: d["nodes"][1].update(position=10**12), ["'nodes[1].position' is 1000000000000", "1048576"]),
        (lambda d: d["nodes"][0].update(kind="thing"), ["'nodes[0].kind' is \"thing\"", "'feature', 'error'"]),
        (lambda d: d["nodes"][0]["attributes"].update(density="<b>"), ['attributes.density\' is "<b>"', "number"]),
        (
            lambda d: d["nodes"][0]["attributes"].update(contexts=[{"tokens": ["a"], "activations": []}]),
            ["attributes.contexts[0]", "one activation for each of the 1 tokens"],
        ),
        (lambda d: d["nodes"][0].update(id="embed/4@1"), ["embed/4@1", "embed/3@1"]),
        (lambda d: d["nodes"][0].update(site="embd", id="embd/3@1"), ["'embd'", "'embed'"]),
        (lambda d: d["nodes"].append(d["nodes"][0]), ["embed/3@1", "already"]),
        (lambda d: d["edges"][0].update(source="embed/99"), ["embed/99", "not in the graph"]),
        (lambda d: d["edges"][0].update(target="embed/3@1"), ["does not go forward"]),
        (lambda d: d["edges"][0].update(weight=float("nan")), ["'edges[0].weight' is null", "number"]),
        (lambda d: d["edges"][0].update(interval=[1]), ["'edges[0].interval[1]' is missing"]),
        (lambda d: d["edges"].append([1]), ["'edges[2]' is [1]", "object"]),
        (lambda d: d["metadata"].update(tokens=[3]), ["'metadata.tokens[0]' is 3", "string"]),
    ],
)
def test_bad_files_are_named_with_the_value(tmp_path, change, parts):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(broken(change)))
    with pytest.raises(GraphError) as caught:
        FeatureGraph.load(path)
    message = str(caught.value)
    assert message.count("bad.json") == 1 and "\n" not in message
    assert all(part in message for part in parts), message


def test_malformed_json_names_the_line(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text('{"schema_version": 1,\n "sites": [}')
    with pytest.raises(GraphError, match=r"bad\.json, line 2"):
        FeatureGraph.load(path)
    with pytest.raises(GraphError, match="no such file"):
        FeatureGraph.load(tmp_path / "absent.json")


def test_unknown_node_offers_the_nearest():
    with pytest.raises(GraphError, match=r"unknown node 'embed/3': did you mean 'embed/3@1'"):
        small_graph().node("embed/3")


def test_nodes_check_themselves():
    with pytest.raises(GraphError, match="finite"):
        feature_node("embed", 1, effect=float("nan"))
    with pytest.raises(GraphError, match="spell 'embed/2'"):
        Node("embed/1", "embed", 2, "feature")
    with pytest.raises(GraphError, match="feature None"):
        Node("embed/error", "embed", None, "feature")


def test_positions_come_in_order():
    graph = FeatureGraph(["embed"], metadata={"positions": ["subject", "verb"]})
    for position in ["verb", 4, "subject", 2]:
        graph.add_node(feature_node("embed", 0, effect=1.0, position=position))
    assert graph.positions == [2, 4, "subject", "verb"]


def test_labels_and_subgraphs_leave_the_original_alone():
    graph = small_graph()
    before = json.dumps(graph.to_json())
    labelled = graph.with_labels({"embed/3@1": "by id", "embed/3": "by name"})
    assert labelled.node("embed/3@1").label == "by id"
    assert len(graph.subgraph(["metric"])) == 1
    assert json.dumps(graph.to_json()) == before


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "circuit.json"
    small_graph().save(path)
    old = path.read_text()
    graph = small_graph()
    graph.metadata["bad"] = {1, 2}
    with pytest.raises(GraphError, match="cannot be written"):
        graph.save(path)
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == old and len(list(tmp_path.iterdir())) == 1

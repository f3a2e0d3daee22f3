from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from graphs.errors import GraphError
from graphs.feature_graph import FeatureGraph, error_node, feature_node, metric_node
from graphs.formats.graphml import read_graphml, write_graphml
from graphs.formats.neuronpedia import cantor, from_neuronpedia, read_neuronpedia, to_neuronpedia, write_neuronpedia

CIRCUITS = [{"n_nodes": 40, "n_edges": 90}, {"n_nodes": 40, "n_edges": 90, "positions": True}]
FORMATS = {"graphml": (write_graphml, read_graphml), "neuronpedia": (write_neuronpedia, read_neuronpedia)}


def same(a: FeatureGraph, b: FeatureGraph) -> bool:
    left, right = a.to_json(), b.to_json()
    left["edges"].sort(key=lambda edge: (edge["source"], edge["target"]))
    right["edges"].sort(key=lambda edge: (edge["source"], edge["target"]))
    return json.dumps(left) == json.dumps(right)


def awkward() -> FeatureGraph:
    """Everything that could get in the way: spans, mixed positions, odd characters, the id collision."""
    graph = FeatureGraph(
        ["embed", "attn_0", "resid_0", "mlp_1"], metadata={"title": "a <b> & \x01", "positions": ["s", "v"]}
    )
    graph.add_node(feature_node("embed", 4, effect=1.0, position="s"))
    graph.add_node(feature_node("attn_0", 2, effect=-1.0, position="s", top_tokens=["\x00", "</x>", "\udfff"]))
    graph.add_node(replace(feature_node("attn_0", 2, effect=0.5), label='q"\n\x07'))
    graph.add_node(error_node("resid_0", effect=0.25, position="s"))
    graph.add_node(feature_node("mlp_1", 4, effect=1e-12, position="v"))
    graph.add_node(metric_node(effect=1.0))
    graph.add_edge("embed/4@s", "resid_0/error@s", -0.1)
    graph.add_edge("resid_0/error@s", "metric", 0.1 + 0.2)
    return graph


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("options", CIRCUITS)
def test_round_trip(make_circuit, tmp_path, name, options):
    write, read = FORMATS[name]
    graph = make_circuit(**options)
    write(graph, tmp_path / "graph")
    assert same(read(tmp_path / "graph"), graph)


@pytest.mark.parametrize("name", FORMATS)
def test_round_trip_of_awkward_text(tmp_path, name):
    write, read = FORMATS[name]
    write(awkward(), tmp_path / "graph")
    assert same(read(tmp_path / "graph"), awkward())


@pytest.mark.parametrize("name", FORMATS)
def test_other_files_are_refused_by_name(tmp_path, name):
    path = tmp_path / "other.file"
    path.write_text("{" if name == "neuronpedia" else "<graph>")
    with pytest.raises(GraphError, match=r"other\.file"):
        FORMATS[name][1](path)
    path.write_text('{"nodes": []}' if name == "neuronpedia" else '<?xml version="1.0"?><graphml><graph/></graphml>')
    with pytest.raises(GraphError, match=r"other\.file"):
        FORMATS[name][1](path)
    with pytest.raises(GraphError, match="no such file"):
        FORMATS[name][1](tmp_path / "absent")


def test_graphml_has_plain_columns_for_other_programs(tmp_path):
    write_graphml(awkward(), tmp_path / "g.graphml")
    root = ElementTree.parse(tmp_path / "g.graphml").getroot()
    space = "{http://graphml.graphdrawing.org/xmlns}"
    kinds = {key.get("attr.name"): key.get("attr.type") for key in root.iter(f"{space}key")}
    assert kinds["effect"] == "double" and kinds["site"] == "string" and kinds["weight"] == "double"
    assert len(list(root.iter(f"{space}node"))) == 6 and len(list(root.iter(f"{space}edge"))) == 2


@pytest.mark.parametrize("options", CIRCUITS)
def test_neuronpedia_files_follow_the_schema(make_circuit, options):
    graph = make_circuit(**options)
    data = to_neuronpedia(graph, scan="toy", slug="agreement")
    meta = data["metadata"]
    assert (meta["slug"], meta["scan"], meta["schema_version"]) == ("agreement", "toy", 1)
    ids = [node["node_id"] for node in data["nodes"]]
    assert len(set(ids)) == len(ids)
    written = [item for item in data["nodes"] if item["feature_type"] != "embedding"]  # beside those of the tokens
    for node, item in zip(graph.nodes(), written, strict=True):
        assert {"node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp"} <= set(item)
        assert isinstance(item["layer"], str) and 0 <= item["ctx_idx"] < len(meta["prompt_tokens"])
        if node.kind == "feature" and node.site != "embed":
            kind, layer = node.site.split("_")
            row = 3 * int(layer) + {"attn": 1, "mlp": 2, "resid": 3}[kind]
            assert item["layer"] == str(row) and item["feature"] == cantor(row, node.feature)
            assert item["node_id"] == f"{row}_{node.feature}_{item['ctx_idx']}" and node.name in item["clerp"]
            assert item["jsNodeId"] == f"{row}_{node.feature}-0"
        if node.position is not None:
            assert meta["prompt_tokens"][item["ctx_idx"]] == graph.metadata["tokens"][node.position]
    assert {link["source"] for link in data["links"]} | {link["target"] for link in data["links"]} <= set(ids)
    metric = next(item for item in data["nodes"] if item["is_target_logit"])
    rows = [int(item["layer"]) for item in data["nodes"] if item["layer"] != "E" and not item["is_target_logit"]]
    assert metric["feature_type"] == "logit" and int(metric["layer"]) > max(rows)


def test_an_error_and_a_feature_of_row_0_do_not_collide():
    graph = FeatureGraph(["embed", "mlp_0"])
    graph.add_node(feature_node("embed", 2, effect=1.0, position=5))
    graph.add_node(error_node("mlp_0", effect=1.0, position=5))  # row 2
    graph.add_edge("embed/2@5", "mlp_0/error@5", 1.0)
    data = to_neuronpedia(graph)
    ids = [node["node_id"] for node in data["nodes"] if node["feature_type"] != "embedding"]
    assert ids == ["0_2_5", "2_-1_5"]  # circuit-tracer would call both 0_2_5
    assert same(from_neuronpedia(data), graph)


def test_nodes_without_a_position_have_their_own_place_beside_those_with_one():
    data = to_neuronpedia(awkward())
    assert data["metadata"]["prompt_tokens"] == ["s", "v", "all positions"]
    ids = {node["node_id"] for node in data["nodes"] if node["feature_type"] != "embedding"}
    assert len(ids) == len(awkward())


def test_cantor_pairing_is_one_to_one():
    numbers = {cantor(x, y) for x in range(60) for y in range(60)}
    assert len(numbers) == 3600 and cantor(0, 0) == 0 and cantor(1, 2) == 8


def foreign() -> dict:
    def node(id, layer, kind, **more):
        return {"node_id": id, "layer": layer, "feature_type": kind, "ctx_idx": 1, "clerp": "", "feature": 0, **more}

    return {
        "metadata": {"slug": "s", "scan": "gemma", "prompt": "a b", "prompt_tokens": ["a", " b"], "schema_version": 1},
        "qParams": {},
        "nodes": [
            node("E_12_1", "E", "embedding"),
            node("0_3_1", "3", "mlp reconstruction error", influence=0.1),
            node("0_4_1", "0", "cross layer transcoder", influence=0.5, activation=2.5, clerp="cats"),
            node("27_99_1", "27", "logit", token_prob=0.75, clerp='Output " x"'),
        ],
        "links": [
            {"source": "E_12_1", "target": "0_4_1", "weight": 1.5},
            {"source": "0_4_1", "target": "27_99_1", "weight": -2.0},
            {"source": "0_3_1", "target": "27_99_1", "weight": 0.5},
        ],
    }


def test_graphs_of_circuit_tracer_are_read(tmp_path):
    (tmp_path / "ct.json").write_text(json.dumps(foreign()))
    graph = read_neuronpedia(tmp_path / "ct.json")
    assert graph.sites == ["embed", "mlp_0", "mlp_3", "logit"]
    assert {node.id for node in graph.nodes()} == {"metric", "embed/12@1", "mlp_3/error@1", "mlp_0/4@1", "logit/99@1"}
    feature = graph.node("mlp_0/4@1")
    assert (feature.label, feature.effect, feature.attributes["activation"]) == ("cats", 0.4, 2.5)  # 0.1 is the error's
    weights = {edge[:2]: edge.weight for edge in graph.edges()}
    assert weights["logit/99@1", "metric"] == 0.75 and weights["mlp_0/4@1", "logit/99@1"] == -2.0


def test_mistakes_in_foreign_graphs_are_named():
    data = foreign()
    data["links"][0]["source"] = "9_9_9"
    with pytest.raises(GraphError, match="9_9_9"):
        from_neuronpedia(data, source="ct.json")
    data = foreign()
    data["nodes"][2]["node_id"] = "strange"
    with pytest.raises(GraphError, match=r"ct\.json.*'strange'"):
        from_neuronpedia(data, source="ct.json")
    with pytest.raises(GraphError, match="'lstm_0' has no row"):
        to_neuronpedia(FeatureGraph(["lstm_0"]))

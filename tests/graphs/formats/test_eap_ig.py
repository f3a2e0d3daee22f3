"""EAP-IG's circuit JSON: what its loader needs, path by path sums, and both kinds of file read back."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise

import networkx as nx
import pytest

from graphs.errors import GraphError
from graphs.feature_graph import METRIC, FeatureGraph, error_node, feature_node, metric_node
from graphs.formats.eap_ig import from_eap_ig, read_eap_ig, to_eap_ig, write_eap_ig

SHAPE = {"n_layers": 2, "n_heads": 3, "d_model": 8}


def loader_names(n_layers: int, n_heads: int, parallel: bool) -> tuple[set[str], set[str]]:
    """The nodes and edges that EAP-IG's Graph.from_model makes: layer by layer, from everything in the stream."""
    stream, nodes, edges = ["input"], {"input", "logits"}, set()
    for layer in range(n_layers):
        heads, mlp = [f"a{layer}.h{head}" for head in range(n_heads)], f"m{layer}"
        nodes |= {*heads, mlp}
        edges |= {f"{source}->{head}<{letter}>" for source in stream for head in heads for letter in "qkv"}
        before = stream if parallel else stream + heads
        edges |= {f"{source}->{mlp}" for source in before}
        stream = [*stream, *heads, mlp]
    return nodes, edges | {f"{source}->logits" for source in stream}


@pytest.mark.parametrize("parallel", [False, True])
def test_every_node_and_edge_of_the_model_is_there(make_circuit, parallel):
    graph = FeatureGraph(["attn_0"])
    graph.add_node(feature_node("attn_0", 3, effect=0.5))
    graph.add_node(metric_node())
    data = to_eap_ig(graph, parallel=parallel, **SHAPE)
    nodes, edges = loader_names(2, 3, parallel)
    assert set(data["nodes"]) == nodes and set(data["edges"]) == edges
    assert data["cfg"] == {"n_layers": 2, "n_heads": 3, "parallel_attn_mlp": parallel, "d_model": 8}
    assert all(math.isfinite(edge["score"]) and edge["in_graph"] is False for edge in data["edges"].values())
    assert [name for name, node in data["nodes"].items() if node["in_graph"]] == ["a0.h0", "a0.h1", "a0.h2", "logits"]


def linear_circuit(seed: int) -> FeatureGraph:
    """A random linear model: every feature's change is the sum of its parents', w = slope * change."""
    rng = random.Random(seed)
    sites = ["embed", "attn_0", "mlp_0", "resid_0", "attn_1", "mlp_1", "resid_1"]
    direct = {("embed", "attn_0"), ("embed", "mlp_0"), ("attn_0", "mlp_0"), ("embed", "resid_0"), ("attn_0", "resid_0")}
    direct |= {("mlp_0", "resid_0"), ("resid_0", "attn_1"), ("resid_0", "mlp_1"), ("attn_1", "mlp_1")}
    direct |= {("resid_0", "resid_1"), ("attn_1", "resid_1"), ("mlp_1", "resid_1"), ("resid_1", METRIC)}
    ids = [(site, what) for site in sites for what in (0, "error")]
    jacobian = {
        (u, d): rng.gauss(0, 1) for u in ids for d in [*ids, (METRIC, 0)] if (u[0], d[0]) in direct
    }  # da_d / da_u
    change, slope = {}, {(METRIC, 0): 1.0}
    for d in ids:
        parents = [(u, j) for (u, other), j in jacobian.items() if other == d]
        change[d] = sum(j * change[u] for u, j in parents) if parents else rng.gauss(0, 1)
    for u in reversed(ids):
        slope[u] = sum(j * slope[d] for (other, d), j in jacobian.items() if other == u)
    graph = FeatureGraph(sites)
    for site, what in ids:
        effect = slope[site, what] * change[site, what]
        graph.add_node(
            error_node(site, effect=effect) if what == "error" else feature_node(site, int(what), effect=effect)
        )
    graph.add_node(metric_node(effect=sum(slope[u] * change[u] for u in ids if u[0] == "embed")))
    for (u, d), j in jacobian.items():
        target = METRIC if d[0] == METRIC else f"{d[0]}/{d[1]}"
        graph.add_edge(f"{u[0]}/{u[1]}", target, slope[d] * j * change[u])
    return graph


def summed(data, source: str, target: str) -> float:
    return sum(
        edge["score"]
        for name, edge in data["edges"].items()
        if name.startswith(source) and name.partition("->")[2].startswith(target)
    )


def test_residual_features_are_joined_path_by_path():
    """Every path between two components that passes residual features only, its weight divided by what it passes."""
    graph = linear_circuit(0)
    data = to_eap_ig(graph, **SHAPE)
    component = {"embed": "input", "attn_0": "a0", "mlp_0": "m0", "attn_1": "a1", "mlp_1": "m1", "metric": "logits"}
    expected: dict[tuple[str, str], float] = {}
    for u in graph.nodes():
        for d in graph.nodes():
            if u.site not in component or d.site not in component or u.site == d.site:
                continue
            for path in nx.all_simple_paths(graph.graph, u.id, d.id):
                if any(graph.node(name).site in component for name in path[1:-1]):
                    continue
                weight = 1.0
                for a, b in pairwise(path):
                    weight *= graph.graph.edges[a, b]["weight"]
                for name in path[1:-1]:
                    weight /= graph.node(name).effect
                pair = component[u.site], component[d.site]
                expected[pair] = expected.get(pair, 0.0) + weight
    for (source, target), weight in expected.items():
        assert summed(data, source, target) == pytest.approx(weight, abs=1e-9), (source, target)
    assert sum(edge["score"] for edge in data["edges"].values()) == pytest.approx(sum(expected.values()))


@pytest.mark.parametrize("seed", range(3))
def test_what_reaches_the_logits_is_the_total_effect(seed):
    """In a linear model the direct effects of all components add up to the total effect; so do a node's edges."""
    graph = linear_circuit(seed)
    data = to_eap_ig(graph, **SHAPE)
    assert summed(data, "", "logits") == pytest.approx(graph.node(METRIC).effect)
    for part in ("input", "a0", "m0", "a1", "m1"):
        score = sum(node["score"] for name, node in data["nodes"].items() if name.startswith(part))
        assert summed(data, part, "") == pytest.approx(score)


def test_heads_and_inputs_share_evenly():
    graph = FeatureGraph(["attn_0", "attn_1"])
    for site, effect in (("attn_0", 3.0), ("attn_1", 6.0)):
        graph.add_node(feature_node(site, 5, effect=effect))
    graph.add_node(metric_node(effect=6.0))
    graph.add_edge("attn_0/5", "attn_1/5", 2.7)
    graph.add_edge("attn_1/5", METRIC, 6.0)
    data = to_eap_ig(graph, **SHAPE)
    assert data["nodes"]["a0.h1"] == {"in_graph": True, "score": 1.0}
    assert data["edges"]["a0.h0->a1.h2<k>"] == {"score": pytest.approx(2.7 / 27), "in_graph": True}
    assert data["edges"]["a1.h0->logits"] == {"score": 2.0, "in_graph": True}


@pytest.mark.parametrize("positions", [False, True])
def test_round_trip(make_circuit, tmp_path, positions):
    graph = make_circuit(n_nodes=40, n_edges=90, positions=positions)
    write_eap_ig(graph, tmp_path / "circuit.json", n_layers=6, n_heads=2, d_model=4)
    assert read_eap_ig(tmp_path / "circuit.json").to_json() == json.loads(json.dumps(graph.to_json()))


def test_a_circuit_of_heads_is_read():
    """What EAP-IG writes: q, k and v edges add up, what is not in the graph is left out, unscored nodes get a sum."""
    nodes, edges = loader_names(2, 3, parallel=False)
    data = {
        "cfg": {"n_layers": 2, "n_heads": 3, "parallel_attn_mlp": False, "d_model": 8},
        "nodes": {name: {"in_graph": name in ("input", "a1.h2", "logits")} for name in nodes},
        "edges": {name: {"score": 0.1, "in_graph": False} for name in edges},
    }
    data["nodes"]["a1.h2"]["score"] = 0.75
    kept = {"input->a1.h2<q>": 0.25, "input->a1.h2<v>": 0.5, "a1.h2->logits": 2.0, "input->logits": -1.0}
    data["edges"] |= {name: {"score": score, "in_graph": True} for name, score in kept.items()}
    graph = from_eap_ig(data)
    assert {node.id: node.effect for node in graph.nodes()} == {"embed/0": -0.25, "attn_1/2": 0.75, "metric": 0.0}
    assert sorted(edge[:3] for edge in graph.edges()) == [
        ("attn_1/2", "metric", 2.0), ("embed/0", "attn_1/2", 0.75), ("embed/0", "metric", -1.0)
    ]  # fmt: skip
    data["nodes"]["a1.h2"]["score"] = math.nan
    assert from_eap_ig(data).node("attn_1/2").effect == 2.0


def test_what_does_not_fit_is_refused(tmp_path):
    graph = FeatureGraph(["attn_0", "mlp_0", "mlp_7"])
    for site in graph.sites:
        graph.add_node(feature_node(site, 0, effect=1.0))
    graph.add_node(metric_node())
    graph.add_edge("attn_0/0", "mlp_0/0", 1.0)
    with pytest.raises(GraphError, match="'m7'"):
        to_eap_ig(graph, **SHAPE)
    with pytest.raises(GraphError, match="parallel"):
        to_eap_ig(graph, n_layers=8, n_heads=1, d_model=4, parallel=True)
    with pytest.raises(GraphError, match="'nodes'"):
        from_eap_ig({"cfg": {"n_layers": 1}, "edges": {}})
    shape = {"n_layers": 1}
    with pytest.raises(GraphError, match="'x3'"):
        from_eap_ig({"cfg": shape, "nodes": {"x3": {"in_graph": True}}, "edges": {}})
    with pytest.raises(GraphError, match="a node of mlp_3 is in the graph, and n_layers is 1"):
        from_eap_ig({"cfg": shape, "nodes": {"m3": {"in_graph": True}}, "edges": {}})
    with pytest.raises(GraphError, match="parent->child"):
        from_eap_ig({"cfg": shape, "nodes": {}, "edges": {"m0": {"in_graph": True, "score": 1}}})
    with pytest.raises(GraphError, match=r"in_graph' is missing"):
        from_eap_ig({"cfg": shape, "nodes": {"m0": {}}, "edges": {}})
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(GraphError, match=r"broken\.json"):
        read_eap_ig(tmp_path / "broken.json")

from __future__ import annotations

import random
import re

import numpy as np
import pytest
from scipy import sparse
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from sklearn.metrics import adjusted_rand_score

from graphs import supernodes
from graphs.drawing.dot import to_dot
from graphs.errors import GraphError
from graphs.explorer import explorer_html
from graphs.explorer._data import unpacked
from graphs.feature_graph import FeatureGraph, Node, error_node, feature_node, metric_node
from graphs.supernodes import find_named, find_supernodes, slug

GROUPS, SIZE = 6, 5


def planted(seed: int, *, noise: float = 0.25, shuffled: int | None = None) -> tuple[FeatureGraph, dict[str, int]]:
    """A graph in which every feature of a planted group reads and feeds the same nodes by nearly the same shares, with
    an error that does as group 0, and the group of every feature.
    """
    rng = np.random.default_rng(seed)
    graph = FeatureGraph(["embed", "mlp_0", "resid_0"])
    nodes = [feature_node("embed", i, effect=1.0, top_tokens=[f" in{i}"]) for i in range(12)]
    nodes += [feature_node("resid_0", i, effect=1.0) for i in range(12)] + [metric_node(effect=1.0)]
    ends, edges, group_of = [node.id for node in nodes], [], {}
    profiles = rng.normal(size=(GROUPS, len(ends))) * (rng.random((GROUPS, len(ends))) < 0.4)
    for number in range(GROUPS * SIZE + 1):
        group = number % GROUPS
        is_error = number == GROUPS * SIZE
        words = [f" word{group}", f" other{number}"]
        node = (
            error_node("mlp_0", effect=0.5) if is_error else feature_node("mlp_0", number, effect=0.5, top_tokens=words)
        )
        nodes.append(node)
        if not is_error:
            group_of[node.id] = group
        weights = profiles[group] * rng.uniform(0.5, 2) * (1 + noise * rng.normal(size=len(ends)))
        for end, weight in zip(ends, weights.tolist(), strict=True):
            if weight:
                edges.append((end, node.id, weight) if end.startswith("embed") else (node.id, end, weight))
    if shuffled is not None:
        random.Random(shuffled).shuffle(nodes)
        random.Random(shuffled).shuffle(edges)
    for node in nodes:
        graph.add_node(node)
    for edge in edges:
        graph.add_edge(*edge)
    return graph, group_of


@pytest.mark.parametrize("seed", range(3))
def test_planted_groups_are_recovered(seed):
    graph, group_of = planted(seed)
    groups = find_supernodes(graph)
    number = {id: place for place, ids in enumerate(groups.values()) for id in ids}
    found = [number.get(id, -1 - place) for place, id in enumerate(group_of)]
    assert adjusted_rand_score(list(group_of.values()), found) >= 0.95
    assert not any(id.endswith("error") or id == "metric" for id in number)
    words = {f"word{group_of[ids[0]]}" for ids in groups.values() if ids[0] in group_of}
    assert words <= {name.split(" ")[0] for name in groups}  # what the members share comes first


def small(edges: dict[tuple[str, str], float]) -> FeatureGraph:
    """Features of mlp_0 between others, with the edges given as weights by their ends."""
    graph = FeatureGraph(["embed", "mlp_0", "resid_0"])
    for site in graph.sites:
        for i in range(4):
            graph.add_node(feature_node(site, i, effect=1.0))
    for (source, target), weight in edges.items():
        graph.add_edge(source, target, weight)
    return graph


def test_what_is_read_counts_as_much_as_what_is_fed_however_large():
    """Two features that read different nodes by small weights and feed the same by large ones have a cosine of 1/2."""
    edges = {("embed/0", "mlp_0/0"): 0.01, ("embed/1", "mlp_0/1"): 0.01}
    edges |= {("mlp_0/0", "resid_0/0"): 100.0, ("mlp_0/1", "resid_0/0"): 100.0}
    assert not [ids for ids in find_supernodes(small(edges), similarity=0.6).values() if "mlp_0/0" in ids]
    assert ["mlp_0/0", "mlp_0/1"] in find_supernodes(small(edges), similarity=0.49).values()


def test_every_two_members_are_alike():
    """Of a chain in which neighbours are alike (cosine .71) and the ends are not (0) only two are joined."""
    edges = {("embed/0", "mlp_0/0"): 1, ("embed/0", "mlp_0/1"): 1, ("embed/1", "mlp_0/1"): 1, ("embed/1", "mlp_0/2"): 1}
    groups = find_supernodes(small(edges), similarity=0.7)
    assert [len(ids) for ids in groups.values() if ids[0].startswith("mlp_0")] == [2]


@pytest.mark.parametrize("block", [1, 2**22])
def test_sets_of_like_features_by_themselves_are_clustered_as_all_together(monkeypatch, block):
    """Against a table of all distances; profiles of a row each, or all rows at once."""
    monkeypatch.setattr(supernodes, "BLOCK", block)
    rows = sparse.random_array((60, 40), density=0.1, rng=np.random.default_rng(0), format="csr")
    unit = rows.toarray() / np.linalg.norm(rows.toarray(), axis=1, keepdims=True).clip(1e-30)
    distances = squareform(1 - unit @ unit.T, checks=False)
    n_groups = 0
    for farthest in (0.2, 0.5, 0.8):
        numbers = fcluster(linkage(distances, method="complete"), t=farthest, criterion="distance")
        groups = [np.flatnonzero(numbers == number).tolist() for number in np.unique(numbers)]
        expected = sorted(group for group in groups if len(group) > 1)
        assert supernodes._clusters(sparse.csr_array(unit), farthest) == expected
        n_groups += len(expected)
    assert n_groups > 20
    monkeypatch.setattr(supernodes, "MOST", 3)
    with pytest.raises(GraphError, match=r"features hang together by cosines of at least 0\.2: at most 3 "):
        supernodes._clusters(sparse.csr_array(unit), 0.8)


def test_the_order_of_nodes_and_edges_changes_nothing():
    groups = find_supernodes(planted(1)[0])
    for shuffled in range(3):
        other = find_supernodes(planted(1, shuffled=shuffled)[0])
        assert other == groups and list(other) == list(groups)


def test_similar_edges_of_the_other_sign_are_no_group():
    graph = FeatureGraph(["mlp_0"])
    for feature, weight in enumerate((1.0, 2.0, -1.0, 0.0)):
        graph.add_node(feature_node("mlp_0", feature, effect=weight))
    graph.add_node(metric_node(effect=1.0))
    for feature, weight in enumerate((1.0, 2.0, -1.0)):
        graph.add_edge(f"mlp_0/{feature}", "metric", weight)
    assert list(find_supernodes(graph).values()) == [["mlp_0/0", "mlp_0/1"]]
    assert find_supernodes(graph, apart=["mlp_0/1"]) == {}
    for similarity in (0.0, 1.5):
        with pytest.raises(GraphError, match=f"similarity is {similarity}"):
            find_supernodes(graph, similarity=similarity)


def labelled(labels: list[str | None]) -> FeatureGraph:
    graph = FeatureGraph(["mlp_0"])
    for feature, label in enumerate(labels):
        node = feature_node("mlp_0", feature, effect=1.0)
        graph.add_node(Node(node.id, node.site, node.feature, node.kind, None, 1.0, label, {}))
    graph.add_node(metric_node(effect=1.0))
    for feature in range(len(labels)):
        graph.add_edge(f"mlp_0/{feature}", "metric", 1.0)
    return graph


def test_names_come_from_labels_and_can_be_typed():
    (name,) = find_supernodes(labelled(["Plural, subject/verb", "Plural, subject/verb", "x"]))
    assert name == "Plural subject verb" and slug(name) == "plural-subject-verb"
    assert find_named("supernode:plural-subject-verb", {name: []}) == name == find_named(name, {name: []})
    assert find_named("plural", {name: []}) is None
    for few in ([None, None], ["x", None, None]):  # a label of the fewest names nothing
        assert list(find_supernodes(labelled(few))) == ["features of mlp_0"]


def test_they_are_drawn_as_clusters_and_open_as_boxes():
    graph = labelled(["a", "b", "c"])
    graph.metadata["supernodes"] = [
        {"name": "two of them", "nodes": ["mlp_0/0", "mlp_0/2", "mlp_0/9"]},
        {"name": "twice", "nodes": ["mlp_0/2", "metric"]},
        {"name": "one", "nodes": ["mlp_0/1"]},
    ]
    assert graph.supernodes == {"two of them": ["mlp_0/0", "mlp_0/2"], "one": ["mlp_0/1"]}
    dot = to_dot(graph)
    clusters = re.findall(r"(?s)cluster_mlp_0_\d \{(.*?)\}", dot)  # one a row in which it has nodes
    assert clusters and all("two of them" in cluster for cluster in clusters)
    assert {id for id in ("mlp_0/0", "mlp_0/1", "mlp_0/2") if f"drawn-{id}" in "".join(clusters)} == {
        "mlp_0/0",
        "mlp_0/2",
    }
    data = unpacked(explorer_html(graph))
    assert data["groups"] == [{"name": "two of them", "nodes": ["mlp_0/0", "mlp_0/2"], "collapsed": True}]
    plain = graph.subgraph(graph.graph)
    plain.metadata = {}
    assert unpacked(explorer_html(plain))["key"] != data["key"]  # what a reader grouped is of other supernodes


@pytest.mark.parametrize("names", [[2, 10], ["verb", "noun"]])
def test_groups_and_members_stand_by_site_position_and_feature(names):
    """Numbers as numbers, spans as the graph's metadata order them, whatever was added first."""
    first, last = names
    graph = FeatureGraph(["embed", "mlp_0", "resid_0"], metadata={"positions": names} if first == "verb" else {})
    expected = [
        [f"mlp_0/3@{first}", f"mlp_0/20@{first}", f"mlp_0/3@{last}"],
        [f"resid_0/1@{first}", f"resid_0/0@{last}"],
    ]
    for site, groups in (("resid_0", expected[1]), ("mlp_0", expected[0]), ("embed", ["embed/0@", "embed/1@"])):
        for id in reversed(groups):
            feature = int(id.partition("/")[2].partition("@")[0])
            graph.add_node(
                feature_node(site, feature, effect=1.0, position=first if id.endswith(f"@{first}") else last)
            )
    for number, group in enumerate(expected):
        for id in group:
            graph.add_edge(f"embed/{number}@{last}", id, 1.0)
    assert list(find_supernodes(graph).values()) == expected

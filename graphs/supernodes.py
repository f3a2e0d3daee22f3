"""Features that do the same, found by what they read and what they feed: supernodes.

1. A feature's profile is the row of its signed edge weights from every node, then to every node (the metric among
   them), each half of length 1 by itself, or zero where it has no such edge. The cosine of two profiles is 1 where the
   features read and feed the same nodes by the same shares, 0 where they have nothing in common, negative where they
   oppose each other.
2. Features are merged by complete linkage, as long as all pairs in a group have a cosine of at least `similarity`.
   Nodes stand in the order of site, position and feature, so that ties and sums come out the same in whatever order a
   graph lists them.
3. A group of two or more is named by the label that most of its members share, else by the tokens that most of them
   are on for.

Errors and the metric are in no group. After Neuronpedia's design for automatic supernodes (2026) and ADAG
(arXiv 2604.07615), which cluster by the same profiles.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from graphs.drawing.style import visible
from graphs.errors import GraphError
from graphs.feature_graph import FeatureGraph, Node

SIMILARITY = 0.7
"""The least cosine of two members, by default."""
PREFIX = "supernode:"
"""Before the name of a supernode where names of features are meant as well."""
NAME_WORDS = 3


def find_supernodes(
    graph: FeatureGraph, *, similarity: float = SIMILARITY, apart: Iterable[str] = ()
) -> dict[str, list[str]]:
    """Group the features of a graph by their edges.

    Args:
        graph: The graph, pruned as it is shown: edges of nodes outside it do not count.
        similarity: The least cosine between the profiles of any two members, in (0, 1].
        apart: Ids of nodes that stay out, such as those that a person has grouped; their edges count.

    Returns:
        Name -> ids of its nodes, groups and nodes in the order of the graph's sites; each name once.

    Raises:
        GraphError: For a similarity outside (0, 1].
    """
    if not 0 < similarity <= 1:
        raise GraphError(f"similarity is {similarity}: it must be above 0 and at most 1")
    order = _in_order(graph)
    ids, profiles = _profiles(graph, order, leave_out=set(apart))
    if len(ids) < 2:
        return {}
    distances = np.clip(1.0 - profiles @ profiles.T, 0.0, 2.0)
    np.fill_diagonal(distances, 0.0)
    tree = linkage(squareform((distances + distances.T) / 2), method="complete")
    numbers = fcluster(tree, t=1.0 - similarity + 1e-9, criterion="distance")
    members: dict[int, list[str]] = {}
    for id, number in zip(ids, numbers.tolist(), strict=True):
        members.setdefault(number, []).append(id)
    groups = [nodes for nodes in members.values() if len(nodes) > 1]
    return dict(zip(_names(graph, groups), groups, strict=True))


def _in_order(graph: FeatureGraph) -> list[Node]:
    """The nodes by site, position and feature, whatever the order in which they were added."""
    positions = {position: number for number, position in enumerate(_positions(graph))}

    def key(node: Node) -> tuple[int, int, float]:
        feature = float("inf") if node.feature is None else node.feature
        number = -1 if node.position is None else positions[node.position]
        return graph.rank(node.id), number, feature

    return sorted(graph.nodes(), key=lambda node: (*key(node), node.id))


def _positions(graph: FeatureGraph) -> list[int | str]:
    """The positions of a graph; spans that its metadata do not order, by name."""
    given = list(graph.metadata.get("positions", ()))
    return sorted(graph.positions, key=lambda p: (given.index(p), "") if p in given else (len(given), f"{p:>9}"))


def _profiles(graph: FeatureGraph, order: Sequence[Node], leave_out: set[str]) -> tuple[list[str], np.ndarray]:
    """Ids of the features that have edges, and their profiles of length 1, [n, 2 N] for the N nodes of the graph."""
    column = {node.id: number for number, node in enumerate(order)}
    weights = np.zeros((len(order), len(order)))  # [source, target]
    for edge in graph.edges():
        weights[column[edge.source], column[edge.target]] = edge.weight
    features = [column[node.id] for node in order if node.kind == "feature" and node.id not in leave_out]
    halves = [_unit(weights.T[features]), _unit(weights[features])]
    profiles = _unit(np.concatenate(halves, axis=1))
    has_edges = np.flatnonzero(np.abs(profiles).sum(1) > 0)
    return [order[features[row]].id for row in has_edges], profiles[has_edges]


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)


# --- names ------------------------------------------------------------------------------------------------------------


def _names(graph: FeatureGraph, groups: Sequence[Sequence[str]]) -> list[str]:
    """A name for each group, none of them twice, without the signs that separate names of features."""
    given = [_name([graph.node(id) for id in group]) for group in groups]
    often = {name for name, n in Counter(map(slug, given)).items() if n > 1}
    names: dict[str, str] = {}
    for name, group in zip(given, groups, strict=True):
        name = f"{name} in {graph.node(group[0]).site}" if slug(name) in often else name
        numbered = (name if number == 1 else f"{name} {number}" for number in itertools.count(1))
        unique = next(name for name in numbered if slug(name) not in names)
        names[slug(unique)] = unique
    return list(names.values())


def _name(nodes: Sequence[Node]) -> str:
    labels = [_label(node) for node in nodes]
    shared = Counter(filter(None, labels)).most_common(1)
    if shared and 2 * shared[0][1] >= len(nodes):
        return shared[0][0]
    words: Counter[str] = Counter()
    spellings: dict[str, Counter[str]] = {}
    for node in nodes:
        of_node = {word.lower(): word for word in reversed(_words(node))}
        words.update(reversed(of_node))
        for lower, word in of_node.items():
            spellings.setdefault(lower, Counter())[word] += 1
    common = [word for word, _ in words.most_common(NAME_WORDS)]  # of equally common ones the first that occurred
    return " · ".join(spellings[word].most_common(1)[0][0] for word in common) or f"features of {nodes[0].site}"


def _label(node: Node) -> str:
    """The feature's name, in signs that a name may have."""
    return clean_name(visible(node.label or str(node.attributes.get("automatic_label") or "")))


def _words(node: Node) -> list[str]:
    tokens = (item[0] if isinstance(item, list | tuple) else item for item in node.attributes.get("top_tokens") or ())
    return [word for token in list(tokens)[:5] if (word := clean_name(visible(str(token)).strip()))]


def clean_name(text: str) -> str:
    """A text without the signs that mean something in names of features (`/`, `,`, `@`, `:`)."""
    return " ".join(re.sub(r"[/,@:]", " ", text).split())


def slug(name: str) -> str:
    """A name as it is easily typed: `Plural subject` is `plural-subject`."""
    return "-".join(re.findall(r"\w+", name.lower())) or name


def find_named(name: str, groups: Mapping[str, Sequence[str]]) -> str | None:
    """The name among the groups' that a person means: as it is, or as `slug` spells it; None where there is none."""
    name = name.removeprefix(PREFIX).strip()
    return name if name in groups else next((group for group in groups if slug(group) == slug(name)), None)

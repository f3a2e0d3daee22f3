"""Features that do the same, found by what they read and what they feed: supernodes.

1. A feature's profile is the row of its signed edge weights from every node, then to every node (the metric among
   them), each half of length 1 by itself, or zero where it has no such edge. The cosine of two profiles is 1 where the
   features read and feed the same nodes by the same shares, 0 where they have nothing in common, negative where they
   oppose each other.
2. Features are merged by complete linkage, as long as all pairs in a group have a cosine of at least `similarity`:
   each set by itself that such pairs hold together, for no group reaches beyond one. Profiles are sparse, and a block
   of rows at a time meets the others. Nodes stand in the order of site, position and feature, so that ties and sums
   come out the same in whatever order a graph lists them.
3. A group of two or more is named by the label that most of its members share, else by the tokens that most of them
   are on for.

Errors and the metric are in no group. After Neuronpedia's design for automatic supernodes (2026) and ADAG
(arXiv 2604.07615), which cluster by the same profiles.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from scipy import sparse
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import squareform

from graphs.drawing.style import visible
from graphs.errors import GraphError
from graphs.feature_graph import FeatureGraph, Node

SIMILARITY = 0.7
"""The least cosine of two members, by default."""
PREFIX = "supernode:"
"""Before the name of a supernode where names of features are meant as well."""
NAME_WORDS = 3
MOST = 10_000
"""Features that pairs hold together, at most: their distances take half a gigabyte."""
BLOCK = 2**22
"""Cosines that are computed at once."""


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
        GraphError: For a similarity outside (0, 1], or so low that very many features hang together.
    """
    if not 0 < similarity <= 1:
        raise GraphError(f"similarity is {similarity}: it must be above 0 and at most 1")
    ids, profiles = _profiles(graph, _in_order(graph), leave_out=set(apart))
    groups = [[ids[row] for row in rows] for rows in _clusters(profiles, 1.0 - similarity + 1e-9)]
    return dict(zip(_names(graph, groups), groups, strict=True))


def _clusters(profiles: sparse.csr_array, farthest: float) -> list[list[int]]:
    """Rows in groups of two or more by complete linkage, no two in a group farther apart than `farthest`; in order."""
    clusters: list[list[int]] = []
    for rows in _held_together(profiles, farthest):
        if len(rows) > MOST:
            raise GraphError(
                f"{len(rows)} features hang together by cosines of at least {1 - farthest:.3g}: at most {MOST} can be "
                "grouped; give a higher similarity, or fewer nodes"
            )
        distances = _distances(profiles[rows], profiles[rows])
        np.fill_diagonal(distances, 0.0)
        tree = linkage(squareform((distances + distances.T) / 2), method="complete")
        members: dict[int, list[int]] = {}
        for row, number in zip(rows.tolist(), fcluster(tree, t=farthest, criterion="distance").tolist(), strict=True):
            members.setdefault(number, []).append(row)
        clusters += [group for group in members.values() if len(group) > 1]
    return sorted(clusters)


def _held_together(profiles: sparse.csr_array, farthest: float) -> Iterator[np.ndarray]:
    """Sets of two or more rows between which pairs no farther apart than `farthest` lead from each to every other."""
    n = profiles.shape[0]
    step = max(1, BLOCK // max(n, 1))
    near = [sparse.csr_array(_distances(profiles[i : i + step], profiles) <= farthest) for i in range(0, n, step)]
    if not near:
        return
    n_sets, number = connected_components(sparse.vstack(near), directed=False)
    order = np.argsort(number, kind="stable")
    for rows in np.split(order, np.cumsum(np.bincount(number, minlength=n_sets))[:-1]):
        if len(rows) > 1:
            yield rows


def _distances(some: sparse.csr_array, others: sparse.csr_array) -> np.ndarray:
    """1 - cosine of every row of length 1 with every other, [n, m] in 0 to 2; ties stay ties, however sums round."""
    return np.clip((1.0 - (some @ others.T).toarray()).round(12), 0.0, 2.0)


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


def _profiles(graph: FeatureGraph, order: Sequence[Node], leave_out: set[str]) -> tuple[list[str], sparse.csr_array]:
    """Ids of the features that have edges, and their profiles of length 1, [n, 2 N] for the N nodes of the graph."""
    column = {node.id: number for number, node in enumerate(order)}
    edges = [(column[edge.source], column[edge.target], edge.weight) for edge in graph.edges()]
    source, target, weight = np.array(edges, dtype=float).reshape(-1, 3).T
    weights = sparse.csr_array((weight, (source.astype(int), target.astype(int))), shape=(len(order), len(order)))
    features = [column[node.id] for node in order if node.kind == "feature" and node.id not in leave_out]
    halves = [_unit(weights.T.tocsr()[features]), _unit(weights[features])]
    profiles = _unit(sparse.hstack(halves, format="csr"))
    has_edges = np.flatnonzero(abs(profiles).sum(1) > 0)
    return [order[features[row]].id for row in has_edges], profiles[has_edges]


def _unit(rows: sparse.csr_array) -> sparse.csr_array:
    norms = np.sqrt(rows.power(2).sum(1))
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    return sparse.csr_array(sparse.diags_array(inverse) @ rows)


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

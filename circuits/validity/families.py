"""Families of prompts: whether one mechanism is behind all of them, and if not, which prompts share which.

Legend: B prompts, n nodes, K families.

1. Prompts are clustered by their effect vectors [n], cosine distance and average linkage. Of the splits into 2 to
   `most` families, each of `MIN_FAMILY` prompts at least and `MIN_DISTANCE` apart, the one with the largest mean
   silhouette is looked at. Below `MIN_SILHOUETTE` there is no structure (Kaufman & Rousseeuw 1990).
2. Each family's circuit is found on half of its prompts, drawn by template where it has several.
3. On the other halves the faithfulness of every circuit on every family is measured. Other nodes prove no other
   mechanism unless the circuits fail to stand for one another (arXiv 2606.06267): the transfer is the mean metric that
   the circuits of other families restore, as a share of what the family's own restores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from sklearn.metrics import silhouette_score
from sklearn.metrics.pairwise import cosine_distances
from torch import Tensor

from circuits.attribution.activations import Setting
from circuits.attribution.nodes import Nodes, masked_nodes
from circuits.faithfulness.nodes import metrics_of_sets, set_up, shares
from circuits.options import ValidityOptions
from circuits.prompts.dataset import PromptSet
from circuits.uncertainty.bootstrap import Bootstrap, group_sums, too_few
from circuits.validity.overlap import Interval, NodeValues
from circuits.validity.results import Families

MIN_FAMILY = 6
"""Fewest prompts of a family: it is found on one half and measured on the other."""
MIN_SILHOUETTE = 0.25
"""Mean silhouette below which there are no families."""
MIN_DISTANCE = 0.2
"""Mean cosine distance of prompts of two families: nearer ones are one family, however well they are told apart."""
NAMED = 10
"""Nodes of a family that are named."""


@dataclass(frozen=True)
class Split:
    """Prompts in families."""

    labels: list[int]
    """The family of each prompt, from 0, the largest first."""
    likeness: float | None = None
    """Mean cosine of the effects of two prompts; None where there are too few prompts."""
    silhouette: float | None = None
    """Mean silhouette; None for one family."""


def cluster_prompts(values: Tensor, most: int) -> Split:
    """Families of prompts, `most` at most, by their effects [B, n]."""
    if len(values) < 2 * MIN_FAMILY:
        return Split([0] * len(values))
    distance = cosine_distances(values.double().numpy())
    likeness = 1 - float(squareform(distance, checks=False).mean())
    merges = linkage(squareform(distance, checks=False), "average")  # a row a merge, nearest first
    best: tuple[float, np.ndarray] | None = None
    for k in range(2, most + 1):
        labels = fcluster(merges, k, "maxclust") - 1
        apart = merges[1 - k, 2]  # the mean distance at which the first two of the k families would merge
        if labels.max() == k - 1 and np.bincount(labels).min() >= MIN_FAMILY and apart >= MIN_DISTANCE:
            score = float(silhouette_score(distance, labels, metric="precomputed"))
            best = (score, labels) if best is None or score > best[0] else best
    if best is None or best[0] < MIN_SILHOUETTE:
        return Split([0] * len(values), likeness)
    rank = {label: number for number, (label, _) in enumerate(Counter(best[1].tolist()).most_common())}
    return Split([rank[label] for label in best[1].tolist()], likeness, best[0])


@dataclass(frozen=True)
class Transfer:
    """How far circuits of families stand for one another."""

    families: Families
    """The families, with the matrix."""
    value: float | None = None
    """Share of what a family's own circuit restores that those of other families restore; None for one family."""
    interval: Interval | None = None
    """95 % interval of it."""


def find_families(
    setting: Setting, candidates: Nodes, nodes: NodeValues, prompts: PromptSet, options: ValidityOptions, *,
    progress: bool,
) -> Transfer:  # fmt: skip
    """Cluster the prompts of a discovery, and measure the circuit of each family on each.

    Args:
        setting: model, SAEs and metric.
        candidates: the nodes that `nodes` names, site by site.
        nodes: their effects on every prompt.
        prompts: the prompts of the discovery.
        options: how many families there may be, and how nodes are ablated.
        progress: whether to show a progress bar.
    """
    split = cluster_prompts(nodes.values, options.families)
    family = torch.tensor(split.labels)
    n_families = int(family.max()) + 1
    sets = [nodes.strongest(options.nodes, _half(family == number, nodes.groups, 0)) for number in range(n_families)]
    faithful, value, interval = [], None, None
    if n_families > 1:
        measured = torch.cat([_half(family == number, nodes.groups, 1) for number in range(n_families)])
        chosen = [(masked_nodes(candidates, keep), True) for keep in sets]
        every, tested, reference, _ = set_up(setting, candidates, prompts[measured], prompts, options)
        m = metrics_of_sets(
            setting, chosen, tested, options, nodes=every, reference=reference, seed=options.seed,
            batch_size=options.batch_size, progress=progress,
        )  # fmt: skip
        faithful = [shares(m[:, family[measured] == number].mean(1)).tolist() for number in range(n_families)]
        value, interval = _transfer(m, family[measured], nodes.groups[measured], options)
    return Transfer(_described(split, sets, faithful, nodes, prompts), value, interval)


def _half(inside: Tensor, groups: Tensor, half: int) -> Tensor:
    """Numbers of every other prompt, or of the prompts of every other template where there are several of them."""
    rows = inside.nonzero()[:, 0]
    number = groups[rows].unique(return_inverse=True)[1]
    number = number if int(number.max()) > 0 else torch.arange(len(rows))
    return rows[number % 2 == half]


def _transfer(m: Tensor, family: Tensor, groups: Tensor, options: ValidityOptions) -> tuple[float, Interval | None]:
    """The share of a family's behaviour that other families' circuits restore, of what its own restores, from m [2 + K,
    B], with its interval.
    """
    gained = (m[2:] - m[1]).T  # [B, K]
    by_own = gained.gather(1, family[:, None])[:, 0]
    others = (gained.sum(1) - by_own) / (gained.shape[1] - 1)
    value = float(others.sum() / by_own.sum())
    groups = groups.unique(return_inverse=True)[1]
    if too_few(groups):
        return value, None
    bootstrap = Bootstrap(resamples=options.resamples, seed=options.seed)
    low, high = bootstrap.intervals(group_sums(others[:, None], groups), group_sums(by_own, groups))[0].tolist()
    return value, (low, high) if low == low else None


def _described(
    split: Split, sets: Sequence[Tensor], faithful: list[list[float]], nodes: NodeValues, prompts: PromptSet
) -> Families:
    """The families in words."""
    family = torch.tensor(split.labels)
    members = [(family == number).nonzero()[:, 0].tolist() for number in range(len(sets))]
    names = []
    for number, keep in enumerate(sets):
        others = torch.stack([other for n, other in enumerate(sets) if n != number] or [torch.zeros_like(keep)]).any(0)
        strength = nodes.values[members[number]].mean(0).abs() * (keep & ~others)
        order = strength.argsort(descending=True)[: min(NAMED, int((strength > 0).sum()))]
        names.append([nodes.names[column] for column in order.tolist()])
    return Families(
        **vars(split),
        sizes=[len(rows) for rows in members],
        cases=[dict(Counter(prompts.cases[row] or "prompts" for row in rows)) for rows in members],
        templates=[dict(Counter(prompts.templates[row] for row in rows)) for rows in members],
        examples=[prompts.texts[_most_like(nodes.values, rows)] for rows in members],
        faithfulness=faithful,
        names=names,
    )


def _most_like(values: Tensor, rows: Sequence[int]) -> int:
    """The prompt whose effects are nearest to the mean of these, by cosine."""
    unit = torch.nn.functional.normalize(values[rows], dim=1)
    return rows[int((unit @ unit.mean(0)).argmax())]

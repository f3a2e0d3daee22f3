"""Groups of features that form a plane together: circles and the like, of which each feature is a piece.

Method: Engels et al. 2024, "Not all language model features are one-dimensionally linear" (arXiv 2405.14860).

1. Two features of a site are linked where one is among the `NEIGHBOURS` most alike of the other, by decoder cosine (at
   least `COSINE`) or by when they fire (correlation of firing or not over tokens, at least `TOGETHER`). Groups are what
   hangs together, of at most `LARGEST` features.
2. What a group writes on a token is Σ f_i W_dec_i over its features, for the tokens on which any is active. Its first
   principal components give planes: 1 and 2, 2 and 3, ...
3. A plane is tested by `sae.features.reducibility`. A group is *irreducible* where one of its planes is, both of whose
   components matter, and its features mostly fire together: where they fire one at a time they are as many lines, which
   the mixture index tells for a few of them only.

Rare features say too little, and those that fire on a tenth of the tokens go with everything: both are left out.

Shapes: N tokens, F features, n tokens of a group, m features of a group, d model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sae._files import without_nan
from sae._frames import Result, frame_text
from sae.autoencoder import SparseAutoencoder, SparseFeatures
from sae.data.text import TextSource
from sae.features.matching import nearest_features
from sae.features.reading import read_features
from sae.features.reducibility import Reducibility, reducibility
from sae.model.language_model import LanguageModel
from sae.model.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csr_matrix

NEIGHBOURS, COSINE, TOGETHER = 2, 0.5, 0.3
LARGEST = 100
MIN_FIRES, MOST_FIRES = 30, 0.1
"""Tokens on which a feature must fire, and the share of all on which it may."""
MIN_TOKENS, MAX_TOKENS = 200, 20_000
"""Tokens of a group that planes are tested on."""
MOST_TOKENS = 100_000
"""Tokens of a text that are read."""
COMPONENTS = 4
SHARE_OF_PLANE = 0.1
"""Least share of a plane's variance that its second component has."""
SHARE_OF_GROUP = 0.2
"""Least share of a group's variance that a plane has."""
MOST_ALONE = 0.5
"""Largest share of tokens on which a single feature of an irreducible group fires."""
SHOWN = 400
"""Points of a plane that are kept for drawing."""
IRREDUCIBLE = "irreducible"
BLOCK = 256
"""Features whose firing is compared with all others at once."""


@dataclass(frozen=True)
class Plane:
    """A plane of a group's joint activations."""

    components: tuple[int, int]
    """Numbers of its principal components, from 1 on."""
    share: float
    """Share of the group's variance that is in the plane."""
    second: float
    """Share of the plane's variance that its second component has."""
    test: Reducibility
    """Its two indices."""


@dataclass(frozen=True)
class FeatureGroup:
    """Features of one site that are alike or fire together."""

    site: str
    """Site."""
    features: list[int]
    """The features, those that fire most first."""
    tokens: int
    """Tokens on which any of them fires."""
    alone: float
    """Share of these on which only one does."""
    planes: list[Plane]
    """Planes that were tested; none where too few tokens are active."""
    points: list[tuple[float, float, int]] = field(default_factory=list)
    """Some points of the best plane, each with the number among `features` of the strongest there."""
    token_ids: list[int] = field(default_factory=list)
    """The token at each point."""

    @property
    def best(self) -> Plane | None:
        """The plane that is most one thing."""
        good = [one for one in self.planes if one.second >= SHARE_OF_PLANE and one.share >= SHARE_OF_GROUP]
        return max(good or self.planes[:1], key=lambda plane: plane.test.score, default=None)

    @property
    def verdict(self) -> str:
        """The verdict on the group in a word: irreducible, or why not."""
        plane = self.best
        if plane is None:
            return "untested"
        reasons = {
            "one line": plane.second < SHARE_OF_PLANE,
            "one feature at a time": self.alone > MOST_ALONE,
            "independent": plane.test.is_product,
            "a mixture": plane.test.is_mixture,
        }
        return next((reason for reason, holds in reasons.items() if holds), IRREDUCIBLE)

    @property
    def is_irreducible(self) -> bool:
        """Whether the group is neither a product nor a mixture of one-dimensional features."""
        return self.verdict == IRREDUCIBLE


@dataclass(frozen=True)
class FeatureGroups(Result):
    """The groups of some sites, most irreducible first."""

    groups: list[FeatureGroup]
    """Groups whose planes were tested."""
    n_tokens: int
    """Tokens of the text that count."""
    untested: dict[str, int]
    """By site, groups of which too few tokens were seen, or that are too large."""
    strings: dict[int, str] = field(default_factory=dict)
    """The text of the tokens at points."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        data = asdict(self)
        for group, entry in zip(self.groups, data["groups"], strict=True):
            entry["verdict"] = group.verdict
        data["strings"] = {str(token): string for token, string in self.strings.items()}
        return {"schema_version": 1, **without_nan(data)}

    def to_frame(self) -> pd.DataFrame:
        """A row a group: its features, and the indices of its best plane with their intervals."""
        import pandas as pd

        rows = []
        for group in self.groups:
            plane = group.best
            assert plane is not None
            test = plane.test
            rows.append({
                "site": group.site, "features": " ".join(map(str, group.features[:5])), "n": len(group.features),
                "tokens": group.tokens, "alone": group.alone, "plane": "-".join(map(str, plane.components)),
                "share": plane.share, "separability": test.separability, "chance": test.chance,
                "mixture": test.mixture, "verdict": group.verdict,
            })  # fmt: skip
        columns = ["site", "features", "n", "tokens", "alone", "plane", "share", "separability", "chance", "mixture",
                   "verdict"]  # fmt: skip
        return pd.DataFrame(rows, columns=columns)

    def text(self) -> str:
        """The first groups as a table, and how many there are."""
        n = sum(group.is_irreducible for group in self.groups)
        left = sum(self.untested.values())
        head = f"{len(self.groups)} groups of features tested on {self.n_tokens:,} tokens, {n} of them irreducible"
        head += f"; {left} others are too rare or too large to test" if left else ""
        return f"{head}\n{frame_text(self.to_frame().head(12))}" if self.groups else head


@torch.no_grad()
def find_groups(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    texts: str | Path | TextSource | Iterable[str],
    *,
    sites: Sequence[Site] | None = None,
    max_tokens: int = MOST_TOKENS,
    batch_size: int = 16,
    context: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> FeatureGroups:
    """Find groups of features that form a plane together, such as a circle.

    Args:
        model: the model.
        saes: its autoencoders by site.
        texts: the text that is read.
        sites: sites that are looked at; all of `saes` by default.
        max_tokens, batch_size, context: as in `evaluate_saes`.
        progress: called after each batch with its number of tokens.

    Returns:
        The groups that were tested, irreducible ones first, by how much each is one thing.

    Raises:
        UserError: the text is empty.
    """
    chosen = list(saes if sites is None else sites)
    reading = read_features(
        model, saes, texts, chosen, max_tokens=max_tokens, batch_size=batch_size, context=context, progress=progress
    )
    groups, untested, n_tokens = list[FeatureGroup](), dict[str, int](), reading.n_tokens
    for site, f in reading.features.items():
        W_dec = saes[site].W_dec.float().cpu()
        groups_here, left = groups_of(f, n_tokens, W_dec, site=site.name, token_ids=reading.token_ids)
        groups += groups_here
        untested[site.name] = left
    groups.sort(key=lambda group: (not group.is_irreducible, -(group.best.test.score if group.best else 0)))
    seen = sorted({token for group in groups for token in group.token_ids})
    strings = dict(zip(seen, model.token_strings(seen), strict=True))
    return FeatureGroups(groups, n_tokens, {site: n for site, n in untested.items() if n}, strings)


def groups_of(
    f: SparseFeatures, n_tokens: int, W_dec: Tensor, *, site: str = "", token_ids: Tensor | None = None
) -> tuple[list[FeatureGroup], int]:
    """The groups of one dictionary from its nonzero activations over N tokens; and how many could not be tested.

    W_dec: [F, d] unit rows; token_ids: [N] which token each is.
    """
    from scipy.sparse import csr_matrix

    rows = (f.token.numpy(), f.feature.numpy())
    active = csr_matrix((f.value.double().numpy(), rows), shape=(n_tokens, len(W_dec)))
    fires = np.bincount(f.feature.numpy(), minlength=len(W_dec))
    usable = np.flatnonzero((fires >= MIN_FIRES) & (fires <= MOST_FIRES * n_tokens))
    groups, untested = [], 0
    for members in _components(_links(active[:, usable], W_dec[usable])):
        features = usable[members]
        features = features[np.argsort(-fires[features], kind="stable")]
        group = _group(site, features, active, W_dec, token_ids) if len(features) <= LARGEST else None
        groups += [group] if group is not None and group.planes else []
        untested += group is None or not group.planes
    return groups, untested


def _links(active: csr_matrix, W_dec: Tensor) -> np.ndarray:
    """Pairs of features that are alike or fire together, [links, 2], of activations [N, F]."""
    n = active.shape[1]
    if n < 2:
        return np.zeros((0, 2), dtype=int)
    cosine, nearest = nearest_features(W_dec, torch.arange(n), k=NEIGHBOURS)
    first, which = (cosine >= COSINE).nonzero(as_tuple=True)
    pairs = [np.stack([first.numpy(), nearest[first, which].numpy()], axis=1)]
    fired = (active != 0).astype(np.float64)
    rate = np.asarray(fired.mean(0)).ravel()
    spread = np.sqrt(rate * (1 - rate))
    for start in range(0, n, BLOCK):
        block = slice(start, start + BLOCK)
        together = (fired[:, block].T @ fired).toarray() / active.shape[0]  # [block, F]
        phi = (together - np.outer(rate[block], rate)) / np.outer(spread[block], spread)
        phi[np.arange(len(phi)), np.arange(start, start + len(phi))] = -1
        best = np.argsort(-phi, axis=1, kind="stable")[:, :NEIGHBOURS]
        row, column = np.nonzero(np.take_along_axis(phi, best, axis=1) >= TOGETHER)
        pairs.append(np.stack([row + start, best[row, column]], axis=1))
    return np.concatenate(pairs)


def _components(pairs: np.ndarray) -> list[np.ndarray]:
    """Components of two or more that the pairs connect."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    if not len(pairs):
        return []
    n = int(pairs.max()) + 1
    graph = coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    labels = connected_components(graph, directed=False)[1]
    order = np.argsort(labels, kind="stable")
    components = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    return [part for part in components if len(part) > 1]


def _group(
    site: str, features: np.ndarray, active: csr_matrix, W_dec: Tensor, token_ids: Tensor | None
) -> FeatureGroup:
    """A group with the planes of what it writes."""
    of_group = active[:, features]
    some = np.flatnonzero(np.diff(of_group.indptr))
    n_active = np.diff(of_group.indptr)[some]
    alone = float((n_active == 1).mean()) if len(some) else 0.0
    group = FeatureGroup(site, features.tolist(), len(some), alone, [])
    if len(some) < MIN_TOKENS:
        return group
    draw = np.random.default_rng(0)
    chosen = np.sort(draw.choice(some, min(len(some), MAX_TOKENS), replace=False))
    values = of_group[chosen].toarray()  # [n, m]
    written = values @ W_dec[features].double().numpy()  # [n, d]
    centred = written - written.mean(0)
    variances, axes = np.linalg.eigh(centred.T @ centred / len(centred))
    variances, axes = variances[::-1], axes[:, ::-1]
    coordinates = centred @ axes[:, :COMPONENTS]
    for first in range(min(COMPONENTS, len(features)) - 1):
        both = variances[first : first + 2]
        if both[1] <= 1e-9 * variances[0]:
            break
        test = reducibility(coordinates[:, first : first + 2])
        plane = Plane((first + 1, first + 2), float(both.sum() / variances.sum()), float(both[1] / both.sum()), test)
        group.planes.append(plane)
    if (best := group.best) is not None:
        shown = np.sort(draw.choice(len(chosen), min(len(chosen), SHOWN), replace=False))
        xy, strongest = coordinates[shown][:, [c - 1 for c in best.components]], values[shown].argmax(1)
        group.points.extend((float(x), float(y), int(i)) for (x, y), i in zip(xy, strongest, strict=True))
        if token_ids is not None:
            group.token_ids.extend(token_ids[chosen[shown]].tolist())
    return group

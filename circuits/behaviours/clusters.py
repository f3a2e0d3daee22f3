"""Clusters of contexts, and which of them come first.

1. Vectors are made short by truncated SVD or a sparse random projection (Achlioptas 2003), z_i of unit length.
2. They are clustered by scikit-learn: average linkage by cosine distance, to a number of clusters or while two are as
   alike as is asked for; spectral clustering of the angular similarity
   1 - arccos(z_i . z_j) / pi (Michaud et al. 2023); or mini-batch k-means. The first two
   take N^2 numbers: of more than `MOST` contexts, average linkage joins `CENTRES` centres of k-means, unless so many
   clusters are asked for.
3. Clusters are ranked by purity times size, see `Cluster`.

Legend: N contexts, D length of a vector, K clusters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.cluster import AgglomerativeClustering, MiniBatchKMeans, SpectralClustering
from sklearn.decomposition import TruncatedSVD
from sklearn.preprocessing import normalize
from sklearn.random_projection import SparseRandomProjection

from circuits.behaviours.options import BehaviourSearchOptions

MOST = 4000
"""Contexts that average linkage takes one by one."""
CENTRES = 1500
"""Centres of k-means that average linkage joins where there are more."""
ANSWERS = 8
"""Answers of a cluster that are listed."""
Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class Cluster:
    """Contexts that the model predicts in the same way.

    With n members of N contexts, z_i their unit vectors, and p_t the share of the members whose answer is t:

        purity = |1/n Σ_i z_i|² = 1/n² Σ_ij z_i . z_j      in [0, 1], the mean cosine of two members
        size = n / N
        score = purity · log2(n)                           by which clusters are ranked
        answer_purity = max_t p_t                          the share of the commonest answer
    """

    rank: int
    """1 for the first."""
    members: list[int]
    """Numbers of its contexts, nearest to its middle first."""
    purity: float
    """Mean cosine of two members."""
    size: float
    """Its share of the contexts."""
    score: float
    """The number that clusters are ranked by."""
    answers: list[tuple[str, int]]
    """The commonest answers with their counts."""
    answer_purity: float
    """Share of the commonest answer."""

    @property
    def name(self) -> str:
        """`cluster_01`, the folder of its circuit."""
        return f"cluster_{self.rank:02}"


def project(vectors: sp.csr_matrix, options: BehaviourSearchOptions) -> Floats:
    """Short vectors of unit length, [N, D]; those of all zeros stay so."""
    n = min(options.dimensions, vectors.shape[1] - 1, max(1, vectors.shape[0] - 1))
    if options.project == "random":
        projected = SparseRandomProjection(n, random_state=options.seed, dense_output=True).fit_transform(vectors)
    else:
        projected = TruncatedSVD(n, random_state=options.seed).fit_transform(vectors)
    return normalize(projected.astype(np.float64))


def cluster_vectors(z: Floats, options: BehaviourSearchOptions) -> Integers:
    """The number of the cluster of each unit vector, [N]."""
    n = None if options.n_clusters is None else min(options.n_clusters, len(z))
    if len(z) == 1 or n == 1:
        return np.zeros(len(z), dtype=np.int64)
    joins = options.cluster == "agglomerative" and (len(z) <= MOST or (n or 0) < CENTRES)
    if n is not None and options.cluster != "spectral" and not joins:
        return _kmeans(z, n, options.seed).labels_.astype(np.int64)
    if n is not None and options.cluster == "spectral":
        alike = 1 - np.arccos(np.clip(z @ z.T, -1, 1)) / np.pi
        return SpectralClustering(n, affinity="precomputed", random_state=options.seed).fit_predict(alike)
    if len(z) <= MOST:
        return _linked(z, n, options.least_alike)
    centres = _kmeans(z, CENTRES, options.seed)
    return _linked(normalize(centres.cluster_centers_), n, options.least_alike)[centres.labels_]


def _kmeans(z: Floats, n: int, seed: int) -> MiniBatchKMeans:
    return MiniBatchKMeans(n, random_state=seed, n_init=3, batch_size=max(1024, 2 * n)).fit(z)


def _linked(z: Floats, n: int | None, likeness: float) -> Integers:
    """Average linkage by cosine distance, down to n clusters, or without n while they are as alike as said; a vector of
    zeros is as far from all as can be without being opposite.
    """
    distance = np.clip(1 - z @ z.T, 0, 2)
    np.fill_diagonal(distance, 0)
    count = {"n_clusters": n, "distance_threshold": 1 - likeness if n is None else None}
    return AgglomerativeClustering(**count, metric="precomputed", linkage="average").fit_predict(distance)


def ranked_clusters(z: Floats, labels: Integers, answers: Sequence[str]) -> list[Cluster]:
    """The clusters of unit vectors z [N, D] with labels [N], in order of rank; answers: that of each context."""
    clusters = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        middle = z[members].mean(0)
        purity = float(middle @ middle)
        nearest = members[np.argsort(-(z[members] @ middle), kind="stable")]
        counts = Counter(answers[i] for i in members.tolist()).most_common()
        clusters.append(
            Cluster(
                rank=0,
                members=nearest.tolist(),
                purity=purity,
                size=len(members) / len(z),
                score=purity * float(np.log2(len(members))),
                answers=counts[:ANSWERS],
                answer_purity=counts[0][1] / len(members),
            )
        )
    clusters.sort(key=lambda cluster: (-cluster.score, cluster.members))
    return [Cluster(**{**vars(cluster), "rank": rank}) for rank, cluster in enumerate(clusters, 1)]

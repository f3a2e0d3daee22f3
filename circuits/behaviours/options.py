"""Options of `sfc behaviours`; no torch is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from circuits.options import Method
from sae._options import ContextLength, Count, Gibibytes, Magnitude, Positive, Seed, Share, TokenCount, check_options
from sae.errors import UserError

Represent = Literal["effects", "activations", "gradients"]
Project = Literal["svd", "random"]
Clustering = Literal["agglomerative", "spectral", "kmeans"]
CLUSTERS, LIKENESS = 20, 0.25


@dataclass(frozen=True)
class BehaviourSearchOptions:
    """Which contexts are taken, what makes two of them alike, and what is found of each cluster."""

    surprise: Magnitude = 0.5
    """Contexts are those whose next token the model predicts with -log p below this, in nats."""
    tokens: TokenCount = 50_000
    """Tokens of the text that are read for contexts."""
    contexts: Positive = 2000
    """Contexts drawn at random from those that are predicted well, at most."""
    context_length: ContextLength = 64
    """Tokens of a document that are read, its first."""
    represent: Represent = "effects"
    """What a context is represented by: effects (of features on log p of the next token, by attribution patching),
    activations (of features), or gradients (of log p, at the last token of every site).
    """
    project: Project = "svd"
    """How the vectors are made short: svd (truncated) or random (sparse random projection)."""
    dimensions: Positive = 100
    """Length of the projected vectors."""
    cluster: Clustering = "agglomerative"
    """Method: agglomerative (average linkage by cosine; of more than 4,000 contexts it joins the centres of mini-batch
    k-means), spectral (angular similarity; for a few thousand contexts), or kmeans (mini-batch).
    """
    clusters: Positive | None = None
    """How many clusters; by default as many as likeness leaves, or 20 where activations or other methods are clustered.
    """
    likeness: Share | None = None
    """How alike clusters are that are still joined, in place of a number of clusters: the mean cosine between their
    members, 0.25 by default; for agglomerative alone.
    """
    circuits: Count = 10
    """Clusters that get a circuit, the highest in rank; 0 for none."""
    examples: Positive = 40
    """Contexts of a cluster on which its circuit is found, those nearest to its middle."""
    nodes: Positive = 60
    """Strongest nodes of a circuit, among which edges are computed."""
    method: Method = "attrib"
    """Node method of the circuits, as in sfc discover."""
    memory: Gibibytes = 2.0
    """Budget in GiB for what the model keeps during a forward and backward pass."""
    seed: Seed = 0
    """Seed of the draw, the projection and the clustering."""

    def __post_init__(self) -> None:
        check_options(self)
        if self.likeness is not None and self.cluster != "agglomerative":
            raise UserError(f"likeness is {self.likeness:g}: for the clustering agglomerative, not {self.cluster}")
        if self.likeness is not None and self.clusters is not None:
            raise UserError(f"clusters is {self.clusters} and likeness {self.likeness:g}: give one of them")

    @property
    def n_clusters(self) -> int | None:
        """How many clusters are made; None where `least_alike` decides. Activations are never negative, and so all are
        alike: their number is fixed.
        """
        if self.clusters is not None or self.likeness is not None:
            return self.clusters
        return None if self.cluster == "agglomerative" and self.represent != "activations" else CLUSTERS

    @property
    def least_alike(self) -> float:
        """The mean cosine between the members of two clusters below which they are not joined."""
        return LIKENESS if self.likeness is None else self.likeness

"""Behaviours as a table, for JSON, for the terminal and as a page from which each circuit opens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader
from sklearn.metrics import adjusted_mutual_info_score

from circuits.attribution.nodes import ranked
from circuits.behaviours.clusters import Cluster
from circuits.behaviours.contexts import Contexts
from circuits.behaviours.options import BehaviourSearchOptions
from circuits.circuit import Circuit
from graphs.drawing.style import describe, visible
from sae._files import write_text
from sae._frames import Result, frame_text
from sae._run.outputs import check_output, has_mark

SHOWN = 6
"""Contexts of a cluster, and features of its circuit, on the page."""
WINDOW = 90
"""Characters of a context that are shown, its last."""


@dataclass(frozen=True)
class Behaviours(Result):
    """Clusters of contexts that a model predicts well, and circuits of the first of them."""

    contexts: Contexts
    """The contexts."""
    clusters: list[Cluster]
    """In order of rank."""
    circuits: dict[int, Circuit] = field(repr=False)
    """By rank of the cluster; effects in nats of -log p of the answer."""
    options: BehaviourSearchOptions
    """How they were found."""
    answers: list[str] = field(repr=False)
    """The next token of each context, as text."""

    @property
    def labels(self) -> list[int]:
        """Rank of the cluster of each context."""
        labels = [0] * len(self.contexts)
        for cluster in self.clusters:
            for member in cluster.members:
                labels[member] = cluster.rank
        return labels

    def agreement(self, truth: Sequence[str]) -> float:
        """Adjusted mutual information (Vinh et al. 2010) with a known behaviour of each context: 1 for the same
        partition, 0 for what chance gives.

        Args:
            truth: a name for each context, in their order; `contexts.document` and `contexts.position` say which token
                each predicts.
        """
        return float(adjusted_mutual_info_score(list(truth), self.labels))

    def to_frame(self) -> pd.DataFrame:
        """A row a cluster, in order of rank: contexts, purity, share of the commonest answer, answers, an example."""
        rows = [
            {
                "rank": cluster.rank,
                "contexts": len(cluster.members),
                "purity": cluster.purity,
                "score": cluster.score,
                "commonest": cluster.answer_purity,
                "answers": " · ".join(visible(answer).strip() for answer, _ in cluster.answers[:5]),
                "example": self._window(cluster.members[0], 40),
            }
            for cluster in self.clusters
        ]
        return pd.DataFrame(rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: clusters with all of their contexts."""
        contexts, texts = self.contexts, self.contexts.prompts.texts
        clusters = []
        for cluster in self.clusters:
            members = [
                {
                    "text": texts[i], "answer": self.answers[i], "surprise": contexts.surprise[i],
                    "document": contexts.document[i], "position": contexts.position[i],
                }
                for i in cluster.members
            ]  # fmt: skip
            clusters.append({**asdict(cluster), "members": members, "circuit": self._circuit_folder(cluster)})
        return {
            "schema_version": 1,
            "options": asdict(self.options),
            "n_tokens": contexts.n_tokens,
            "n_below": contexts.n_below,
            "n_contexts": len(contexts),
            "clusters": clusters,
        }

    def text(self) -> str:
        """A line on the tokens that were looked at, and a line a cluster."""
        return "\n".join([self.summary(), "", frame_text(self.to_frame(), {"purity": 2, "score": 2, "commonest": 2})])

    def summary(self) -> str:
        """One line: of how many tokens how many were predicted well, and what became of them."""
        contexts = self.contexts
        return (
            f"{contexts.n_below:,} of {contexts.n_tokens:,} next tokens have -log p below {self.options.surprise:g}; "
            f"{len(contexts):,} of them in {len(self.clusters)} clusters by {self.options.represent}"
        )

    def write_page(self, folder: str | Path, *, title: str = "Behaviours", overwrite: bool = False) -> Path:
        """Write `index.html` with every cluster, and the explorer of every circuit beside it.

        Args:
            folder: where circuits are, as `find_behaviours` was given it.
            title: heading of the page.
            overwrite: whether files of these names are replaced that this program did not write.

        Returns:
            The page.
        """
        folder = Path(folder)
        page = folder / "index.html"
        check_output(page, has_mark(".html"), overwrite=overwrite)
        links = {}
        for rank, circuit in self.circuits.items():
            path = folder / self.clusters[rank - 1].name / "graph" / "circuit.html"
            path.parent.mkdir(parents=True, exist_ok=True)
            circuit.explore(path, nodes=self.options.nodes, overwrite=overwrite)
            links[rank] = os.path.relpath(path, folder)
        environment = Environment(loader=PackageLoader(__package__), autoescape=True, trim_blocks=True)
        cards = [self._card(cluster, links.get(cluster.rank)) for cluster in self.clusters]
        write_text(page, environment.get_template("behaviours.html.j2").render(title=title, found=self, cards=cards))
        return page

    def _card(self, cluster: Cluster, link: str | None) -> dict[str, Any]:
        """The card of a cluster on the page."""
        n = len(cluster.members)
        answers = [(visible(answer).strip() or "space", count / n) for answer, count in cluster.answers]
        distinct = dict.fromkeys((self._window(i, WINDOW), visible(self.answers[i])) for i in cluster.members)
        lines = list(distinct)[:SHOWN]
        circuit = self.circuits.get(cluster.rank)
        features = []
        if circuit is not None:
            graph = circuit._shown(self.options.nodes, 0)
            strongest = {s: nodes[nodes.is_feature] for s, nodes in circuit.strongest(self.options.nodes).items()}
            shown = [name for name, _ in ranked(strongest)][:SHOWN]
            nodes = [graph.node(name) for name in shown if name in graph]
            features = [(node.id, describe(graph, node), node.effect) for node in nodes]
        return {"cluster": cluster, "answers": answers, "lines": lines, "features": features, "link": link}

    def _window(self, number: int, width: int) -> str:
        """The end of a context."""
        text = visible(self.contexts.prompts.texts[number])
        return text if len(text) <= width else f"…{text[-width:]}"

    def _circuit_folder(self, cluster: Cluster) -> str | None:
        return f"{cluster.name}/circuit" if cluster.rank in self.circuits else None

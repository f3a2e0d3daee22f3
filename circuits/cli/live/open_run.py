"""A run as the pages of `sfc serve` show it: its circuit, feature pages, names of features and earlier edits."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from circuits.circuit import Circuit, circuit_folder
from circuits.cli.commands.pictures.render import ExploreCommand
from circuits.cli.options import RunsCircuit
from circuits.editing.results import EditReport
from circuits.feature_pages import FOLDER, PAGE_FILE, read_index, write_page
from circuits.labels import LabelsFile
from graphs.drawing.style import describe
from graphs.explorer import explorer_html
from graphs.feature_graph import FeatureGraph
from sae._files import read_json, read_text
from sae._run.locks import lock
from sae.errors import UserError
from sae.model.language_model import LanguageModel

MOST_TOKENS = 1024
"""Longest prompt that is read, where the model could read longer ones."""


@dataclass
class OpenRun:
    """A run with its model loaded."""

    options: RunsCircuit
    """What the run was opened with."""
    circuit: Circuit
    text: str | None = None
    """Held-out text on which side effects are measured."""
    texts: int = 50
    """Texts read of it."""
    pages: dict[str, str] = field(default_factory=dict)
    """Explorers of circuits that were found here, by id."""

    @property
    def model(self) -> LanguageModel:
        return self.circuit.model

    @cached_property
    def run(self) -> Path:
        """The run folder."""
        return circuit_folder(self.options.circuit).parent

    @property
    def longest(self) -> int:
        """Most tokens of a prompt."""
        return min(MOST_TOKENS, self.model.max_positions or MOST_TOKENS)

    @cached_property
    def explorer(self) -> str:
        """The run's circuit as a page of the explorer."""
        return explorer_html(self.graph)

    @cached_property
    def graph(self) -> FeatureGraph:
        """The run's circuit as the explorer shows it."""
        return ExploreCommand(circuit=self.run).graph()

    @property
    def labels(self) -> LabelsFile:
        """Labels of features, for all circuits of these autoencoders."""
        return LabelsFile.of(self.circuit.metadata, self.run)

    def overview(self) -> dict[str, Any]:
        """The page before anything was asked: the run, its strongest features, and their names."""
        metadata, graph = self.circuit.metadata, self.graph
        strongest = sorted(
            (node for node in graph.nodes() if node.kind == "feature"), key=lambda node: -abs(node.effect)
        )
        words = {node.name: describe(graph, node) for node in strongest}
        effects: dict[str, float] = {}
        for node in strongest:
            effects[node.name] = effects.get(node.name, 0.0) + node.effect
        index = self._page_index()
        return {
            "title": str(metadata.get("title") or self.run.resolve().name),
            "run": str(self.options.circuit),
            "model": self.model.name,
            "sites": [site.name for site in self.circuit.saes],
            "features": [{"name": name, "words": words[name], "effect": effects[name]} for name in effects],
            "labels": {name: line["label"] for name, line in self.labels.read().items()},
            "with_page": [] if index is None else index["features"],
            "pairs": metadata.get("example_pairs", []),
            "text": Path(self.text).name if self.text else None,
            "texts": self.texts,
            "longest": self.longest,
        }

    def _page_index(self) -> dict[str, Any] | None:
        if not (self.run / FOLDER / PAGE_FILE).is_file():
            return None
        return read_index(self.run, self.circuit.metadata.get("saes_fingerprint"))

    def features_page(self) -> str:
        """The page of features that `sfc features` wrote, with the names given since then.

        Raises UserError where there is none of these SAEs.
        """
        if self._page_index() is None:
            raise UserError("this run has no feature pages of its autoencoders: make them with sfc features")
        page, names = self.run / FOLDER / PAGE_FILE, self.labels.path
        if names.is_file() and names.stat().st_mtime > page.stat().st_mtime:
            with lock(page.parent):
                write_page(self.run)
        return read_text(page)

    def name_feature(self, feature: str, label: str) -> dict[str, Any]:
        """Write down what a feature is called, as `sfc labels` does; an empty label takes the name away.

        Returns:
            The overview with the new name.
        """
        site, _, index = feature.partition("/")
        widths = {name.name: effects.n_features for name, effects in self.circuit.effects.items()}
        if site not in widths or not index.isdecimal() or int(index) >= widths[site]:
            raise UserError(f"{feature!r} is no feature here: write site/index, such as {next(iter(widths))}/0")
        with lock(self.labels.path.parent, shared=True):
            self.labels.add({feature: label}, by="a person")
        for shown in ("graph", "explorer"):
            self.__dict__.pop(shown, None)  # they show the name when they are asked for again
        return self.overview()

    def done(self) -> list[dict[str, Any]]:
        """The edits of the run, newest first: name, title and the share left; what is wrong with a damaged file."""
        entries: list[dict[str, Any]] = []
        for path in sorted((self.run / "edits").glob("*.json"), key=lambda path: -path.stat().st_mtime)[:100]:
            try:
                data = read_json(path)
                if data.get("kind") != "edit":
                    continue
                report = EditReport.from_dict(data, path)
            except UserError as error:
                entries.append({"name": path.stem, "title": str(error), "left": None, "prompt": ""})
            else:
                prompt = report.continuations[0].prompt if report.n_prompts == 1 and report.continuations else ""
                entries.append({"name": path.stem, "title": report.title(), "left": report.remaining, "prompt": prompt})
        return entries

"""`sfc labels`: what features are called, and their contexts for whoever names them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from circuits.cli.options import Output, Prints
from circuits.cli.results import output_file
from sae._options import Range
from sae._run.locks import lock
from sae.errors import UserError

if TYPE_CHECKING:
    from circuits.labels import Label, LabelsFile


@dataclass(frozen=True, kw_only=True)
class LabelsCommand(Prints):
    """Name features, once for all circuits of their autoencoders: drawings, pages, reports and exports show the names.
    Without an option, print those there are.
    """

    circuit: Path | None = None
    """Run folder with a circuit, whose autoencoders' features are named."""
    saes: str | None = None
    """Run folder, or the folder of autoencoders, where there is no circuit."""
    feature: str | None = None
    """Feature to name, such as resid_3/120."""
    label: str | None = None
    """Its name; an empty one takes the name away."""
    read: Path | None = None
    """Names to add: JSON lines that the explorer saved, of the paper's repository, of another labels.jsonl or of
    --contexts; a graph saved in circuit-tracer's or Neuronpedia's viewer; or delphi's folder of explanations.
    """
    scores: Path | None = None
    """With --read: delphi's folder of scores for these names; JSON lines have theirs beside the name."""
    contexts: Path | None = None
    """File that receives the contexts of the circuit's features as JSON lines, for a labeller of any kind: it fills in
    "label" and, if it likes, "score", and --read takes the file back.
    """
    explain: str | None = None
    """Program that names the circuit's features which have no name: it gets the lines of --contexts on its standard
    input, and answers a name a line.
    """
    score: str | None = None
    """Program that says where features of these names are on (detection, fuzzing: `sae.features.judge`): the balanced
    accuracy becomes the names' score. Texts are the samples of `sfc features`, best with --samples 20.
    """
    timeout: Annotated[float, Range(0, 10**6, above=True)] = 600.0
    """Seconds that each program may take."""
    out: Path | None = None
    """File that receives all names, as JSON lines {"Name": "resid_3/120", "Annotation": "plural nouns"}."""
    by: str = "a person"
    """Who gives the names."""
    automatic: bool = False
    """The names were not given by a person: they look different, and a person's stand before them."""
    overwrite: bool = False
    """Replace --out or --contexts whatever it holds."""

    def run(self) -> Output:
        from circuits.labels import LabelsFile
        from graphs.annotations import write_annotations

        if (self.feature is None) != (self.label is None):
            raise UserError("to name a feature give both --feature and --label")
        if self.scores is not None and self.read is None:
            raise UserError("scores are given without names: give --read as well")
        file = self._file(LabelsFile)
        new, scores = ({}, {}) if self.read is None else _read(self.read, self.scores)
        new |= {} if self.feature is None or self.label is None else {self.feature: self.label}
        added = 0
        if new:
            with lock(file.path.parent, shared=True):
                added = file.add(new, by=self.by, automatic=self.automatic, scores=scores)
        added_by_program = self._ask_programs(file)
        labels = file.read()
        lines = [f"{name:<18} {line['label']}{_whose(line)}" for name, line in sorted(labels.items())]
        if self.out is not None:
            with output_file(self.out, _is_annotations, overwrite=self.overwrite):
                write_annotations({name: line["label"] for name, line in labels.items()}, self.out, overwrite=True)
            lines.append(f"wrote {self.out}")
        if self.contexts is not None:
            lines.append(f"wrote {self.contexts} ({self._write_contexts()} features)")
        if new:
            lines.append(f"{added} new of {len(new)}; wrote {file.path}")
        lines += added_by_program
        return Output("\n".join(lines) or f"no names yet in {file.path}", {"labels": labels, "file": str(file.path)})

    def _file(self, labels_file: type[LabelsFile]) -> LabelsFile:
        from circuits.circuit import Circuit, circuit_folder

        if self.circuit is not None:
            circuit = Circuit.load(self.circuit)
            return labels_file.of(circuit.metadata, circuit_folder(self.circuit).parent)
        if self.saes is None or not Path(self.saes).is_dir():
            raise UserError("say whose features to name: --circuit or --saes with a run folder")
        return labels_file(self.saes, self.saes)

    def _ask_programs(self, file: LabelsFile) -> list[str]:
        """Let programs name features, then score names; what that gave, in words."""
        from circuits.circuit import circuit_folder
        from circuits.feature_pages import read_records
        from sae.features.judge import explain, score_labels

        said = []
        if self.explain is not None:
            named = file.read()
            unnamed = [line for line in self._context_lines() if f"{line['site']}/{line['feature']}" not in named]
            names = explain(unnamed, self.explain, timeout=self.timeout)
            given = {f"{line['site']}/{line['feature']}": name for line, name in zip(unnamed, names, strict=True)}
            with lock(file.path.parent, shared=True):
                file.add(given, by=self.explain, automatic=True)
            said.append(f"{len(given)} features named by {self.explain}")
        if self.score is not None:
            if self.circuit is None:
                raise UserError("names are scored on texts of a circuit's feature pages: give --circuit")
            labels = file.read()
            records = read_records(circuit_folder(self.circuit).parent, labels)
            texts = {name: line["label"] for name, line in labels.items()}
            scores = score_labels(texts, records, self.score, timeout=self.timeout)
            with lock(file.path.parent, shared=True):
                for name, score in scores.items():
                    line, mean = labels[name], score.mean
                    by, automatic = line.get("by", "unknown"), bool(line.get("automatic"))
                    file.add({name: texts[name]}, by=by, automatic=automatic, scores={name: mean or 0.0})
            said += [
                f"{name:<18} detection {_share(score.detection)}, fuzzing {_share(score.fuzzing)}"
                for name, score in scores.items()
            ]
            few = "; others have too few texts: sfc features --samples 20" if len(scores) < len(labels) else ""
            said.append(f"{len(scores)} of {len(labels)} names scored by {self.score}{few}")
        return said

    def _write_contexts(self) -> int:
        """Write what is known of each feature of the circuit, a line each; how many they are."""
        from sae._files import to_json, write_text

        lines = self._context_lines()
        assert self.contexts is not None  # asked for
        with output_file(self.contexts, _is_contexts, overwrite=self.overwrite):
            write_text(self.contexts, "".join(to_json(line) + "\n" for line in lines))
        return len(lines)

    def _context_lines(self) -> list[dict[str, Any]]:
        """A line for each feature of the circuit, the strongest first."""
        from circuits.circuit import Circuit, circuit_folder
        from circuits.feature_pages import with_pages

        if self.circuit is None:
            raise UserError("contexts are of a circuit's features: give --circuit")
        circuit = Circuit.load(self.circuit)
        n_with_edges = sum(len(nodes) for nodes in circuit.edge_nodes.values())
        graph = circuit.graph(nodes=n_with_edges or 100, edges=0, attributes=circuit.features)
        graph = with_pages(graph, circuit_folder(self.circuit).parent)
        nodes = {node.name: node for node in reversed(graph.nodes()) if node.kind == "feature"}
        return [_context_line(nodes[name]) for name in sorted(nodes, key=lambda name: -abs(nodes[name].effect))]


def _share(score: float | None) -> str:
    return "-" if score is None else f"{score:.2f}"


def _context_line(node: Any) -> dict[str, Any]:
    """A line for a labeller: where a feature is on, its strongest tokens and contexts."""
    shown = ("top_tokens", "top_logits", "bottom_logits", "density", "max_activation", "by_case")
    contexts = node.attributes.get("contexts") or []
    return {
        "site": node.site,
        "feature": node.feature,
        "label": node.label,
        "effect": node.effect,
        **{key: node.attributes[key] for key in shown if key in node.attributes},
        "contexts": [{"text": _marked(context), **context} for context in contexts],
    }


def _marked(context: dict[str, Any]) -> str:
    """The text with the token of the peak between << and >>."""
    tokens, activations = [str(token) for token in context["tokens"]], context["activations"]
    peak = context.get("peak")
    peak = max(range(len(tokens)), key=lambda i: activations[i]) if peak is None and tokens else peak
    return "".join(f"<<{token}>>" if i == peak else token for i, token in enumerate(tokens))


def _read(path: Path, scores: Path | None) -> tuple[dict[str, str], dict[str, float]]:
    """Names of a file or folder, and how good they were found to be where that is said."""
    from graphs.annotations import read_annotations, read_scores
    from sae.features.delphi import accuracy, read_delphi_results

    answers = {} if scores is None else read_delphi_results(scores)
    judged = {name: score for name, result in answers.items() if (score := accuracy(result)) is not None}
    if path.is_dir():
        explained = read_delphi_results(path)
        return {name: text.strip() for name, text in explained.items() if isinstance(text, str)}, judged
    if (named := _of_viewer(path)) is not None:
        return named, judged
    return read_annotations(path), read_scores(path) | judged


def _of_viewer(path: Path) -> dict[str, str] | None:
    """Labels of a graph that was saved in a viewer; None for another file."""
    from graphs.formats.neuronpedia import from_neuronpedia
    from sae._files import parse_json, read_text

    try:
        data = parse_json(read_text(path), path, dict[str, Any])
    except UserError:  # JSON lines are not one JSON value
        return None
    if not {"nodes", "links", "metadata"} <= {*data}:
        return None
    graph = from_neuronpedia(data, source=path)
    return {node.name: node.label for node in graph.nodes() if node.label and node.kind == "feature"}


def _whose(line: Label) -> str:
    words = [*(["automatic"] if line.get("automatic") else []), line.get("by", "unknown"), line.get("date", "")]
    score = line.get("score")
    return f"  ({', '.join([*words, *([] if score is None else [f'score {score:.2f}'])])})"


def _is_contexts(path: Path) -> bool:
    """Whether a file is contexts that this command wrote."""
    from sae._files import parse_json, read_text

    try:
        first = read_text(path).partition("\n")[0]
        return {"site", "feature", "label", "contexts"} <= {*parse_json(first, path, dict[str, Any])}
    except UserError:
        return False


def _is_annotations(path: Path) -> bool:
    from graphs.annotations import read_annotations
    from graphs.errors import GraphError

    try:
        return bool(read_annotations(path))
    except GraphError:
        return False

"""Read a run folder for the report: `circuit/circuit.json` and the results beside it, `edits/*.json`, `saes/`.

Each file is checked against a type. Numbers are finite; a share that was not defined is null.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, FiniteFloat
from typing_extensions import NotRequired, TypedDict

from circuits._circuit_files import SiteName, absolute_in_run, check_metadata
from circuits.circuit import PARTIAL_FOLDER, circuit_folder
from circuits.circuit_source import has_other_saes
from circuits.debiasing.results import ShiftReport
from circuits.discovery.attention.stored import AttentionFile, read_attention
from circuits.editing.results import EditReport
from circuits.feature_pages import with_pages
from circuits.labels import LabelsFile, labelled, read_supernodes
from graphs.feature_graph import FeatureGraph
from graphs.schema import Count, Index
from graphs.sharing import shared
from sae._files import check_type, read_json
from sae._run.contents import read_run_config
from sae.autoencoder import SAE_CONFIG_FILE
from sae.errors import UserError
from sae.evaluation.results import EVALUATION_FILE
from sae.formats.locate import sae_folders

logger = logging.getLogger(__name__)

Share = FiniteFloat | None
Bounds = list[tuple[Share, Share]]
Sizes = Annotated[list[Count], Field(min_length=1, max_length=1000)]


class IntervalsFile(TypedDict):
    """Intervals of the curves over nodes."""

    faithfulness: Bounds
    completeness: Bounds


class CurvesFile(TypedDict):
    """Curves over numbers of nodes: faithfulness.json, and both halves of mask.json."""

    sizes: Sizes
    faithfulness: list[Share]
    completeness: list[Share]
    random: NotRequired[list[list[Share]]]
    intervals: NotRequired[IntervalsFile | None]
    n_nodes: Index
    n_prompts: NotRequired[Index]
    cpr: NotRequired[Share]
    cmd: NotRequired[Share]
    ablation: NotRequired[str]
    start_site: NotRequired[str]


class EdgeCurveFile(TypedDict):
    """A curve over numbers of edges: edge_faithfulness.json, and both halves of edge_mask.json."""

    sizes: Sizes
    faithfulness: list[Share]
    random: NotRequired[list[list[Share]]]
    intervals: NotRequired[Bounds | None]
    n_nodes: Index
    n_prompts: NotRequired[Index]
    n_edges: Index
    all_joined: Share
    ablation: NotRequired[str]
    start_site: NotRequired[str]


def _one_a_size(curves: Mapping[str, Any]) -> Mapping[str, Any]:
    """`ValueError` unless every curve has one value a size."""
    n = len(curves["sizes"])
    lists = [curves[name] for name in ("faithfulness", "completeness") if name in curves] + (curves.get("random") or [])
    intervals = curves.get("intervals") or []
    lists += [intervals] if isinstance(intervals, list) and intervals else []
    lists += [intervals["faithfulness"], intervals["completeness"]] if isinstance(intervals, dict) else []
    if any(len(values) != n for values in lists):
        raise ValueError(f"one value for each of the {n} sizes in every curve")
    return curves


Curves = Annotated[CurvesFile, AfterValidator(_one_a_size)]
EdgeCurve = Annotated[EdgeCurveFile, AfterValidator(_one_a_size)]


class MaskFile(TypedDict):
    """mask.json: the curves of a learned mask beside those of the ranking by effect."""

    mask: Curves
    effects: Curves
    held_out: NotRequired[bool]


class EdgeMaskFile(TypedDict):
    """edge_mask.json: the curves of a learned mask on edges beside those of the ranking by weight."""

    mask: EdgeCurve
    effects: EdgeCurve
    held_out: NotRequired[bool]


def _same_sizes(data: Mapping[str, Any]) -> Mapping[str, Any]:
    if data["mask"]["sizes"] != data["effects"]["sizes"]:
        raise ValueError("the same sizes in mask and effects")
    return data


MaskCurves = Annotated[MaskFile, AfterValidator(_same_sizes)]
EdgeMaskCurves = Annotated[EdgeMaskFile, AfterValidator(_same_sizes)]


class PredictionsFile(TypedDict):
    """Predictions with x̂ in place of x."""

    ce: Share
    ce_recovered: Share


class SiteQualityFile(TypedDict):
    """How well one autoencoder stands for the model's activations."""

    l0: Share
    explained_variance: Share
    dead_fraction: Share
    predictions: PredictionsFile


class CheckFile(TypedDict):
    """One line of validity.json."""

    name: str
    question: str
    verdict: Literal["holds", "doubtful", "fails", "untold"]
    words: str
    value: Share
    interval: tuple[Share, Share] | None
    bar: Share


class FamiliesFile(TypedDict):
    """Families of prompts."""

    sizes: list[Index]
    cases: list[dict[str, Index]]
    examples: list[str]
    faithfulness: list[list[Share]]


class BackupsFile(TypedDict):
    """Nodes whose effects grow."""

    removed: Index
    names: list[str]
    before: list[FiniteFloat]
    after: list[FiniteFloat]


class WorstPromptFile(TypedDict):
    """A prompt of which the circuit explains little."""

    text: str
    case: str
    faithfulness: Share


class PromptSpreadFile(TypedDict):
    """Faithfulness prompt by prompt."""

    worst: list[WorstPromptFile]


def _one_a_family(families: Mapping[str, Any]) -> Mapping[str, Any]:
    n = len(families["sizes"])
    if any(len(families[name]) != n for name in ("cases", "examples")) or len(families["faithfulness"]) not in (0, n):
        raise ValueError(f"one entry for each of the {n} families")
    return families


class ValidityFile(TypedDict):
    """validity.json of `sfc validate`, as far as pages show it."""

    checks: list[CheckFile]
    nodes: Index
    n_prompts: Index
    drawn: str
    families: Annotated[FamiliesFile, AfterValidator(_one_a_family)] | None
    backups: BackupsFile | None
    prompts: PromptSpreadFile | None


class EvaluationFile(TypedDict):
    """evaluation.json of `sfc evaluate`, as far as pages show it."""

    n_tokens: Index
    ce_model: FiniteFloat
    sites: dict[SiteName, SiteQualityFile]
    spliced: dict[str, PredictionsFile]


class SaeFile(TypedDict):
    """config.json of an autoencoder."""

    site: SiteName
    architecture: NotRequired[str]
    n_features: NotRequired[Index]
    k: NotRequired[FiniteFloat | None]
    read: NotRequired[str | None]


@dataclass(frozen=True)
class RunFiles:
    """The results in a run folder."""

    folder: Path
    """The run folder."""
    graph: FeatureGraph | None
    """The pruned circuit."""
    faithfulness: dict[str, Any] | None
    """Curves over circuit sizes."""
    edge_faithfulness: dict[str, Any] | None
    """Curves over numbers of edges."""
    masks: Sequence[dict[str, Any] | None]
    """Curves of a learned mask beside those of the effects, and of one on edges beside those of the weights."""
    edits: dict[str, EditReport]
    """Edits by the name of their file."""
    saes: list[dict[str, Any]]
    """Configs of the autoencoders."""
    evaluation: dict[str, Any] | None = None
    """How well they stand for the model's activations."""
    config: dict[str, Any] = field(default_factory=dict)
    """The commands that were run."""
    shifts: dict[str, ShiftReport] = field(default_factory=dict)
    """Debiased probes, by the name of their file."""
    validity: dict[str, Any] | None = None
    """How far to trust the circuit."""
    attention: list[AttentionFile] = field(default_factory=list)
    """Why attention looks there."""
    other_saes: bool = False
    """Whether these are others than the circuit was found with."""


def read_run(run_folder: str | Path) -> RunFiles:
    """Everything of a run that the report shows; `UserError` if there is nothing at all."""
    folder = Path(run_folder)
    if folder.name == "circuit" and (folder / "circuit.json").is_file():
        folder = folder.parent
    circuit = folder / "circuit" / "circuit.json"
    if not circuit.is_file() and (circuit.parent / PARTIAL_FOLDER).is_dir():
        circuit_folder(folder)  # says how an interrupted discovery goes on
    graph, other_saes = _graph(circuit) if circuit.is_file() else (None, False)

    evaluation = folder / "saes" / EVALUATION_FILE
    run = RunFiles(
        folder=folder,
        graph=graph,
        faithfulness=read_result(folder / "circuit" / "faithfulness.json", graph, Curves),
        edge_faithfulness=read_result(folder / "circuit" / "edge_faithfulness.json", graph, EdgeCurve),
        masks=[
            read_result(folder / "circuit" / "mask.json", graph, MaskCurves),
            read_result(folder / "circuit" / "edge_mask.json", graph, EdgeMaskCurves),
        ],
        edits={
            path.stem: EditReport.load(path)
            for path in sorted((folder / "edits").glob("*.json"))
            if _is_of(graph, read_json(path), path)
        },
        saes=[read_json(path / SAE_CONFIG_FILE, SaeFile) for path in sae_folders(folder)] if folder.is_dir() else [],
        evaluation=read_json(evaluation, EvaluationFile) if evaluation.is_file() else None,
        config=read_run_config(folder),
        shifts={
            path.stem: ShiftReport.load(path)
            for path in sorted((folder / "circuit").glob("shift*.json"))
            if _is_of(graph, read_json(path), path)
        },
        validity=read_result(folder / "circuit" / "validity.json", graph, ValidityFile),
        attention=read_attention(folder / "circuit", graph.metadata.get("digest") if graph else None),
        other_saes=other_saes,
    )
    if run.graph is None and run.faithfulness is None and not run.edits and not run.saes:
        raise UserError(f"nothing to report in {str(folder)!r}: give the folder of a run (sfc discover --out RUN)")
    return run


def read_result(path: Path, graph: FeatureGraph | None, schema: Any) -> dict[str, Any] | None:
    """A result beside the circuit; None where there is none, or where it is of another circuit."""
    data = read_json(path) if path.is_file() else None
    return check_type(data, schema, path) if data is not None and _is_of(graph, data, path) else None


def _graph(path: Path) -> tuple[FeatureGraph, bool]:
    """The pruned circuit, with metadata that can be shown and without the folders its paths are in; and whether its
    autoencoders are others now.
    """
    graph = FeatureGraph.load(path)
    check_metadata(graph.metadata, path, circuit=False)
    metadata = absolute_in_run(graph.metadata, path.parent.parent)
    other_saes = has_other_saes(metadata, path)
    run = path.parent.parent
    graph = with_pages(labelled(graph, LabelsFile.of(metadata, run).read()), run)
    groups = read_supernodes(path.parent, metadata.get("digest"))
    graph.metadata = {**shared(graph.metadata), **({"supernodes": groups} if groups else {})}
    return graph, other_saes


def _is_of(graph: FeatureGraph | None, data: dict[str, Any], path: Path) -> bool:
    """Whether a result is of the circuit that is here now; a warning names one that says it is of another."""
    made_with = data.get("made_with")
    circuit = made_with.get("circuit") if isinstance(made_with, dict) else None
    if graph is None or circuit in (None, graph.metadata.get("digest")):
        return True
    logger.warning("%s is of another circuit than the one that is here now, and is left out", path)
    return False

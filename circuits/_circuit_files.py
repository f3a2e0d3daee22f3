"""A circuit on disk: the metadata of `circuit.json` as types, and the tensors of `effects.safetensors`.

1. `CircuitMetadata` is what reading a circuit needs, `ReportMetadata` what pages show of it; a file may have more.
2. `read_effects` checks every tensor by name, shape, number type and range before anything is built from it.
3. Paths inside the run folder are written relative to it (`./saes`), so that a run can be moved; others as they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, FiniteFloat
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from circuits.attribution.effects import ENTRIES
from circuits.attribution.nodes import COLUMNS
from circuits.metrics.metrics import PROBES
from graphs.schema import LARGEST, AttributesFile, Count, Index
from sae._files import TensorSpec, check_tensors, check_type, read_tensors
from sae._run.contents import RUN_CONFIG_FILE
from sae.errors import UserError
from sae.model.sites import Site

PATHS = ("model", "saes", "prompts")
"""Metadata that may be paths."""


def _site(name: str) -> str:
    try:
        Site.parse(name)
    except UserError:
        raise ValueError("a site: embed, attn_N, mlp_N or resid_N with N a layer") from None
    return name


SiteName = Annotated[str, AfterValidator(_site)]


class OptionsFile(TypedDict):
    """The options of a circuit, as far as they are read."""

    aggregation: Literal["sum", "position", "spans"]
    metric: str
    method: NotRequired[str]


class CircuitMetadata(TypedDict):
    """Metadata without which there is no circuit."""

    options: OptionsFile
    sites: list[SiteName]
    n_examples: Count
    n_positions: Count
    total_effect: FiniteFloat | None


class SiteSum(TypedDict):
    """The sum check of one site."""

    sum_of_effects: FiniteFloat
    measured: FiniteFloat
    residual: FiniteFloat


class SumCheck(TypedDict):
    """How nearly the effects of each site add up to patching it."""

    mean_residual: FiniteFloat
    worst_residual: FiniteFloat
    worst_site: str
    sites: dict[str, SiteSum]


class VerificationFile(TypedDict):
    """Results of exact patching, by node."""

    nodes: dict[str, AttributesFile]
    summary: NotRequired[str]


class ReportOptions(TypedDict, total=False):
    """The options that pages name."""

    metric: str
    method: str


class ExamplePair(TypedDict):
    """One prompt with its patch side and the answers, as text."""

    case: str
    clean: str
    clean_answer: str
    patch: NotRequired[str]
    patch_answer: NotRequired[str]


class ReportMetadata(TypedDict, total=False):
    """Metadata that pages and later commands read where they are there."""

    options: ReportOptions
    model: str
    saes: str
    prompts: str
    examples: Count
    dtype: str | None
    site_paths: str | None
    span_template: str | None
    need_spans: bool
    model_fingerprint: str | None
    saes_fingerprint: str | None
    n_examples: Index
    n_nodes: Index
    m_clean: FiniteFloat | None
    m_patch: FiniteFloat | None
    accuracy: FiniteFloat | None
    completeness: SumCheck
    verification: VerificationFile
    cases: dict[str, Index]
    example_pairs: list[ExamplePair]


class FeaturesFile(TypedDict):
    """features.json: a description of each feature, by its name without a position."""

    features: dict[str, AttributesFile]


def check_metadata(metadata: Mapping[str, Any], where: str | Path, *, circuit: bool) -> None:
    """`UserError`, with the key and its value, for metadata that pages cannot show or, with `circuit`, that are not
    those of a circuit.
    """
    for schema in [ReportMetadata, CircuitMetadata] if circuit else [ReportMetadata]:
        check_type(metadata, schema, f"{where}: metadata")


def relative_to_run(metadata: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """The metadata with paths inside the run folder relative to it; also those inside the run around it, where a mask's
    circuit stands in the run whose SAEs it has.
    """
    run = run.resolve()
    outer = run.parent if (run.parent / RUN_CONFIG_FILE).is_file() else run

    def relative(path: str) -> str:
        inside = Path(path).is_absolute() and Path(path).is_relative_to(outer)
        return f"./{Path(os.path.relpath(path, run)).as_posix()}" if inside else path

    return _with_paths(metadata, relative)


def absolute_in_run(metadata: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """Undo `relative_to_run`: the same entries with the paths of the run folder where it is now."""
    run = run.resolve()
    return _with_paths(metadata, lambda path: str((run / path).resolve()) if path.startswith("./") else path)


def _with_paths(metadata: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """The metadata with other paths: those of `PATHS`, and that of the probe in `probe-margin:FILE`."""
    changed = dict(metadata)
    for key in PATHS:
        if isinstance(value := metadata.get(key), str):
            changed[key] = change(value)
    options = metadata.get("options")
    if not isinstance(options, Mapping):
        return changed
    metric = options.get("metric")
    if isinstance(metric, str) and metric.startswith(PROBES):
        kind, _, file = metric.partition(":")
        changed["options"] = {**options, "metric": f"{kind}:{change(file)}"}
    return changed


# ------------------------------------------------------------------------------------------ effects.safetensors


def read_effects(path: Path, metadata: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a circuit with these checked metadata, by name; numbers as `Circuit` has them."""
    tensors = read_tensors(path)
    n_features = {name: _check_site(tensors, name, metadata, path) for name in metadata["sites"]}
    with_edges = [name for name in metadata["sites"] if f"edge_nodes/{name}/feature" in tensors]
    for name in with_edges:
        _check_edge_nodes(tensors, name, n_features[name], metadata, path)
    for name in tensors:
        if name.startswith(("edges/", "edge_intervals/", "edge_cases/")):
            _check_edges(tensors, name, set(with_edges), len(metadata.get("cases", ())), path)
    return {name: _as_stored(name, x) for name, x in tensors.items()}


def _as_stored(name: str, tensor: Tensor) -> Tensor:
    """A tensor of any width in the number type that a circuit has."""
    if tensor.is_floating_point():
        return tensor if name.startswith("intervals/") else tensor.float()
    return tensor.int() if name.startswith("effects/") else tensor.long()


def _check_site(tensors: Mapping[str, Tensor], site: str, metadata: Mapping[str, Any], path: Path) -> int:
    """Check the effects of a site; the number of its features."""
    names = {name: f"effects/{site}/{name}" for name in (*ENTRIES, "n_features")}
    expected = {names[name]: TensorSpec(("entries",), "int") for name in ENTRIES[:3]}
    expected |= {names["value"]: TensorSpec(("entries",)), names["n_features"]: TensorSpec((1,), "int")}
    check_tensors(tensors, expected, path)
    n_features = int(tensors[names["n_features"]])
    if not 1 <= n_features < LARGEST:
        raise UserError(f"{path}: tensor {names['n_features']!r} is {n_features}: no autoencoder has as many features")
    _check_range(tensors, names["example"], 0, metadata["n_examples"], path)
    _check_range(tensors, names["feature"], 0, _beyond(site, n_features), path)
    _check_range(tensors, names["position"], *_positions(metadata), path)
    return n_features


def _beyond(site: str, n_features: int) -> int:
    """The first number that no node of a site has: features, the error, and at an MLP a skip connection."""
    return n_features + (2 if site.startswith("mlp_") else 1)


def _positions(metadata: Mapping[str, Any]) -> tuple[int, int]:
    """The smallest position an effect may have, and the first beyond the largest."""
    aggregation = metadata["options"]["aggregation"]
    beyond = len(metadata.get("positions", ())) if aggregation == "spans" else metadata["n_positions"]
    return (-1 if aggregation == "sum" else 0), beyond


def _check_edge_nodes(
    tensors: Mapping[str, Tensor], site: str, n_features: int, metadata: Mapping[str, Any], path: Path
) -> None:
    names = {name: f"edge_nodes/{site}/{name}" for name in COLUMNS}
    expected = {names[name]: TensorSpec(("nodes",), "float" if name == "effect" else "int") for name in COLUMNS}
    check_tensors(tensors, expected, path)
    lowest, beyond = _positions(metadata)
    _check_range(tensors, names["feature"], 0, _beyond(site, n_features), path)
    _check_range(tensors, names["position"], lowest, 0 if lowest < 0 else beyond, path)


def _check_edges(
    tensors: Mapping[str, Tensor], name: str, sites: Sequence[str] | set[str], n_cases: int, path: Path
) -> None:
    kind, *between = name.split("/")
    if len(between) != 2 or between[0] not in sites or between[1] not in {*sites, "metric"}:
        raise UserError(f"{path}: tensor {name!r} joins no two sites with nodes: expected {kind}/UPSTREAM/DOWNSTREAM")
    up, down = between
    rows = 1 if down == "metric" else len(tensors[f"edge_nodes/{down}/feature"])
    shape = (rows, len(tensors[f"edge_nodes/{up}/feature"]))
    spec = {
        "edges": TensorSpec(shape),
        "edge_intervals": TensorSpec((*shape, 2), finite=False),  # NaN: too few to tell
        "edge_cases": TensorSpec((*shape, n_cases)),
    }[kind]
    check_tensors(tensors, {name: spec}, path)
    if kind != "edges" and f"edges/{up}/{down}" not in tensors:
        raise UserError(f"{path}: tensor {name!r} has no weights, edges/{up}/{down}")


def _check_range(tensors: Mapping[str, Tensor], name: str, lowest: int, beyond: int, path: Path) -> None:
    tensor = tensors[name]
    if len(tensor) and not (lowest <= int(tensor.min()) and int(tensor.max()) < beyond):
        range_in_file = f"{int(tensor.min())} to {int(tensor.max())}"
        raise UserError(f"{path}: tensor {name!r} has values from {range_in_file}, expected {lowest} to {beyond - 1}")

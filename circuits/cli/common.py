"""What every subcommand of `sfc` shares: loading, recording what was run, and printing the result.

1. Options common to all commands are fields of `Common`; the same sentences are `--help`, `config.json` and
   documentation.
2. `record` adds a command and its options to the run's `config.json`, with the versions it ran with.
3. A command returns an `Output`: text for a person, or with `--json` one object for a machine, on standard output.
   Progress goes to standard error.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import tyro

from circuits import circuit_source
from circuits.circuit import Circuit
from circuits.circuit_source import parse_site_paths
from circuits.metrics.metrics import Metric
from circuits.prompts.dataset import PromptSet
from sae._files import without_nan, write_json
from sae._options import Range, ranges
from sae._run.contents import check_run_config, read_run_config
from sae.formats.locate import check_source
from sae.model import load
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.neurons import NEURONS
from sae.saes import SAEs

PACKAGES = ("sparse-feature-circuits", "torch", "transformers", "nnsight", "numpy")


@dataclass(frozen=True)
class Output:
    """What a command has to say."""

    text: str
    """For a person."""
    data: dict[str, Any]
    """For a machine: one JSON object; undefined numbers are null."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", without_nan(self.data))


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options of every command that runs the model."""

    device: str = "auto"
    """Where the model runs: auto (cuda, mps or cpu, whichever is there first), or a device such as cuda:1."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Precision of the model's weights: by default that of the circuit a command works on, else float32; auto is
    float32, on a GPU the files' own from 2 billion parameters on.
    """
    site_paths: str | None = None
    """Where sites are in a model whose architecture is not known, or elsewhere than usual, such as
    resid=model.layers.{layer},attn=model.layers.{layer}.self_attn.o_proj:input.
    """
    json: bool = False
    """Print one JSON object instead of text."""

    @property
    def quiet(self) -> bool:
        """Whether progress bars are left out."""
        return self.json


@dataclass(frozen=True, kw_only=True)
class UsesSaes(Common):
    """Options of commands that can take autoencoders one by one."""

    sae_memory: Annotated[float, Range(0, 10**6)] | None = None
    """Memory for autoencoders in GiB: where they do not fit they are read from disk whenever their site is at work.
    Half of what is free by default.
    """


Overwrite = Annotated[
    bool, tyro.conf.arg(help="Replace what an earlier run of this command left in the output folder.")
]


def _hint(allowed: Range) -> Callable[[str], str]:
    return lambda default: f"({allowed}; default: {default})"


@cache
def show_ranges(options: type) -> None:
    """Have `--help` tell the range of every option of a command beside its default."""
    hints = get_type_hints(options, include_extras=True)
    for name, allowed in ranges(options).items():
        owner = next(base for base in options.__mro__ if name in inspect.get_annotations(base))
        words = tyro.conf.arg(help_behavior_hint=_hint(allowed))
        owner.__annotations__[name] = Annotated[hints[name], words]
    for hint in hints.values():
        for part in (hint, *get_args(hint)):
            if isinstance(part, type) and is_dataclass(part):
                show_ranges(part)


def load_model(
    name: str,
    options: Common,
    *,
    site_paths: str | None = None,
    dtype: str | None = None,
    saes: str | Path | None = None,
) -> LanguageModel:
    """The model by hub name or folder; `site_paths` and `dtype` are those of an earlier command, where none are given
    now. `saes` are looked for first: a name that is wrong is told before the model is loaded.
    """
    if saes is not None and str(saes) != NEURONS:
        check_source(saes)
    paths = parse_site_paths(options.site_paths or site_paths)
    return load.load_model(name, device=options.device, dtype=options.dtype or dtype or "float32", site_paths=paths)


def load_checked_saes(
    model: LanguageModel, path: str | Path, *, sites: list[Site] | None = None, options: Common | None = None
) -> SAEs:
    """The SAEs of a run, checked against the model they are attached to; its neurons for `neurons`.

    Where the command can take them one by one (`UsesSaes`), those that do not fit in its `sae_memory` are streamed.
    """
    memory = options.sae_memory if isinstance(options, UsesSaes) else None
    return circuit_source.load_checked_saes(
        model, path, sites=sites, sae_memory=memory, stream=isinstance(options, UsesSaes)
    )


@dataclass(frozen=True)
class Loaded:
    """A circuit with the model and autoencoders it was found with."""

    circuit: Circuit

    @staticmethod
    def of(
        path: Path, options: Common, *, model: str | None = None, saes: str | None = None, metric: str | None = None
    ) -> Loaded:
        """Read the circuit of a run; model and autoencoders are those it names unless others are given. metric: as in
        `Circuit.get_metric`.
        """
        circuit = Circuit.load(
            path,
            model=model,
            saes=saes,
            metric=metric,
            device=options.device,
            dtype=options.dtype,
            site_paths=parse_site_paths(options.site_paths),
            sae_memory=options.sae_memory if isinstance(options, UsesSaes) else None,
            stream=isinstance(options, UsesSaes),
        )
        circuit.metric, circuit.model, circuit.saes  # noqa: B018  # wrong names are told before anything is computed
        return Loaded(circuit)

    @property
    def model(self) -> LanguageModel:
        """The model the circuit was found in."""
        return self.circuit.model

    @property
    def saes(self) -> SAEs:
        """The SAEs it was found with."""
        return self.circuit.saes

    @property
    def metric(self) -> Metric:
        """The metric the circuit explains."""
        return self.circuit.metric

    def prompts(self, path: str | Path | None, *, limit: int | None = None, need_spans: bool = False) -> PromptSet:
        """Prompts of a file, or those the circuit was found on."""
        return self.circuit.read_prompts(path, limit=limit, need_spans=need_spans)


def place(name: str | Path) -> str:
    """An existing path made absolute, so that a run can be read from another folder; a hub name as it is."""
    path = Path(name)
    return str(path.resolve()) if path.exists() else str(name)


def record(run: Path, command: str, options: Any) -> None:
    """Add the command with its options and the versions of what it ran on to the run's `config.json`."""
    path = run / "config.json"
    check_run_config(run)
    known = read_run_config(run) or {"schema_version": 1}
    known[command] = {field.name: plain(getattr(options, field.name)) for field in fields(options)}
    known["versions"] = {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)
    }
    write_json(path, known)


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "__dataclass_fields__"):
        return {key: plain(entry) for key, entry in asdict(value).items()}
    return list(value) if isinstance(value, tuple) else value

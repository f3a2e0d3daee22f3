"""Loading for the commands of `sfc`, and recording what was run in the run's `config.json`."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from circuits import circuit_source
from circuits.circuit import Circuit, circuit_folder
from circuits.circuit_source import parse_site_paths
from circuits.cli.main import COMMANDS
from circuits.cli.options import Common, RunsCircuit, UsesSaes, plain
from sae._files import write_json
from sae._run.contents import check_run_config, read_run_config
from sae.formats.locate import check_source
from sae.model import load
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.neurons import DICTIONARIES
from sae.saes import SAEs

PACKAGES = ("sparse-feature-circuits", "torch", "transformers", "nnsight", "numpy")


def load_model(name: str, options: Common, *, saes: str | Path | None = None) -> LanguageModel:
    """The model by hub name or folder, on the device and with the precision of a command's options.

    `saes` are looked for first: a name that is wrong is told before the model is loaded.
    """
    if saes is not None and str(saes) not in DICTIONARIES:
        check_source(saes)
    paths = parse_site_paths(options.site_paths)
    return load.load_model(
        name, device=options.device, dtype=options.dtype or "float32", device_map=options.device_map,
        quantize=options.quantize, remote=options.remote, site_paths=paths,
    )  # fmt: skip


def placed(options: Common) -> dict[str, Any]:
    """How and where a circuit's model is loaded, as `Circuit.load` takes it."""
    names = ("device", "dtype", "device_map", "quantize", "remote")
    return {name: getattr(options, name) for name in names} | {"site_paths": parse_site_paths(options.site_paths)}


def load_checked_saes(
    model: LanguageModel, path: str | Path, *, sites: list[Site] | None = None, options: Common | None = None
) -> SAEs:
    """The SAEs of a run, checked against the model they are attached to; its neurons for `neurons`, or those inside
    its MLPs for `mlp-neurons`.

    Where the command can take them one by one (`UsesSaes`), those that do not fit in its `sae_memory` are streamed.
    """
    memory = options.sae_memory if isinstance(options, UsesSaes) else None
    return circuit_source.load_checked_saes(
        model, path, sites=sites, sae_memory=memory, stream=isinstance(options, UsesSaes)
    )


def load_circuit(options: RunsCircuit) -> Circuit:
    """The circuit of a run with its model and SAEs loaded: those it names, unless the options name others."""
    check_run_config(circuit_folder(options.circuit).parent)  # `record` will add to it
    circuit = Circuit.load(
        options.circuit,
        model=options.model,
        saes=options.saes,
        metric=options.metric,
        **placed(options),
        sae_memory=options.sae_memory if isinstance(options, UsesSaes) else None,
        stream=isinstance(options, UsesSaes),
    )
    circuit.metric, circuit.model, circuit.saes  # noqa: B018  # wrong names are told before anything is computed
    return circuit


def absolute_path(name: str | Path) -> str:
    """An existing path made absolute, so that a run can be read from another folder; a hub name as it is."""
    sources = [part.partition("?") for part in str(name).split(",")]
    if Path(name).exists() or not all(Path(path).exists() for path, _, _ in sources):
        return str(Path(name).resolve()) if Path(name).exists() else str(name)
    return ",".join(f"{Path(path).resolve()}{mark}{query}" for path, mark, query in sources)


def record(run: Path, command: str, options: Any, *, name: str | None = None) -> None:
    """Add the command with its options and the versions of what it ran on to the run's `config.json`; name: of the
    result, where a run may have several, each of which has an entry of its own.
    """
    check_run_config(run)
    commands = read_run_config(run) or {"schema_version": 1}
    entry = {field.name: plain(getattr(options, field.name)) for field in fields(options)}
    commands[command if name is None else f"{command} {name}"] = {**entry, "words": command_words(options)}
    commands["versions"] = dict(_versions())
    write_json(run / "config.json", commands)


@cache
def _versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def command_words(command: Any) -> list[str]:
    """The words that repeat a command: `sfc`, its name, and the options that are not at their default."""
    name = next(name for name, (_, cls, _) in COMMANDS.items() if cls == type(command).__name__)
    return ["sfc", name, *_option_words(command)]


def _option_words(options: Any) -> Iterator[str]:
    for field in fields(options):
        value, name = getattr(options, field.name), field.name.replace("_", "-")
        if name in ("json", "overwrite", "resume"):
            continue
        if is_dataclass(value):
            yield from _option_words(value)
        elif value is None or value == (None if field.default is MISSING else field.default):
            continue
        elif isinstance(value, bool):
            yield f"--{name}" if value else f"--no-{name}"
        else:
            yield from (f"--{name}", str(value))

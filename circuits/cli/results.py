"""Files of a measurement, and what an earlier one left under the same names.

1. A result says what it was made with: the circuit's digest, the options, and of files their names and a digest.
2. The same options replace a result; with others it is only replaced by `--overwrite`, or stays where `--name` gives
   the new one files of its own. Nothing that another program wrote is replaced at all.
3. A drawing or table beside a result is removed before the result is replaced, so that it is never of an older one.
4. A command that writes one file asks `output_file` for it, or `circuit_file` where it has a usual name in the run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from circuits.cli.options import Named, plain
from sae._files import parse_json, read_header, read_text, write_json, write_text
from sae._run.locks import lock
from sae._run.outputs import IsOwn, check_no_link, check_output, is_foreign, recorded
from sae.data.text import TextSource
from sae.errors import UserError

UNIMPORTANT = (
    "circuit", "device", "device_map", "json", "model", "name", "out", "overwrite", "remote", "sae_memory", "saes",
)  # fmt: skip
"""Options that do not decide what is measured, or are compared by fingerprints."""
MADE_WITH = "made_with"


def made_with(options: Any, /, **more: Any) -> dict[str, Any]:
    """All that a result depends on: the options of a command and `more`; a file is told by its name and a digest."""
    chosen = {field.name: getattr(options, field.name) for field in fields(options) if field.name not in UNIMPORTANT}
    return json.loads(json.dumps({name: _told(value) for name, value in {**chosen, **more}.items()}))


def _told(value: Any) -> Any:
    if isinstance(value, str | Path) and Path(value).is_file():
        return f"{Path(value).name} ({TextSource(str(value)).fingerprint})"
    return plain(value)


@dataclass(frozen=True)
class ResultFiles:
    """The files of one measurement: `faithfulness.json` and `.svg`, or `faithfulness_NAME.json` and `.svg`."""

    folder: Path
    """Where they are."""
    stem: str
    """What the measurement is called: faithfulness, mask, evaluation, ..."""
    options: Named
    """The command's options."""
    made_with: Mapping[str, Any]
    """What decides the result."""
    suffixes: tuple[str, ...] = (".json", ".svg")
    """Endings of the files, first of all .json."""

    def path(self, suffix: str) -> Path:
        """One of the files."""
        name = self.stem if self.options.name is None else f"{self.stem}_{self.options.name}"
        return self.folder / f"{name}{suffix}"

    def check(self) -> None:
        """Raises UserError, before anything is measured, where a result of other options would be replaced."""
        self.check_foreign()
        path = self.path(".json")
        if not path.is_file():
            return
        before = read_result(path)
        differing = different_options(before, self.made_with)
        if differing and not self.options.overwrite:
            raise UserError(
                f"{str(path)!r} holds a result of other options ({differing}): --overwrite replaces it, --name gives "
                "this one files of its own"
            )

    def check_foreign(self) -> None:
        """Raises UserError where a file of somebody else would be replaced."""
        self.options.check_name()
        check_no_link(self.folder)
        path = self.path(".json")
        if not path.is_file():
            others = [self.path(suffix) for suffix in self.suffixes if self.path(suffix).exists()]
            strangers = [other for other in others if not self._is_interrupted(other)]
            if strangers and not self.options.overwrite:
                raise UserError(f"{str(strangers[0])!r} is there without its {path.name}: move it away, or give --name")
            return
        read_result(path)
        foreign = [self.path(suffix) for suffix in self.suffixes if self._is_foreign(self.path(suffix))]
        if foreign and not self.options.overwrite:
            raise UserError(
                f"{str(foreign[0])!r} was not written by this program, or was changed since, and is not replaced: move "
                "it away, give --name, or --overwrite"
            )

    def _is_foreign(self, path: Path) -> bool:
        if path.suffix == ".safetensors":
            return path.is_file() and not self._is_interrupted(path)
        return path.is_file() and is_foreign(path)

    def _is_interrupted(self, path: Path) -> bool:
        """Whether a file is what this measurement writes before its .json, which it did not get to."""
        return path.suffix == ".safetensors" and read_header(path).get("kind") == self.stem

    def write(self, data: dict[str, Any], *, table: str = "") -> dict[str, Any]:
        """Write the result as JSON, with what it was made with, and its table as .txt; files beside an older one go
        first.
        """
        data = {**data, MADE_WITH: dict(self.made_with)}
        for suffix in self.suffixes[1:]:
            self.path(suffix).unlink(missing_ok=True)
        return write_with_table(self.path(".json"), data, table)


def write_with_table(path: Path, data: dict[str, Any], table: str) -> dict[str, Any]:
    """Write a result's JSON, and its table to the file of the same name with .txt, whose digest the JSON says."""
    data = {**data, **(recorded({".txt": table}) if table else {})}
    write_json(path, data)
    if table:
        write_text(path.with_suffix(".txt"), table)
    return data


def read_result(path: Path) -> dict[str, Any]:
    """A result's JSON; UserError for a file that another program wrote."""
    try:
        data = parse_json(read_text(path), path, dict[str, Any])
    except UserError as error:
        raise UserError(f"{error}; it is not replaced: move it away, or give --name") from None
    if "schema_version" not in data:
        raise UserError(
            f"{str(path)!r} was not written by this program and is not replaced: move it away, or give --name"
        )
    return data


def different_options(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The options in which a result differs, as `steps 10, not 20`; empty where there are none."""
    then = before.get(MADE_WITH)
    if not isinstance(then, dict):
        return "it does not say which"
    return ", ".join(_differences(then, now))


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterable[str]:
    for name in sorted({*then, *now}):
        old, new = then.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new)
        elif old != new:
            yield f"{name.replace('_', '-')} {old!r}, not {new!r}"


def digest_of(values: Mapping[str, Any]) -> str:
    """Six characters that tell sets of options apart."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:6]


@contextmanager
def output_file(path: Path, is_own: IsOwn, *, overwrite: bool) -> Iterator[Path]:
    """A file to write, checked before any work (`check_output`); its folder is shared until the block ends."""
    with lock(path.parent, shared=True):
        check_output(path, is_own, overwrite=overwrite)
        yield path


@contextmanager
def circuit_file(circuit: Path, out: Path | None, name: str, is_own: IsOwn, *, overwrite: bool) -> Iterator[Path]:
    """A file to write of a circuit, `graph/NAME` in the run folder where `out` is None; see `output_file`.

    What is in `graph/` under such a name is the run's, whatever it holds.
    """
    from circuits.circuit import circuit_folder

    run = circuit_folder(circuit).parent
    usual, path = run / "graph" / name, out or run / "graph" / name
    is_usual = path.parent.resolve() == usual.parent.resolve() and path.name.startswith("circuit.")
    if is_usual:
        check_no_link(usual.parent)
    with lock(run if is_usual else path.parent, shared=True):
        check_output(path, is_own, overwrite=overwrite or is_usual)
        yield path

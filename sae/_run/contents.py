"""List what the program writes in a folder, so that nothing else is ever deleted or overwritten.

1. `Layout` lists the names of files and folders. `RUN` is a run folder, `SAES` its autoencoders, and so on.
2. `check_contents` refuses a folder that holds anything else: other names, links that lead elsewhere, and results,
   tables and drawings of these names that the program did not write.
3. `remove` deletes what a layout lists, and a folder only once it is empty.
4. `clean` removes what a killed process was writing, which its name says, and, where a run is recorded, empty folders.
5. `check_complete` refuses the autoencoders of a run that has not ended.

Hidden files are nobody's business: they are neither looked at nor removed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae._files import is_temporary, read_json, remove_temporary
from sae._run.outputs import check_no_link, is_foreign
from sae.errors import UserError

RUN_CONFIG_FILE = "config.json"
NAMED = r"(_[^/]+)?"
MAKERS = ("train", "finetune", "sweep", "convert")
"""Commands that make autoencoders; their entry in `config.json` says whether they ended."""


@dataclass(frozen=True)
class Layout:
    """Names, as regular expressions, of what a folder may hold."""

    files: tuple[str, ...] = ()
    """Its files."""
    folders: Mapping[str, Layout | None] = field(default_factory=dict)
    """Its folders and what they may hold; None for anything."""

    def of(self, path: Path) -> Layout | None:
        """The layout of a folder in it; KeyError for one that is not listed."""
        return next(layout for name, layout in self.folders.items() if re.fullmatch(name, path.name))

    def lists(self, path: Path) -> bool:
        """Whether it names a file or folder; a link to a folder is neither."""
        if path.is_dir():
            return not path.is_symlink() and any(re.fullmatch(name, path.name) for name in self.folders)
        return any(re.fullmatch(name, path.name) for name in self.files)


SITE = r"embed|(resid|attn|mlp)_\d+"
EVALUATION = rf"evaluation{NAMED}\.(json|txt|svg|suite\.svg)"
SAE = Layout((r"config\.json", r"sae\.safetensors", EVALUATION))
MADE_WITH_SAES = (r"(training|finetuning)\.jsonl", EVALUATION)
"""Files beside the autoencoders that go with them; names of features that people gave stay."""
SAES = Layout((*MADE_WITH_SAES, r"labels\.jsonl"), {SITE: SAE})
CHECKPOINTS = Layout(folders={r"step_\d{8}": Layout((r"state\.json", r"state(-\d+-of-\d+)?\.safetensors"))})
PARTIAL = Layout((r"partial\.json", r"(nodes|edges)-\d{4,}\.safetensors"))
MEASURED = Layout((
    rf"(edge_)?faithfulness{NAMED}\.(json|svg)", rf"(edge_)?mask{NAMED}\.(json|safetensors)",
    rf"(validity|attention){NAMED}\.json",
    rf"shift{NAMED}\.(json|svg)", r"probe\.safetensors", r"probe_texts\.jsonl",
))  # fmt: skip
"""What is measured of a circuit and stands beside it."""
CIRCUIT = Layout(
    (r"circuit\.json", r"effects\.safetensors", r"features\.json", r"supernodes\.json", *MEASURED.files),
    {"partial": PARTIAL},
)
COMPARISON = Layout((r"comparison\.(json|txt|svg)",))
COMPARED_CIRCUITS = Layout((r"circuits\.(json|txt)", r"circuits_\d+_\d+\.html"))
PARTIAL_PAGES = Layout((r"state\.(json|safetensors)",))
FEATURES = Layout(
    (r"(index|circuit)\.json", r"index\.html", r"(groups|automata)\.(json|svg)", rf"({SITE})\.jsonl"),
    {"partial": PARTIAL_PAGES},
)
CACHE = Layout((r"manifest\.json", r"unfinished\.json", r"shard_\d{5,}\.safetensors"))
TRAINED = Layout((r"config\.json",), {"saes": SAES, "checkpoints": CHECKPOINTS})
OF_MASK = Layout(
    (r"config\.json", r"report\.html"), {"circuit": CIRCUIT, "edits": None, "graph": None, "features": FEATURES}
)  # fmt: skip
"""A learned mask as a circuit, in a folder like that of a run."""
RUN = Layout(
    (r"config\.json", r"report\.html", r"labels\.jsonl"),
    {
        "saes": SAES, "checkpoints": CHECKPOINTS, "circuit": CIRCUIT, "comparison": COMPARISON, "trained": TRAINED,
        "edits": None, "graph": None, "features": FEATURES, rf"(edge_)?mask{NAMED}": OF_MASK,
    },
)  # fmt: skip
BEHAVIOUR = Layout(
    (r"config\.json", r"report\.html", r"prompts\.jsonl"),
    {"circuit": CIRCUIT, "edits": None, "graph": None, "features": FEATURES},
)
"""A cluster of contexts with its circuit, in a folder like that of a run."""
BEHAVIOURS = Layout(
    (r"config\.json", r"behaviours\.(json|txt)", r"index\.html"), {"partial": PARTIAL, r"cluster_\d+": BEHAVIOUR}
)
SWEEP_RESULTS = r"sweep\.(json|txt)"
SWEEP_FILES = (r"config\.json", r"training\.jsonl", SWEEP_RESULTS, r"unfinished_evaluation\.safetensors")
PLOTS = Layout((r"[\w-]+\.svg",))


def sweep_layout(runs: Iterator[str] | list[str]) -> Layout:
    """The folder of a sweep of these runs."""
    folders: dict[str, Layout | None] = {re.escape(name): RUN for name in runs}
    return Layout(SWEEP_FILES, {"checkpoints": CHECKPOINTS, "plots": PLOTS, **folders})


def visible(folder: Path) -> list[Path]:
    """The files and folders in a folder, hidden ones left out; nothing where there is no folder."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []


TOLD_BY_CONTENTS = (
    EVALUATION, SWEEP_RESULTS, *MEASURED.files, *COMPARISON.files, *COMPARED_CIRCUITS.files, *PLOTS.files,
    BEHAVIOURS.files[1], *CIRCUIT.files, *CACHE.files, r"partial\.json", r"(report|index)\.html",
)  # fmt: skip
"""Names of files that other programs and people use as well."""


def _is_foreign(path: Path) -> bool:
    """Whether a file that a layout lists was not written by this program."""
    return path.is_file() and any(re.fullmatch(name, path.name) for name in TOLD_BY_CONTENTS) and is_foreign(path)


def strangers(folder: Path, layout: Layout) -> Iterator[Path]:
    """Files and folders that the layout of their folder does not list."""
    for path in visible(folder):
        if not layout.lists(path) or _is_foreign(path):
            yield path
        elif path.is_dir() and (inner := layout.of(path)) is not None:
            yield from strangers(path, inner)


def check_contents(folder: str | Path, layout: Layout) -> None:
    """Raises UserError for a folder that holds anything its layout does not list."""
    folder = Path(folder)
    names = [str(path.relative_to(folder)) for path in strangers(folder, layout)]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UserError(
            f"{str(folder)!r} holds {', '.join(map(repr, names[:3]))}{more}, not written by this program or not for "
            "this folder: give another one, nothing of it is deleted or overwritten"
        )


def remove(folder: Path, layout: Layout, *, with_folder: bool = True) -> None:
    """Deletes the files that a layout lists, and the folder if it is empty then; a link is never followed."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in sorted(folder.iterdir(), key=lambda path: path.suffix == ".json"):  # it says whose tables are
        if is_temporary(path) and path.is_file():
            path.unlink(missing_ok=True)
        elif not layout.lists(path):
            continue
        elif not path.is_dir():
            path.unlink(missing_ok=True)
        elif (inner := layout.of(path)) is not None:
            remove(path, inner)
    if with_folder:
        with suppress(OSError):  # it holds something else
            folder.rmdir()


def clean(folder: Path, layout: Layout | None = None) -> None:
    """Removes what killed processes were writing in a folder and those its layout lists; and, where a run is recorded,
    folders for unfinished work that they emptied.
    """
    _clean(
        folder, Layout(folders={**RUN.folders, **SAES.folders}) if layout is None else layout, is_run=_is_run(folder)
    )


def _clean(folder: Path, layout: Layout, *, is_run: bool) -> None:
    remove_temporary(folder)
    for path in folder.iterdir():
        if path.is_dir() and layout.lists(path):
            _clean(path, layout.of(path) or Layout(), is_run=is_run or _is_run(path))
            if is_run and path.name in ("partial", "checkpoints"):
                with suppress(OSError):  # it holds something
                    path.rmdir()


def _is_run(folder: Path) -> bool:
    try:
        return bool(read_run_config(folder))
    except UserError:  # a damaged file says nothing
        return False


def read_run_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a run folder; empty where there is none or the file is of another kind."""
    path = folder / RUN_CONFIG_FILE
    if not path.is_file():
        return {}
    entries = read_json(path)
    return entries if is_run_config(entries) else {}


def is_run_config(entries: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is one of a run folder: a version, and an object for each command."""
    return "schema_version" in entries and all(
        isinstance(value, dict) for key, value in entries.items() if key != "schema_version"
    )


def check_run_config(folder: Path) -> None:
    """Raises UserError for a folder whose `config.json` is a link, or not that of a run: it must not be overwritten."""
    path = folder / RUN_CONFIG_FILE
    check_no_link(path)
    if path.is_file() and not read_run_config(folder):
        raise UserError(
            f"{str(path)!r} is not the config of a run (but of a model?) and is not overwritten: give another folder"
        )


def check_complete(path: str | Path) -> None:
    """Raises UserError for the autoencoders, one or all, of a run that was interrupted or still runs."""
    path = Path(path)
    if not path.exists() and path.name != "saes":  # a name on the hub
        return
    runs = {path: MAKERS, path.parent: ("convert",)}
    if "saes" in (path.name, path.parent.name):
        runs[path.parent if path.name == "saes" else path.parent.parent] = MAKERS
    for run, commands in runs.items():
        entries = read_run_config(run)
        for command in commands:
            if entries.get(command, {}).get("complete") is False:
                again = "start again with --overwrite"
                way = again if command == "convert" else f"go on with --resume and the same options, or {again}"
                raise UserError(
                    f"the run in {str(run)!r} has not ended (sfc {command} was stopped, or still runs): {way}"
                )

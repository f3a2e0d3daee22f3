"""From what a user names to the dictionaries on this disk.

1. A path that exists is taken as it is. Else it is a name of the release table (`sae.formats.releases`), or
   `owner/repository` or `owner/repository/folder/inside` of the hub; several, between commas, are one set together.
2. The folders and files that dictionaries are known by are listed, on disk or in the repository, without downloading
   anything.
3. `located` takes one for each site, as `sae.formats.sets` chooses; `local_path` a single one: of several, the one at
   the site asked for, and of several `average_l0_N` in one folder (Gemma Scope) the one closest to 100. Anything else
   is an error that lists them.
4. Only what was chosen is downloaded: repositories of autoencoders hold terabytes.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import list_repo_files, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from sae._hub import hub_reachable
from sae.autoencoder import ReadKind, is_sae_folder
from sae.errors import UserError, near_paths, nearest
from sae.formats import circuit_tracer, qwen_scope, transcoder_circuits
from sae.formats.releases import full_name, near_releases, released
from sae.formats.sets import PREFERRED_L0, Choice, choose_set, split_source
from sae.formats.site_names import dictionary_site

log = logging.getLogger(__name__)

MARKERS = (
    "sae.safetensors", "sae_weights.safetensors", "ae.pt", "params.npz", "params.safetensors", "hyperparams.json",
)  # fmt: skip
"""Files an autoencoder's folder is known by."""
FILES = re.compile("|".join((circuit_tracer.FILE, qwen_scope.FILE, transcoder_circuits.FILE)))
"""Names of files that are a dictionary each."""
BESIDE = ("config.yaml", "config.json")
"""Files beside them that say more."""
MAX_DEPTH = 6
SHOWN = 8
_HUB_NAME = re.compile(
    r"(?:hf://)?(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<inside>[^@]+?))?/?(?:@(?P<revision>[\w./-]+))?"
)


@dataclass(frozen=True)
class Located:
    """A dictionary on this disk."""

    path: Path
    """Its folder or file."""
    read: ReadKind | None = None
    """Where it reads, if it is a transcoder of a set whose config says so elsewhere."""
    site: str = ""
    """Its site, where only the set says it."""


def check_source(source: str | Path) -> None:
    """`UserError` for what is neither a path on this disk nor the name of something on the hub; nothing is read."""
    for text, _ in split_source(full_name(str(source))):
        path = Path(text).expanduser()
        if path.exists():
            continue
        if release := released(text):
            raise UserError(f"{release}{near_releases(text)}")
        if text.startswith((".", "/", "~")) or _HUB_NAME.fullmatch(text) is None:
            raise UserError(
                f"no autoencoder at {str(path)!r}: there is no such path{near_paths(path)}{near_releases(text)}"
            )


def located(source: str | Path, sites: Sequence[str] | None = None) -> list[Located]:
    """The dictionaries of a source, one for each site; sites: those that are wanted, all by default."""
    dictionaries: list[Located] = []
    for text, choice in split_source(full_name(str(source))):
        path = Path(text).expanduser()
        if path.is_file():
            dictionaries.append(Located(path.parent if path.name in MARKERS else path))
        elif path.is_dir():
            dictionaries += _in_folder(path, choice, sites)
        else:
            dictionaries += _on_hub(text, choice, sites)
    return dictionaries


def local_path(source: str | Path, *, site: str = "") -> Path:
    """The folder or file of one autoencoder, downloaded if it is the hub's."""
    ((text, choice),) = split_source(full_name(str(source))) if "," not in str(source) else [(str(source), Choice())]
    if choice:
        several = located(source, [site] if site else None)
        if len(several) > 1:
            raise UserError(f"{str(source)!r} holds {len(several)} autoencoders: name a site")
        return several[0].path
    path = Path(text).expanduser()
    if path.is_file():
        return path.parent if path.name in MARKERS else path
    if path.exists() and not path.is_dir():
        raise UserError(f"{str(path)!r} is neither a file nor a folder: give one with autoencoders")
    if path.is_dir():
        ours = [folder.relative_to(path).as_posix() for folder in sae_folders(path)]
        return path / choose(ours or dictionaries_in(path), source=text, site=site)
    repository, inside, revision = _hub_name(text)
    listed, fetch = _listing(repository, inside, revision)
    return fetch([choose(listed, source=repository, site=site) if listed else inside or "."])[0]


def sae_folders(path: str | Path) -> list[Path]:
    """The folders of our own autoencoders: those of a run folder or its `saes` folder, or one's folder itself."""
    path = Path(path)
    if is_sae_folder(path):
        return [path]
    inside = path / "saes" if (path / "saes").is_dir() else path
    return sorted(p for p in inside.iterdir() if is_sae_folder(p)) if inside.is_dir() else []


def dictionaries_in(root: Path) -> list[str]:
    """Folders below `root` that hold an autoencoder, and files that are one, relative to it; "." is itself."""
    files = []
    for folder, inner, names in os.walk(root):
        relative = Path(folder).relative_to(root)
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        if len(relative.parts) >= MAX_DEPTH:
            inner.clear()
        files += [(relative / name).as_posix() for name in names]
    return _among(files)


def _among(files: Iterable[str]) -> list[str]:
    """The dictionaries among the files of a folder or repository: folders of those with a mark, and files."""
    paths = [PurePosixPath(file) for file in files]
    folders = {path.parent.as_posix() for path in paths if path.name in MARKERS}
    return sorted(folders | {path.as_posix() for path in paths if FILES.fullmatch(path.name)})


def choose(folders: Sequence[str], *, source: str, site: str = "") -> str:
    """One of the folders that hold an autoencoder; "." where none is known, for the readers to name what they miss."""
    if len(folders) > 1 and site:
        at_site = [folder for folder in folders if dictionary_site(f"{source}/{folder}") == site]
        if not at_site:
            sites = sorted({name for folder in folders if (name := dictionary_site(f"{source}/{folder}"))})
            raise UserError(f"{source!r} has no autoencoder for {site}: it has {', '.join(sites) or _listed(folders)}")
        folders = at_site
    if len(folders) > 1 and (closest := _closest_l0(folders)):
        log.info("%s: taking %s, the L0 closest to %d of %d", source, closest, PREFERRED_L0, len(folders))
        return closest
    if len(folders) > 1:
        raise UserError(f"{source!r} holds {len(folders)} autoencoders, name one: {_listed(folders)}")
    return folders[0] if folders else "."


def _closest_l0(folders: Sequence[str]) -> str:
    """The sibling folder `average_l0_N` with N closest to 100; "" if the folders are anything else."""
    paths = [PurePosixPath(folder) for folder in folders]
    matches = [re.fullmatch(r"average_l0_(\d+)", path.name) for path in paths]
    if len({path.parent for path in paths}) > 1 or not all(matches):
        return ""
    return min(folders, key=lambda folder: abs(int(folder.rpartition("_")[2]) - PREFERRED_L0))


def _listed(folders: Sequence[str]) -> str:
    more = len(folders) - SHOWN
    return ", ".join(folders[:SHOWN]) + (f", ... ({more} more)" if more > 0 else "")


# --- sets -------------------------------------------------------------------------------------------------------------


def _in_folder(path: Path, choice: Choice, sites: Sequence[str] | None) -> list[Located]:
    ours = sae_folders(path)
    if ours and choice:
        raise UserError(f"{str(path)!r} holds autoencoders of this project, one a site: leave out width and l0")
    if ours:
        return [Located(folder) for folder in ours]
    listed = dictionaries_in(path)
    return _of_set(listed, lambda chosen: [path / name for name in chosen], path, str(path), choice, sites)


def _on_hub(text: str, choice: Choice, sites: Sequence[str] | None) -> list[Located]:
    repository, inside, revision = _hub_name(text)
    listed, fetch = _listing(repository, inside, revision)
    root = None if listed else fetch([inside or "."])[0]
    name = repository if len(listed) > 1 else text
    return _of_set(listed, fetch, root, name, choice, sites)


def _of_set(
    listed: Sequence[str], fetch: Callable[[list[str]], list[Path]], root: Path | None, name: str, choice: Choice,
    sites: Sequence[str] | None,
) -> list[Located]:  # fmt: skip
    """One dictionary for each site of those that are listed, fetched; else those that a config in `root` names."""
    if not listed:
        assert root is not None
        return _of_config(root, sites) or [Located(root)]
    _check_layers(listed, name, sites)
    chosen = choose_set(listed, name, choice, sites) if len(listed) > 1 or choice else list(listed)
    return [Located(path) for path in fetch(chosen)]


def _check_layers(listed: Sequence[str], name: str, sites: Sequence[str] | None) -> None:
    """`UserError` for a set of files, one a layer, of which one is missing, unless sites were chosen."""
    layers = sorted(
        {int(match[1]) for path in listed if (match := re.fullmatch(rf"(?:.*/)?{circuit_tracer.FILE}", path))}
    )
    missing = sorted(set(range(layers[-1] + 1)) - set(layers)) if layers else []
    if missing and len(layers) > 1 and sites is None:
        raise UserError(
            f"{name!r} has layer_{layers[-1]}.safetensors and no layer_{missing[0]}.safetensors: download the whole "
            "set, or name the sites that are there"
        )


def _of_config(folder: Path, sites: Sequence[str] | None) -> list[Located]:
    """The transcoders that circuit-tracer's `config.yaml` in a folder names, in the order of the layers."""
    config = circuit_tracer.read_set(folder)
    place, dictionaries = circuit_tracer.input_place(config, folder), []
    for layer, address in enumerate(config.get("transcoders", ())):
        if sites is None or f"mlp_{layer}" in sites:
            path, _, revision = address.removeprefix("hf://").partition("?revision=")
            local = folder / path
            if address.startswith("hf://") or not local.exists():
                local = local_path(f"{path}@{revision}" if revision else path)
            dictionaries.append(Located(local.parent if local.name in MARKERS else local, place, f"mlp_{layer}"))
    return dictionaries


# --- the hub ----------------------------------------------------------------------------------------------------------

_UNREACHABLE = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError)


def _hub_name(text: str) -> tuple[str, str, str | None]:
    """Repository, path inside it and revision; UserError for what is no path and no name of the hub."""
    check_source(text)
    match = _HUB_NAME.fullmatch(text)
    assert match is not None
    return match["repository"], match["inside"] or "", match["revision"]


def _listing(repository: str, inside: str, revision: str | None) -> tuple[list[str], Callable[[list[str]], list[Path]]]:
    """The dictionaries below a path of a repository, and what brings some of them to this disk: from the hub, or from
    its cache here where the hub is out of reach.
    """
    try:
        if not hub_reachable():
            raise OfflineModeIsEnabled("the hub does not answer")
        files = list_repo_files(repository, revision=revision)
    except Exception as error:  # the hub's own kinds, and those of the library that makes its requests
        try:
            cached = Path(snapshot_download(repository, revision=revision, local_files_only=True))
        except _UNREACHABLE:
            raise _unreachable(repository, inside, error) from None
        below = [(PurePosixPath(inside) / path).as_posix() for path in dictionaries_in(cached / inside)]
        return below, lambda chosen: [cached / path for path in chosen]

    def fetch(chosen: list[str]) -> list[Path]:
        patterns = None if "." in chosen else [pattern for path in chosen for pattern in _patterns(path)]
        try:
            root = Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
        except _UNREACHABLE as error:
            raise _unreachable(repository, inside, error) from None
        return [root / path for path in chosen]

    return _below(repository, files, inside), fetch


def _patterns(path: str) -> list[str]:
    """Patterns of the files that are downloaded of a dictionary: its folder, or its file and what lies beside it."""
    name = PurePosixPath(path)
    if not FILES.fullmatch(name.name):
        return [path, f"{path}/*"]
    return [path, *((name.parent / beside).as_posix() for beside in BESIDE)]


def _below(repository: str, files: Sequence[str], inside: str) -> list[str]:
    """The dictionaries of a repository's files below a path."""
    below = [file for file in files if not inside or file == inside or file.startswith(f"{inside}/")]
    if not below:
        folders = sorted({PurePosixPath(file).parent.as_posix() for file in files} - {"."})
        close = nearest(inside, folders) or folders[:SHOWN]
        raise UserError(f"{repository} has no {inside!r}: nearest are {', '.join(close) or 'none'}")
    return _among(below)


def _unreachable(repository: str, inside: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    include = f' --include "{inside}/*"' if inside else ""
    return UserError(
        f"{repository!r} is neither a path on this disk nor a hub repository that can be reached: {reason}; where it "
        f"can be reached, hf download {repository}{include} --local-dir FOLDER, and give "
        f"FOLDER{'/' if inside else ''}{inside}"
    )

"""From what a user names to one folder or file on this disk.

1. A path that exists is taken as it is. Else `owner/repository` or `owner/repository/folder/inside` is the hub's.
2. The files that autoencoders are known by are listed, on disk or in the repository, without downloading anything.
3. One autoencoder is taken; of several, the one at the site asked for; of several `average_l0_N` in one folder (Gemma
   Scope), the one closest to 100. Anything else is an error that lists them.
4. Only the chosen folder is downloaded: repositories of autoencoders hold terabytes.
5. SAELens calls autoencoders by release and id, `gpt2-small-res-jb` and `blocks.8.hook_resid_pre`, neither of which is
   a path. Such a name is answered with the hub repository that holds the release; the names are those of SAELens'
   table of releases (`pretrained_saes.yaml`).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from huggingface_hub import list_repo_files, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from sae._hub import hub_reachable
from sae.autoencoder import is_sae_folder
from sae.errors import UserError, near_paths, nearest
from sae.formats.site_names import site_named

log = logging.getLogger(__name__)

MARKERS = (
    "sae.safetensors", "sae_weights.safetensors", "ae.pt", "params.npz", "params.safetensors", "hyperparams.json",
)  # fmt: skip
"""Files an autoencoder's folder is known by."""
PREFERRED_L0 = 100
MAX_DEPTH = 6
SHOWN = 8
_HUB_NAME = re.compile(
    r"(?:hf://)?(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<inside>[^@]+?))?/?(?:@(?P<revision>[\w./-]+))?"
)


def check_source(source: str | Path) -> None:
    """`UserError` for what is neither a path on this disk nor the name of something on the hub; nothing is read."""
    path = Path(source).expanduser()
    if path.exists():
        return
    if release := released(str(source)):
        raise release
    if str(source).startswith((".", "/", "~")) or _HUB_NAME.fullmatch(str(source)) is None:
        raise UserError(f"no autoencoder at {str(path)!r}: there is no such path{near_paths(path)}")


def local_path(source: str | Path, *, site: str = "") -> Path:
    """The folder or file of one autoencoder, downloaded if it is the hub's."""
    path = Path(source).expanduser()
    if path.is_file():
        return path.parent if path.name in MARKERS else path
    if path.exists() and not path.is_dir():
        raise UserError(f"{str(path)!r} is neither a file nor a folder: give one with autoencoders")
    if path.is_dir():
        ours = [folder.relative_to(path).as_posix() for folder in sae_folders(path)]
        return path / choose(ours or folders_in(path), source=str(source), site=site)
    check_source(source)
    match = _HUB_NAME.fullmatch(str(source))
    assert match is not None
    return _download(match["repository"], match["inside"] or "", match["revision"], site)


def sae_folders(path: str | Path) -> list[Path]:
    """The folders of our own autoencoders: those of a run folder or its `saes` folder, or one's folder itself."""
    path = Path(path)
    if is_sae_folder(path):
        return [path]
    inside = path / "saes" if (path / "saes").is_dir() else path
    return sorted(p for p in inside.iterdir() if is_sae_folder(p)) if inside.is_dir() else []


def folders_in(root: Path) -> list[str]:
    """Folders below `root` that hold an autoencoder, relative to it; "." is itself."""
    folders = []
    for folder, inner, files in os.walk(root):
        relative = Path(folder).relative_to(root)
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        if len(relative.parts) >= MAX_DEPTH:
            inner.clear()
        if not set(MARKERS).isdisjoint(files):
            folders.append(relative.as_posix())
    return sorted(folders)


def choose(folders: Sequence[str], *, source: str, site: str = "") -> str:
    """One of the folders that hold an autoencoder; "." where none is known, for the readers to name what they miss."""
    if len(folders) > 1 and site:
        at_site = [folder for folder in folders if site_named(f"{source}/{folder}") == site]
        if not at_site:
            sites = sorted({name for folder in folders if (name := site_named(f"{source}/{folder}"))})
            raise UserError(f"{source!r} has no autoencoder for {site}: it has {', '.join(sites) or _listed(folders)}")
        folders = at_site
    if len(folders) > 1 and (closest := _closest_l0(folders)):
        log.info("%s: taking %s, the L0 closest to %d of %d", source, closest, PREFERRED_L0, len(folders))
        return closest
    if len(folders) > 1:
        raise UserError(f"{source!r} holds {len(folders)} autoencoders, name one: {_listed(folders)}")
    return folders[0] if folders else "."


def _closest_l0(folders: Sequence[str]) -> str:
    """Of sibling folders `average_l0_N`, the one with N closest to 100; "" if they are anything else."""
    paths = [PurePosixPath(folder) for folder in folders]
    matches = [re.fullmatch(r"average_l0_(\d+)", path.name) for path in paths]
    if len({path.parent for path in paths}) > 1 or not all(matches):
        return ""
    return min(folders, key=lambda folder: abs(int(folder.rpartition("_")[2]) - PREFERRED_L0))


def _listed(folders: Sequence[str]) -> str:
    more = len(folders) - SHOWN
    return ", ".join(folders[:SHOWN]) + (f", ... ({more} more)" if more > 0 else "")


_UNREACHABLE = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError)


def _download(repository: str, inside: str, revision: str | None, site: str) -> Path:
    """The chosen folder of a repository, from the hub, or from its cache on this disk where the hub is out of reach."""
    try:
        if not hub_reachable():
            raise OfflineModeIsEnabled("the hub does not answer")
        files = list_repo_files(repository, revision=revision)
    except Exception as error:  # the hub's own kinds, and those of the library that makes its requests
        try:
            cached = Path(snapshot_download(repository, revision=revision, local_files_only=True))
        except _UNREACHABLE:
            raise _unreachable(repository, error) from None
        return cached / inside / choose(folders_in(cached / inside), source=repository, site=site)
    folder = _folder_inside(repository, files, inside, site)
    patterns = None if folder == "." else [folder, f"{folder}/*"]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns)) / folder
    except _UNREACHABLE as error:
        raise _unreachable(repository, error) from None


def _folder_inside(repository: str, files: Sequence[str], inside: str, site: str) -> str:
    """The folder of a repository's files that is meant."""
    below = [file for file in files if not inside or file == inside or file.startswith(f"{inside}/")]
    if not below:
        folders = sorted({_folder_of(file) for file in files} - {"."})
        close = nearest(inside, folders) or folders[:SHOWN]
        raise UserError(f"{repository} has no {inside!r}: nearest are {', '.join(close) or 'none'}")
    marked = sorted({_folder_of(file) for file in below if PurePosixPath(file).name in MARKERS})
    return choose(marked, source=repository, site=site) if marked else inside or "."


def _unreachable(repository: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(
        f"{repository!r} is neither a path on this disk nor a hub repository that can be reached: {reason}"
    )


def _folder_of(file: str) -> str:
    return PurePosixPath(file).parent.as_posix()


# ---- releases of SAELens

_OPENAI = "jbloom/GPT2-Small-OAI-v5-{1}-{0}-SAEs"
_REPOSITORIES: tuple[tuple[str, str], ...] = (
    (r"gpt2-small-res-jb-feature-splitting", "jbloom/GPT2-Small-Feature-Splitting-Experiment-Layer-8"),
    (r"gpt2-small-res-jb", "jbloom/GPT2-Small-SAEs-Reformatted"),
    (r"gpt2-small-hook-z-kk", "ckkissane/attn-saes-gpt2-small-all-layers"),
    (r"gpt2-small-mlp-tm", "tommmcgrath/gpt2-small-mlp-out-saes"),
    (r"gpt2-small-(resid-post|resid-mid|mlp-out|attn-out)-v5-(32k|128k)", _OPENAI),
    (r"gemma-2b-res-jb", "jbloom/Gemma-2b-Residual-Stream-SAEs"),
    (r"gemma-2b-it-res-jb", "jbloom/Gemma-2b-IT-Residual-Stream-SAEs"),
    (r"mistral-7b-res-wg", "JoshEngels/Mistral-7B-Residual-Stream-SAEs"),
    (r"pythia-70m-deduped-(res|mlp|att)-sm", "ctigges/pythia-70m-deduped__{0}-sm_processed"),
    (r"llama-3-8b-it-res-jh", "Juliushanhanhan/llama-3-8b-it-res"),
    (r"(gemma-scope-[\w.-]+?)(?:-canonical)?", "google/{0}"),
)
_LLAMA_SCOPE = {"r": "LXR", "m": "LXM", "a": "LXA"}


def repository_of(release: str) -> str:
    """The hub repository of a SAELens release, "" where the name is none that is known.

    >>> repository_of("gpt2-small-res-jb"), repository_of("gemma-scope-2b-pt-res-canonical")
    ('jbloom/GPT2-Small-SAEs-Reformatted', 'google/gemma-scope-2b-pt-res')
    """
    for pattern, repository in _REPOSITORIES:
        if match := re.fullmatch(pattern, release):
            return repository.format(*match.groups())
    if match := re.fullmatch(r"llama_scope_lx([rma])_(8|32)x", release):
        return f"fnlp/Llama3_1-8B-Base-{_LLAMA_SCOPE[match[1]]}-{match[2]}x"
    return ""


def released(source: str) -> UserError | None:
    """The error for a source that begins with a release of SAELens, with what to give instead; else None."""
    release, _, inside = source.partition("/")
    repository = repository_of(release)
    if not repository:
        return None
    inside = inside.removesuffix("/canonical").strip("/")
    return UserError(
        f"{source!r} is a name of SAELens, not a folder or a hub repository: give {repository}"
        + (
            f"/{inside}, or whichever folder of it holds the autoencoder"
            if inside
            else " and the folder of an "
            f"autoencoder in it, such as {repository}/FOLDER, or --site to pick one by its site"
        )
    )

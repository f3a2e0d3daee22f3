"""Released dictionaries by name: a table of whole sets, and what SAELens calls single ones.

1. `releases.json` lists sets that one name loads: where they are, for which model and sites, which reader they have.
   `--saes NAME` stands for the `source` of the row (`sfc saes` lists them); a query chooses among widths and
   sparsities, as for any set (`sae.formats.sets`).
2. SAELens calls autoencoders by release and id, `gpt2-small-res-jb` and `blocks.8.hook_resid_pre`, neither of which is
   a path. Such a name is answered with the hub repository that holds the release; the names are those of SAELens'
   table of releases (`pretrained_saes.yaml`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from typing_extensions import TypedDict

from sae._files import parse_json
from sae.errors import UserError, did_you_mean, nearest

TABLE = "releases.json"


class _Row(TypedDict):
    name: str
    source: str
    model: str
    sites: str
    reader: str


class _Table(TypedDict):
    releases: list[_Row]


@dataclass(frozen=True)
class Release:
    """A released set of dictionaries."""

    name: str
    """Name for `--saes`."""
    source: str
    """Address on the hub."""
    model: str
    """The model they are of."""
    sites: str
    """The sites they are at, and which choices there are."""
    reader: str
    """The format they are in."""


@cache
def releases() -> dict[str, Release]:
    """The table, by name."""
    text = resources.files(__package__).joinpath(TABLE).read_text(encoding="utf-8")
    rows = parse_json(text, TABLE, _Table)["releases"]
    return {row["name"]: Release(**row) for row in rows}


def full_name(source: str) -> str:
    """The source with names of the table replaced by where the sets are; a query of theirs goes to each part."""
    sources = []
    for part in source.split(",") if "," in source else [source]:
        name, mark, query = part.strip().partition("?")
        release = releases().get(name)
        if release is None or Path(name).expanduser().exists():
            sources.append(part.strip() if "," in source else part)
        else:
            addresses = release.source.split(",")
            sources += [address if "?" in address else f"{address}{mark}{query}" for address in addresses]
    return ",".join(sources)


def near_releases(text: str) -> str:
    """`; did you mean 'gemma-scope-2b-pt-res'?`, empty where no name of the table is near."""
    return did_you_mean(nearest(text, releases(), n=1)) if "/" not in text else ""


# --- releases of SAELens ----------------------------------------------------------------------------------------------

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

"""One of the dictionaries of a whole set, or one for each of its sites.

A set is a folder or repository with several dictionaries a site: widths, sparsities, seeds. `Choice` says which, and is
written behind the source as a query, so that one text names the dictionaries of a circuit:

    google/gemma-scope-2-1b-pt?width=16k&l0=small
    google/gemma-scope-2-1b-pt/resid_post_all?width=16k&l0=small,google/gemma-scope-2-1b-pt/transcoder_all?width=16k&l0=big

1. The paths are read for what they say: site, width, L0, whether it is a further seed, has an affine skip, is a
   transcoder. Nothing is opened.
2. What was asked for is selected. An L0 that is a number selects the nearest; where none is asked for and paths have
   numbers (`average_l0_82`), the nearest to 100 is taken.
3. Of what is left at a site, the first of its kind: no further seed, no affine skip, the sets of all layers
   (`resid_post_all`), autoencoders before transcoders. Where that leaves several, the error lists what can be chosen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode

from sae.errors import UserError, unknown
from sae.formats.site_names import dictionary_site

PREFERRED_L0 = 100


@dataclass(frozen=True)
class Choice:
    """Which of several dictionaries of a site is meant."""

    width: str = ""
    """Number of features, as its owners write it: 16k, or 16384."""
    l0: str = ""
    """Active features a token: small, medium, big, or a number of which the nearest is taken."""
    affine: str = ""
    """1 for those with an affine skip."""

    def __bool__(self) -> bool:
        return bool(self.width or self.l0 or self.affine)


@dataclass(frozen=True)
class Entry:
    """A dictionary as its path describes it; "" for what the path does not say."""

    path: str
    site: str
    width: str
    l0: str
    further_seed: bool
    affine: bool
    all_layers: bool
    transcoder: bool


def split_source(source: str) -> list[tuple[str, Choice]]:
    """The parts of a source, each with the choice of its query; UserError for a query of anything else."""
    sources: list[tuple[str, Choice]] = []
    for part in source.split(",") if "," in source else [source]:
        path, mark, query = part.strip().partition("?")
        values = dict(parse_qsl(query, keep_blank_values=True))
        for name in values:
            if name not in Choice.__dataclass_fields__:
                raise unknown(f"choice of dictionaries in {source!r}", name, Choice.__dataclass_fields__)
        if mark and not values:
            raise UserError(f"{source!r} has nothing to choose by behind the ?: write ?width=16k&l0=small")
        sources.append((path, Choice(**values)))
    return sources


def with_choice(source: str, *, width: str | None = None, l0: str | None = None) -> str:
    """The source with a choice written behind each part that has none of its own."""
    given = {name: value for name, value in (("width", width), ("l0", l0)) if value}
    if not given:
        return source
    return ",".join(part if "?" in part else f"{part.strip()}?{urlencode(given)}" for part in source.split(","))


def entry(path: str, source: str) -> Entry:
    """Read the path of a dictionary below a source."""
    address = f"{source}/{path}"
    width = re.search(r"width_(\w+?)(?=_|/|$)", path) or re.search(r"(?:^|/)\d+_(\d{3,})(?:/|$)", path)
    l0 = re.search(r"average_l0_(\d+)", path) or re.search(r"_l0_([a-z]+|\d+)", path)
    return Entry(
        path=path,
        site=dictionary_site(address),
        width=width[1] if width else "",
        l0=l0[1] if l0 else "",
        further_seed=re.search(r"_seed_\d+", path) is not None,
        affine=path.rstrip("/").endswith("_affine"),
        all_layers=re.search(r"_all(/|$)", address) is not None,
        transcoder="transcoder" in address,
    )


def choose_set(paths: Iterable[str], source: str, choice: Choice, sites: Sequence[str] | None = None) -> list[str]:
    """One path for each site.

    paths: of dictionaries, below `source`; sites: those that are wanted, all by default. Paths that do not say their
    site are all taken. Raises UserError where nothing fits the choice, or several do.
    """
    entries = [entry(path, source) for path in paths]
    asked = _asked(entries, source, choice)
    by_site: dict[str, list[Entry]] = {}
    for each in asked:
        by_site.setdefault(each.site, []).append(each)
    unnamed = by_site.pop("", [])
    wanted = [site for site in by_site if sites is None or site in sites]
    chosen = [_one(by_site[site], site, source, choice).path for site in wanted]
    return chosen + [each.path for each in unnamed]


def _asked(entries: Sequence[Entry], source: str, choice: Choice) -> list[Entry]:
    """The entries that the choice selects; a number for the L0 selects none by itself."""
    left = list(entries)
    if choice.width:
        left = [each for each in left if _same_width(each.width, choice.width)]
    if choice.l0 and not choice.l0.isdecimal():
        left = [each for each in left if each.l0 == choice.l0]
    if choice.affine:
        left = [each for each in left if each.affine]
    if entries and not left:
        asked = " and ".join(f"{name} {value}" for name, value in vars(choice).items() if value)
        raise UserError(f"{source!r} has no dictionary of {asked}: {_offered(entries)}")
    return left


def _same_width(there: str, asked: str) -> bool:
    """Whether two ways of writing a width mean the same: 65536 is 64k or 65k, 1048576 is 1m."""
    if not asked.isdecimal():
        return there == asked
    width = int(asked)
    return there in (asked, f"{width // 1024}k", f"{width // 1000}k", f"{width // 1024**2}m")


def _one(entries: list[Entry], site: str, source: str, choice: Choice) -> Entry:
    """The one of a site's entries that is meant."""
    left = entries
    preferences: tuple[Callable[[Entry], bool], ...] = (
        lambda each: not each.further_seed,
        lambda each: bool(choice.affine) or not each.affine,
        lambda each: each.all_layers,
        lambda each: not each.transcoder,
    )
    for preferred in preferences:
        left = [each for each in left if preferred(each)] or left
    if len({each.width for each in left}) == 1 and all(each.l0.isdecimal() for each in left):
        target = int(choice.l0) if choice.l0.isdecimal() else PREFERRED_L0
        return min(left, key=lambda each: (abs(int(each.l0) - target), each.path))
    if len(left) > 1:
        raise UserError(f"{source!r} holds {len(left)} dictionaries for {site}, choose one: {_offered(left)}")
    return left[0]


def _offered(entries: Iterable[Entry]) -> str:
    """The widths and L0s that there are, or the paths where these say neither."""
    entries = list(entries)
    widths, l0s = (sorted({getattr(each, name) for each in entries} - {""}, key=_size) for name in ("width", "l0"))
    options = [f"--width {', '.join(widths)}"] if widths else []
    options += [f"--l0 {', '.join(l0s[:8])}{', ...' if len(l0s) > 8 else ''}"] if l0s else []
    return " and ".join(options) or ", ".join(each.path for each in entries[:8])


def _size(name: str) -> tuple[float, str]:
    match = re.fullmatch(r"(\d+)(k|m)?", name)
    return (int(match[1]) * {"k": 1024, "m": 1024**2}.get(match[2] or "", 1), name) if match else (0.0, name)

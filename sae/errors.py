"""The one exception for a user's mistake: what was given, what is allowed, the nearest match, in one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

SHOWN_OPTIONS = 12


class UserError(ValueError):
    """A mistake in what the user gave; its text is one sentence that can be shown without a traceback."""


def nearest(name: str, options: Iterable[str], n: int = 3) -> list[str]:
    """The up to `n` options that look most like `name`, best first."""
    by_lower = {option.lower(): option for option in options}
    return [by_lower[key] for key in difflib.get_close_matches(name.lower(), by_lower, n=n, cutoff=0.5)]


def near_paths(path: str | Path, *, folders: bool = False) -> str:
    """For a path that is not there, what its folder has of that kind under like names: `; did you mean 'a/b.txt'?`."""
    path = Path(path)
    there = path.parent.iterdir() if path.parent.is_dir() else ()
    close = nearest(path.name, [other.name for other in there if other.is_dir() or not folders], n=2)
    return did_you_mean(str(path.parent / name) for name in close)


def did_you_mean(matches: Iterable[str]) -> str:
    """`; did you mean 'a' or 'b'?`, empty for none."""
    shown = " or ".join(map(repr, matches))
    return f"; did you mean {shown}?" if shown else ""


def unknown(what: str, name: str, options: Iterable[str]) -> UserError:
    """The error for a name that is not among the options; raise what this returns.

    >>> print(unknown("site", "resd_3", ["mlp_3", "resid_3"]))
    unknown site 'resd_3': allowed are mlp_3, resid_3; did you mean 'resid_3'?
    """
    options = list(options)
    more = len(options) - SHOWN_OPTIONS
    allowed = ", ".join(options[:SHOWN_OPTIONS]) + (f", ... ({more} more)" if more > 0 else "")
    hint = did_you_mean(nearest(name, options, n=2))
    return UserError(f"unknown {what} {name!r}: allowed are {allowed or 'none'}{hint}")

"""Errors of a user, said in one sentence: the offending value, what is allowed, the nearest match."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GraphError(ValueError):
    """A mistake in a graph, a graph file or a request about one; its text is meant for the person who made it."""


def unknown(what: str, name: str, options: Iterable[str]) -> GraphError:
    """`unknown node 'resid_3/12': did you mean 'resid_3/120'?`, or what is allowed when nothing is near."""
    allowed = list(options)
    close = difflib.get_close_matches(name, allowed, n=3, cutoff=0.5)
    if close:
        return GraphError(f"unknown {what} {name!r}: did you mean {', '.join(map(repr, close))}?")
    shown = ", ".join(map(repr, allowed[:8])) + (f" and {len(allowed) - 8} more" if len(allowed) > 8 else "")
    return GraphError(f"unknown {what} {name!r}: allowed are {shown or 'none'}")

"""Make a graph fit for strangers: it names models, files and folders, and does not tell where they are on a disk."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

OF_PROMPTS = ("title", "metric", "tokens", "positions", "span_words", "last_span", "templates")
"""Metadata that are words, in which a slash is no path."""
_PATH = re.compile(r"(?P<kind>[\w-]{2,}:)?(~|\.|[A-Za-z]:)?[/\\].*", re.DOTALL)


def shared(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata with the last name in place of every absolute path: `/home/anna/models/pythia` becomes `pythia`."""
    return {key: value if key in OF_PROMPTS else without_folders(value) for key, value in metadata.items()}


def without_folders(value: Any) -> Any:
    """A JSON value with the last name in place of every text in it that is an absolute path, or one in the run."""
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    match = _PATH.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return value
    name = re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return "this run" if name == "." else (match["kind"] or "") + name

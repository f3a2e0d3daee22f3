"""YAML files, read as JSON files are: once, by a schema, with one sentence for what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sae._files import check_type, read_text
from sae.errors import UserError

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml where PyYAML has it: thousands of open brackets take the loader in Python seconds, and far more minutes."""


def read_yaml(path: str | Path, schema: Any = Any) -> Any:
    """A YAML file as a value of the type `schema`, as `parse_json` has it for JSON."""
    text = read_text(path)
    try:
        has_aliases = any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, LOADER))
        loaded = None if has_aliases else yaml.load(text, LOADER)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not YAML ({reason[:200]})") from None
    if has_aliases:  # a few lines of them can stand for terabytes
        raise UserError(f"{path}: repeats parts of itself by aliases: write it without * and &")
    return loaded if schema is Any else check_type(loaded, schema, path)

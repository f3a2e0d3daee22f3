"""Nested dataclasses of tensors <-> flat tensors named by their path, as safetensors files hold them.

A tensor, number or truth value is one tensor. The fields of a dataclass and the entries of a dictionary are named below
it: `effects/resid_3/value`. Keys are sites, or pairs (upstream, downstream), of which None is written `metric`:
`edges/embed/metric`. None and empty dictionaries are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from sae.model.sites import Site

NOT_SAVED = {"saved": False}
"""Metadata of a dataclass field that is no tensor and is not part of the file."""
METRIC = "metric"


def flatten(value: Any, name: str = "") -> dict[str, Tensor]:
    """Tensors by name of a dataclass, dictionary, tensor or number; `name`: what stands in front of the names."""
    if value is None:
        return {}
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, int | float):  # truth values are integers as well
        return {name: torch.tensor([value], dtype=torch.float64 if isinstance(value, float) else None)}
    if is_dataclass(value):
        entries = {entry.name: getattr(value, entry.name) for entry in fields(value) if _is_saved(entry)}
    else:
        entries = {_key_text(key): item for key, item in value.items()}
    return {path: x for key, item in entries.items() for path, x in flatten(item, _join(name, key)).items()}


def unflatten(kind: Any, tensors: Mapping[str, Tensor], name: str = "", **given: Any) -> Any:
    """The value of a type that `flatten` gave these tensors for; the reverse of it.

    Args:
        kind: its type: a dataclass, `dict[Site, ...]`, `dict[tuple[Site, Site | None], ...]`, Tensor, int, float, bool,
            or one of these or None.
        tensors: tensors by name; others may be among them.
        name: what stands in front of the names.
        given: values of fields that are not saved, by name, whichever dataclass they are in.
    """
    if type(None) in get_args(kind):
        if not any(path == name or path.startswith(f"{name}/") for path in tensors):
            return None
        (kind,) = (part for part in get_args(kind) if part is not type(None))
    if kind is Tensor:
        return tensors[name]
    if kind in (int, float, bool):
        return kind(tensors[name].item())
    if get_origin(kind) is dict:
        return _unflatten_dict(kind, tensors, name, given)
    hints = get_type_hints(kind)
    values = {}
    for entry in fields(kind):
        if _is_saved(entry):
            values[entry.name] = unflatten(hints[entry.name], tensors, _join(name, entry.name), **given)
        elif entry.name in given or (entry.default is MISSING and entry.default_factory is MISSING):
            values[entry.name] = given[entry.name]
    return kind(**values)


def _unflatten_dict(kind: Any, tensors: Mapping[str, Tensor], name: str, given: Mapping[str, Any]) -> dict[Any, Any]:
    key_kind, item_kind = get_args(kind)
    n_parts = 2 if get_origin(key_kind) is tuple else 1
    above = _join(name, "")
    paths = (path.removeprefix(above) for path in tensors if path.startswith(above))
    texts = dict.fromkeys("/".join(path.split("/")[:n_parts]) for path in paths)
    items = {_key(text): unflatten(item_kind, tensors, _join(name, text), **given) for text in texts}
    return items if n_parts == 2 else dict(sorted(items.items()))


def _is_saved(entry: Any) -> bool:
    return entry.metadata.get("saved", True)


def _key_text(key: Any) -> str:
    return "/".join(METRIC if part is None else str(part) for part in (key if isinstance(key, tuple) else (key,)))


def _key(text: str) -> Any:
    sites = tuple(None if part == METRIC else Site.parse(part) for part in text.split("/"))
    return sites if len(sites) == 2 else sites[0]


def _join(name: str, key: str) -> str:
    return f"{name}/{key}" if name else key

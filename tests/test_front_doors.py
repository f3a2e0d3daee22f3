"""The public names say what they take, what they give and how they fail."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import circuits
import graphs
import sae


def public() -> Iterator[tuple[str, Any]]:
    """Every public function, and every public method that takes two arguments or more, with its name."""
    for package in (sae, circuits, graphs):
        for name in package.__all__:
            value = getattr(package, name)
            if inspect.isfunction(value):
                yield f"{package.__name__}.{name}", value
            for method, function in vars(value).items() if inspect.isclass(value) else ():
                if value is sae.LanguageModel:
                    continue  # its methods say it in sentences
                many = inspect.isfunction(function) and len(inspect.signature(function).parameters) > 2
                if many and not method.startswith("_"):
                    yield f"{name}.{method}", function


def test_public_names_are_explained():
    missing = []
    for name, function in public():
        text, signature = inspect.getdoc(function) or "", inspect.signature(function)
        entries = re.findall(r"^ *([\w, ]+): ", text, re.MULTILINE)
        explained = {"self", *re.findall(r"\w+", " ".join(entries))}
        missing += [f"{name}: {argument}" for argument in signature.parameters if argument not in explained]
        if signature.return_annotation not in (None, "None") and "Returns:" not in text:
            missing.append(f"{name}: what it returns")
    assert not missing, "\n".join(missing)

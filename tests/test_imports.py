"""Where imports go, read from the source: down the lists of DESIGN, never back up; how large files may be; words."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("sae", "graphs", "circuits")
ORDER = {
    "sae": ("sparse", "architectures", "model", "data", "formats", "features", "training", "evaluation"),
    "circuits": (
        "prompts", "metrics", "attribution", "uncertainty", "discovery", "faithfulness", "validity", "editing",
        "debiasing", "benchmark", "comparison", "behaviours", "report", "cli",
    ),
}  # fmt: skip
"""Sub-packages that use one another, each only those before it."""
FILLERS = {"found", "kept", "known", "learner", "own", "recipe", "stuff", "thing", "whole", "work"}
PRONOUNS = {"It", "Of", "That", "Those", "What", "Where"}
LINES, FUNCTION_LINES, ROOMS = 400, 50, 20


def statements(block: ast.AST) -> Iterator[ast.stmt]:
    """Those of a module, class or function, and those inside of them; expressions are not looked into."""
    for name in ("body", "orelse", "handlers", "finalbody", "cases"):
        for node in getattr(block, name, ()):
            if isinstance(node, ast.stmt):
                yield node
            yield from statements(node)


TREES = {path.relative_to(ROOT): ast.parse(path.read_text(encoding="utf-8"))
         for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}  # fmt: skip
FILES = {path: list(statements(tree)) for path, tree in TREES.items()}


def module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path) for path in FILES}


def imports(nodes: list[ast.stmt]) -> Iterator[str]:
    """Everything that a file imports, inside functions too; not what only type checkers read in a front door."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                yield inner if inner in MODULES else node.module


USES = {module(path): set(imports(nodes)) for path, nodes in FILES.items() if path.parts[1:] != ("__init__.py",)}
"""The front doors themselves name what they offer, and are left out."""


def users(name: str) -> set[str]:
    return {user for user, used in USES.items() if any(use == name or use.startswith(f"{name}.") for use in used)}


def test_packages_know_what_they_may():
    for package, forbidden in (("sae", ("circuits", "graphs")), ("graphs", ("circuits", "sae", "torch"))):
        assert not {user for name in forbidden for user in users(name) if user.split(".")[0] == package}, package
    assert users("nnsight") == {"sae.model.tracing"}
    assert not users("examples")


@pytest.mark.parametrize("package", ORDER)
def test_sub_packages_stand_on_those_before_them(package):
    order = ORDER[package]
    up = [
        (user, use)
        for user, used in USES.items()
        for use in used
        if user.split(".")[0] == use.split(".")[0] == package
        and user.split(".")[1] in order and use.split(".")[1:2] and use.split(".")[1] in order
        and order.index(user.split(".")[1]) < order.index(use.split(".")[1])
    ]  # fmt: skip
    assert not up


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circles(package):
    """Neither between files nor between the rooms of a package's first floor."""
    for depth in (None, 2):
        below: dict[str, set[str]] = defaultdict(set)
        for user, used in USES.items():
            for use in used & MODULES:
                a, b = (".".join(name.split(".")[:depth]) for name in (user, use))
                if a != b and user.split(".")[0] == use.split(".")[0] == package and b != package:
                    below[a].add(b)
        left = set(below)
        while ready := {name for name in left if not below[name] & left}:
            left -= ready
        assert not left, left


def code_lines(function: ast.FunctionDef) -> int:
    """Lines of a function with its signature, its docstring aside."""
    docstring = function.body[0] if ast.get_docstring(function, clean=False) is not None else None
    lines = (function.end_lineno or 0) - function.lineno + 1
    return lines - (docstring.end_lineno - docstring.lineno + 1 if docstring else 0)


def test_files_and_functions_are_short():
    long_files = {str(path): n for path in FILES if (n := len((ROOT / path).read_text().splitlines())) > LINES}
    long_functions = {
        f"{path}:{node.name}": length
        for path, nodes in FILES.items()
        for node in nodes
        if isinstance(node, ast.FunctionDef) and (length := code_lines(node)) > FUNCTION_LINES
    }
    assert not long_files and not long_functions


@pytest.mark.slow
def test_no_level_has_too_many_rooms():
    """Files and folders beside each other, those for internal use aside."""
    rooms: dict[Path, set[str]] = defaultdict(set)
    for path in FILES:
        for folder in path.parents[:-1]:
            name = path.relative_to(folder).parts[0]
            rooms[folder] |= set() if name.startswith("_") else {name}
    assert not {str(folder): sorted(names) for folder, names in rooms.items() if len(names) > ROOMS}


@pytest.mark.slow
def test_variables_say_what_they_hold():
    """No variable or argument of a function has a name that could be any other's."""
    unnamed = set()
    for path, nodes in FILES.items():
        for function in (node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            for node in ast.walk(function):
                name = node.arg if isinstance(node, ast.arg) else node.id if isinstance(node, ast.Name) else ""
                if name in FILLERS:
                    unnamed.add(f"{path}:{node.lineno} {name}")
    assert not unnamed


@pytest.mark.slow
def test_docstrings_name_the_thing():
    """No docstring of a module, class or function begins with a word that stands for the thing it should name."""
    riddles = set()
    for path, tree in TREES.items():
        for node in (n for n in (tree, *FILES[path]) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)):
            first = (ast.get_docstring(node, clean=False) or " ").split(" ", 1)[0]
            if first in PRONOUNS:
                riddles.add(f"{path}:{getattr(node, 'name', 'module')}: {first} ...")
    assert not riddles

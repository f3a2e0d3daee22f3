"""From the words of a command line to a command, by tyro; usage errors become one sentence.

1. `prepare` gives every option of a command its help sentence, from the docstring below the field, in one paragraph,
   with its range and default; required options come first, those of every command last.
2. `parse` lets tyro read the words. What does not fit raises UserError: the option, what is allowed, the nearest match.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin  # noqa: TID251

import tyro
from tyro import _errors as events

from circuits.cli.options import UsesSaes
from sae._options import field_types, ranges
from sae.errors import UserError, did_you_mean, nearest, unknown

Command = TypeVar("Command")
CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
NUMBERS = {int: "a whole number", float: "a number"}
_prepared: set[tuple[type, str]] = set()


def parse(command: type[Command], words: Sequence[str], *, prog: str) -> Command:
    """A command with the options that the words give; for `--help`, print it and end with SystemExit.

    Raises UserError for words that do not fit.
    """
    prepare(command)  # type: ignore[arg-type]

    def fail(event: events.ParseErrorEvent) -> None:
        raise UserError(f"{_mistake(event, command, words)} (see {prog} --help)")

    with events.on_parse_error(fail):
        return tyro.cli(command, prog=prog, args=list(words), config=CONFIG)


@cache
def prepare(options: Any) -> None:
    """Write sentence, range and default of every field into its type, where tyro reads them.

    tyro reads the docstrings below fields too, with its line breaks, and checks the default of `X | None` by typeguard:
    both take longer than all the rest of `--help`, and neither is needed for what is written here.
    """
    sentences, limits = _sentences(options), ranges(options)
    for field in fields(options):
        hint = field_types(options)[field.name]
        owner = next(base for base in options.__mro__ if field.name in inspect.get_annotations(base))
        if (owner, field.name) in _prepared:
            continue
        _prepared.add((owner, field.name))
        if is_dataclass(hint):
            prepare(hint)  # type: ignore[arg-type]
            shown = tyro.conf.arg(name="", help="")
        else:
            limit = f"{limits[field.name]}; " if field.name in limits else ""
            brackets = _brackets(field, limit)
            shown = tyro.conf.arg(help=sentences[field.name], help_behavior_hint=brackets, metavar=_metavar(hint))
        union = Union[get_args(hint)] if isinstance(hint, UnionType) else hint  # noqa: UP007
        owner.__annotations__[field.name] = Annotated[union, shown]
    options.__dataclass_fields__ = {field.name: field for field in sorted(fields(options), key=_rank)}


def _rank(field: Field[Any]) -> int:
    """Required options before others, those that every command has at the end."""
    if field.name in {shared.name for shared in fields(UsesSaes)}:
        return 2
    return int(field.default is not MISSING or field.default_factory is not MISSING)


def _brackets(field: Field[Any], limit: str) -> str:
    """The brackets after a help sentence; empty where the sentence says the default itself."""
    if field.default is MISSING and field.default_factory is MISSING:
        return f"({limit}required)"
    if field.default in (None, "") or isinstance(field.default, bool):
        return f"({limit.removesuffix('; ')})" if limit else ""
    default = f"{field.default:g}" if isinstance(field.default, float) else field.default
    return f"({limit}default: {default})"


def _metavar(hint: Any) -> str | None:
    """`INT`, `{kl,ce}`, ...; None for a flag."""
    if get_origin(hint) is Literal:
        return "{" + ",".join(map(str, get_args(hint))) + "}"
    if isinstance(hint, type):
        return None if hint is bool else hint.__name__.upper()
    members = (hint.__origin__,) if get_origin(hint) is Annotated else get_args(hint)
    return next((name for member in members if member is not type(None) and (name := _metavar(member))), None)


@cache
def _sentences(options: type) -> dict[str, str]:
    """The docstring below every field of a dataclass, inherited ones included, as one paragraph."""
    paragraphs: dict[str, str] = {}
    for base in reversed(options.__mro__):
        if is_dataclass(base):
            for field, below in pairwise(_classes(inspect.getfile(base))[base.__name__].body):
                if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                    paragraphs[ast.unparse(field.target)] = " ".join(ast.literal_eval(below.value).split())
    return paragraphs


@cache
def _classes(path: str) -> dict[str, ast.ClassDef]:
    """The syntax of the classes in a file, by name."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def option_names(command: Any) -> Iterator[str]:
    """Every option of a command, such as `--edge-nodes`, those of the option classes it holds included."""
    hints = field_types(command)
    for field in fields(command):  # type: ignore[arg-type]
        hint = hints[field.name]
        if is_dataclass(hint):
            yield from option_names(hint)
        elif tyro.conf.Suppress not in get_args(hint):
            yield f"--{'no-' if field.default is True else ''}{field.name.replace('_', '-')}"


def _mistake(event: events.ParseErrorEvent, command: type, words: Sequence[str]) -> str:
    """The mistake in the words of a command line, as a sentence."""
    names = ["--help", *option_names(command)]
    if isinstance(event, events.UnrecognizedArgs):
        return _not_understood(event.tokens, names)
    if isinstance(event, events.MissingArgs):
        misspelt = [word for word in event.unrecognized_tokens if word.startswith("--")]
        if misspelt:
            return _not_understood(misspelt, names)
        missing = [missed.arg.lowered.name_or_flags[0] for missed in event.missing_arguments]
        return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    argument = getattr(event, "argument", None)
    option = argument.lowered.name_or_flags[-1] if argument else ""
    if isinstance(event, events.InvalidChoice):
        return str(unknown(option.removeprefix("--"), event.value, [c for c in event.choices if c != "None"]))
    if isinstance(event, events.BadValue):
        return f"{option} has no value: give one"
    if isinstance(event, events.InstantiationFailure):
        expected = next((name for kind, name in NUMBERS.items() if argument and _is(argument.field.type, kind)), None)
        return f"{option} is {_value(option, words)!r}: expected {expected}" if expected else event.message
    return "the options do not fit together"


def _value(option: str, words: Sequence[str]) -> str:
    """The word that was given for an option, `--steps x` or `--steps=x`."""
    after = [words[row + 1] for row, word in enumerate(words[:-1]) if word.replace("_", "-") == option]
    return [*after, *(word.partition("=")[2] for word in words if word.startswith(f"{option}="))][-1]


def _is(hint: Any, kind: type) -> bool:
    return hint is kind or any(_is(part, kind) for part in get_args(hint))


def _not_understood(words: Sequence[str], names: Sequence[str]) -> str:
    word = next((word for word in words if word.startswith("--")), words[0]).partition("=")[0]
    if not word.startswith("-"):
        return f"{word!r} stands where an option is expected, such as --out"
    return f"unknown option {word!r}{did_you_mean(nearest(word, names, n=1))}"

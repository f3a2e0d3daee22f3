"""Every numeric option of every command has a range, which is checked before any work and told by --help."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import get_args, get_type_hints

import pytest
import tyro

from circuits.attribution.node_effects import METHOD_NAMES
from circuits.cli import main as cli
from circuits.options import METHODS, DiscoverOptions
from sae._options import ranges
from sae.architectures import ARCHITECTURES
from sae.errors import UserError
from sae.training.config import ARCHITECTURE_NAMES, TrainConfig

COMMANDS = {name: cli.command_class(name) for name in cli.COMMANDS}


def numeric(options):
    """(name, its range or None) of the numbers among a command's options, those of nested option classes too."""
    hints = get_type_hints(options, include_extras=True)
    for name in (entry.name for entry in fields(options)):
        parts = (hints[name], *get_args(hints[name]))
        inner = next((part for part in parts if isinstance(part, type) and is_dataclass(part)), None)
        if inner is not None:
            yield from numeric(inner)
        elif _is_number(hints[name]) and tyro.conf.Suppress not in parts:
            yield name, ranges(options).get(name)


def _is_number(hint) -> bool:
    return hint in (int, float) or any(_is_number(part) for part in get_args(hint))


FIXED = {("sweep", "features"), ("sweep", "k"), ("sweep", "seed")}
"""Not options: the grid of a sweep says them."""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_number_has_a_range(name):
    without = [option for option, allowed in numeric(COMMANDS[name]) if allowed is None and (name, option) not in FIXED]
    assert not without


@pytest.mark.parametrize(
    "words",
    [
        ("train", "--aux-alpha", "nan"),
        ("train", "--learning-rate", "1e308"),
        ("train", "--bandwidth", "inf"),
        ("train", "--sparsity", "-1"),
        ("train", "--seed", "-1"),
        ("train", "--features", "1" + "0" * 23),
        ("finetune", "--reconstruction", "inf"),
        ("finetune", "--tokens", "1" + "0" * 23),
        ("sweep", "--eval-tokens", "0"),
        ("cache", "--stored-dtype", "int8"),
        ("match", "--threshold", "inf"),
        ("discover", "--memory", "nan"),
        ("discover", "--memory", "1e308"),
        ("discover", "--sae-memory", "nan"),
        ("discover", "--steps", "100000"),
        ("discover", "--node-threshold", "inf"),
        ("faithfulness", "--batch-size", "0"),
        ("faithfulness", "--random", "1000000"),
        ("faithfulness", "--edge-sizes", "x"),
        ("ablate", "--random", "1000000"),
        ("ablate", "--new-tokens", "0"),
        ("steer", "--value", "1e40"),
        ("mask", "--learning-rate", "inf"),
        ("mask", "--temperature", "inf"),
        ("probe", "--seed", "-1"),
        ("probe", "--penalty", "nan"),
        ("compare-methods", "--memory", "-1"),
        ("compare-methods", "--residual", "nan"),
        ("compare-methods", "--steps", "1" + "0" * 23),
    ],
)
def test_numbers_are_refused_before_any_work(sfc, words, tmp_path):
    command, option, value = words
    missing = {"circuit": tmp_path / "none", "model": tmp_path / "none", "saes": "none", "text": "none",
               "prompts": "none", "site": "resid_0", "out": tmp_path / "out", "top": 1, "value": 1.0}  # fmt: skip
    known = {entry.name for entry in fields(COMMANDS[command])} - {option.removeprefix("--")}
    given = [word for name, what in missing.items() if name in known for word in (f"--{name}", what)]
    result = sfc(command, *given, option, value)
    said = " ".join(result.err.split())
    assert result.status == 2 and "Traceback" not in said and option.removeprefix("--").split("-")[0] in said
    assert not (tmp_path / "out").exists()


def test_help_tells_ranges(sfc):
    said = " ".join(sfc("discover", "--help").out.split())
    assert "(1 to 1000; default: 10)" in said.replace("│ │ ", "").replace("│", "")


def test_ranges_hold_in_python():
    for make in (lambda: DiscoverOptions(memory=float("nan")), lambda: TrainConfig(learning_rate=float("inf"))):
        with pytest.raises(UserError, match="it must be above 0"):
            make()


def test_every_name_has_its_implementation():
    assert tuple(ARCHITECTURES) == ARCHITECTURE_NAMES
    assert tuple(METHOD_NAMES) == METHODS

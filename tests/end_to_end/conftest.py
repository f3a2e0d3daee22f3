"""A tiny model, text and prompts on disk, and the command line as a function."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from tyro._parsers import ParserSpecification

from circuits.cli.main import main
from graphs.explorer import _data
from sae.model import huggingface
from sae.model.checks import check_model
from tests.conftest import tiny_hf, word_tokenizer
from tests.forked import Result, read_once

CHECKED: set[tuple[object, ...]] = set()
LOADED: dict[tuple[object, ...], Any] = {}
SAVEFIG = Figure.savefig
FROM_TYPE = ParserSpecification.from_callable_or_type


def check_once(model):
    """Check the sites of a model when it is loaded for the first time, not by every command again."""
    key = model.fingerprint, str(model.site_paths), model.dtype, str(model.device)
    if key not in CHECKED:
        check_model(model)
    CHECKED.add(key)


def load_once(load: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of what was loaded from the same files before: to load takes transformers five times longer."""

    def loaded(name: str, *more: Any, **options: Any) -> Any:
        files = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(Path(name).rglob("*"))]
        key = load, tuple(files), more, tuple(options.items())
        if not files or key not in LOADED:
            result = load(name, *more, **options)
            if not files:
                return result
            LOADED[key] = result
        return deepcopy(LOADED[key])

    return loaded


def draw_empty(figure: Figure, file: Any, **options: Any) -> None:
    """An empty picture of the same format: that each figure can be drawn is tested beside the code that makes it."""
    SAVEFIG(Figure((1, 1)), file, **options)


@pytest.fixture
def small_pages(monkeypatch):
    """Pictures are empty, and pages hold a layout of the eight strongest nodes and one of all."""
    monkeypatch.setattr(Figure, "savefig", draw_empty)
    monkeypatch.setattr(_data, "GROWTH", 100.0)


@pytest.fixture
def sfc(capsys, monkeypatch, small_pages):
    """sfc("train", "--model", ...) -> exit status and what was printed.

    What one process does for the first command is not done again: a model is loaded and checked once, options are found
    out once.
    """
    monkeypatch.setattr(ParserSpecification, "from_callable_or_type", read_once(FROM_TYPE))
    monkeypatch.setattr("sae.model.load.check_model", check_once)
    for name in ("pretrained_model", "pretrained_tokenizer"):
        monkeypatch.setattr(huggingface, name, load_once(getattr(huggingface, name)))

    def run(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(int(stop.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_hf("gpt_neox").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    nouns, verbs = ["man", "men", "boy", "boys", "king", "kings", "dog", "dogs"], ["runs", "run", "sees", "see"]
    lines = [f"the {a} near the {b} {verb} the old {c}" for a, b, verb, c in product(nouns, nouns, verbs, nouns)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "near.jsonl"
    rows = []
    for one, many in (("man", "men"), ("boy", "boys"), ("king", "kings"), ("dog", "dogs")):
        for clean, patch, right, wrong in ((one, many, " runs", " run"), (many, one, " run", " runs")):
            rows.append(
                {
                    "clean_prefix": f"the {clean} near the girl",
                    "patch_prefix": f"the {patch} near the girl",
                    "clean_answer": right,
                    "patch_answer": wrong,
                    "case": "singular" if clean == one else "plural",
                }
            )
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, model_folder, text_file, prompts_file) -> Path:
    """A run with autoencoders and a circuit, made by the command line."""
    run = tmp_path_factory.mktemp("runs") / "near"
    common = ["--model", str(model_folder), "--out", str(run), "--json"]
    small = ["--features", "48", "--k", "6", "--tokens", "6000", "--context-length", "16"]
    for arguments in (
        ["train", *common, "--text", str(text_file), *small],
        [
            "discover",
            *common,
            "--saes",
            str(run),
            "--prompts",
            str(prompts_file),
            "--nodes",
            "30",
            "--edge-nodes",
            "60",
        ],
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert not stop.value.code
    return run

"""A tiny model, text and prompts on disk, and the command line as a function."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from circuits.cli.main import main
from sae.model.checks import check_model
from tests.conftest import tiny_hf, word_tokenizer
from tests.forked import Result

CHECKED = set()


@pytest.fixture
def sfc(capsys, monkeypatch):
    """sfc("train", "--model", ...) -> exit status and what was printed.

    Sites of a model are checked when it is loaded for the first time, not by every command again.
    """

    def check_once(model):
        key = model.fingerprint, str(model.site_paths), model.dtype, str(model.device)
        if key not in CHECKED:
            check_model(model)
        CHECKED.add(key)

    monkeypatch.setattr("sae.model.load.check_model", check_once)

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
    small = ["--features", "48", "--k", "6", "--tokens", "20000", "--context-length", "16"]
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

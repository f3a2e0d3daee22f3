"""The leaderboard's row on a tiny model, from files in the layouts of the benchmark's own data sets."""

from __future__ import annotations

import json

import pytest

from tests.benchmarks.bench_mib import main
from tests.conftest import tiny_hf, word_tokenizer

NAMES = [("man", "king"), ("king", "boy"), ("boy", "dog")]


def ioi(a, b):
    """Who is given something: the name that does not come again."""
    prompt = {"prompt": f"the {a} and the {b} runs the {b} sees the", "metadata": {"subject": b, "indirect_object": a}}
    flipped = {"prompt": f"the {a} and the {b} runs the {a} sees the"}
    return {**prompt, "s2_io_flip_counterfactual": flipped, "template": "", "abc_counterfactual": None}


def mcqa(a, b):
    prompt = {"prompt": f"the {a} or the {b} is ", "choices": {"label": [a, b], "text": ["x", "y"]}, "answerKey": 0}
    other = {"prompt": f"the {b} or the {a} is ", "choices": {"label": [b, a], "text": ["x", "y"]}, "answerKey": 0}
    return {**prompt, "symbol_counterfactual": other}


def arithmetic(a, b):
    other = {"prompt": f"the {b} and the {a} are ", "label": b}
    return {"prompt": f"the {a} and the {b} are ", "label": a, "operator": "+", "random_counterfactual": other}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mib")
    tiny_hf("gpt2").save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    for task, row in (("ioi", ioi), ("mcqa", mcqa), ("arithmetic-addition", arithmetic)):
        (folder / task).mkdir()
        for split in ("train", "test"):
            lines = [json.dumps(row(a, b)) for a, b in NAMES]
            (folder / task / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.slow
def test_the_row_from_one_command(places, tmp_path, capsys):
    out, model = tmp_path / "submission", places / "model"
    chosen = ["--tasks", "ioi", "mcqa", "arithmetic-addition", "arc-easy", "--models", "gpt2", "llama3"]
    main([
        *chosen, "--data", str(places), "--out", str(out), "--method", "attrib", "--quiet", "--place",
        f"gpt2={model}", f"llama3={model}",
    ])  # fmt: skip
    said = capsys.readouterr().out
    columns = ["ioi_gpt2", "ioi_llama3", "mcqa_llama3", "arithmetic-addition_llama3"]
    row = json.loads((out / "row.json").read_text())["columns"]
    assert list(row) == columns and "arc-easy_llama3: left out: no prompt file" in said
    assert {path.name for path in out.iterdir() if path.is_dir()} == {*columns}
    for name in columns:
        assert len(list((out / name).glob("edges_*.json"))) == 9
        numbers = row[name]
        assert numbers["train"] == numbers["test"] == len(NAMES) and len(numbers["by_effect"]) == 10
        assert f"{numbers['cpr']:.2f}" in said and f"{numbers['cmd']:.2f}" in said
    assert row["ioi_gpt2"]["effects"].keys() == row["ioi_llama3"]["effects"].keys()

"""Commands killed with SIGKILL at random places; started again they end in the bits of whole ones, and leave nothing.

    KILLS=50 python -m pytest tests/end_to_end/kill_campaign.py -n 0 -s      # a line a job; not part of the suite

A place is a number of file system events of the process (`tests.kill_points`) or a time. A run is killed
up to three times before it is left to end. `mask` and the commands on a finished circuit are simply run again; `demo`
is run again with --overwrite.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from sae._files import is_temporary, read_tensors
from tests.kill_points import Kill, KillAfter

KILLS = int(os.environ.get("KILLS", "50"))
KILLED = (-signal.SIGKILL, -signal.SIGALRM)
UNFINISHED = ("checkpoints", "partial", "unfinished.json")
PICTURES = (".svg", ".png", ".html", ".pdf")
TIMED = ("comparison.txt",)
"""Tables in which times stand."""
VARYING = {"tokens_per_second", "seconds", "resume", "overwrite", "estimate", ".txt"}
"""What two runs of a command need not share; the last is the digest of a table, which is compared itself."""


@dataclass(frozen=True)
class Job:
    """A command, the commands before it, and how it is started again."""

    words: list[Any]
    """The command without --out or --circuit."""
    folder: str = "--out"
    """The option that names its folder."""
    again: tuple[str, ...] = ("--resume",)
    """What is added when it is started again, and at the first start too."""
    on_a_run: bool = False
    """Whether it works on a finished run, of which a copy is made."""


@pytest.fixture(scope="module")
def labelled_file(tmp_path_factory) -> Path:
    """Texts with two labels, for a probe and what it should not use."""
    nouns = {"singular": ["man", "boy", "king"], "plural": ["men", "boys", "kings"]}
    rows = [
        {"text": f"the {a} near the {b}", "intended": first, "spurious": second, "label": a}
        for first, second in product(nouns, repeat=2)
        for a, b in product(nouns[first], nouns[second])
    ]
    path = tmp_path_factory.mktemp("labelled") / "labelled.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def jobs(model_folder, text_file, prompts_file, run_folder, labelled_file) -> dict[str, Job]:
    model, text = ["--model", model_folder], ["--text", text_file]
    small = ["--features", 48, "--k", 6, "--tokens", 12_000, "--context-length", 16, "--sites", "resid"]
    discover = ["--prompts", prompts_file, "--nodes", 20, "--edge-nodes", 30, "--steps", 2, "--memory", 2e-4]
    sweep = ["--architectures", "topk,relu", "--features", 32, "--k", 4, "--tokens", 9000, "--context-length", 16]
    behaviours = ["--contexts", 40, "--tokens", 400, "--clusters", 3, "--circuits", 2, "--nodes", 10, "--surprise", 20]
    shift = ["--data", labelled_file, "--test", labelled_file, "--position", "last", "--site", "resid_1", "--sites",
             "resid", "--method", "attrib", "--random", 1]  # fmt: skip
    classes = ["--data", labelled_file, "--test", labelled_file, "--sizes", "1,2"]
    compare = [
        "--prompts",
        prompts_file,
        "--test",
        prompts_file,
        "--methods",
        "attrib,ig",
        "--sizes",
        "5",
        "--steps",
        2,
    ]
    return {
        "train": Job(["train", *model, *text, *small, "--checkpoints", 8]),
        "finetune": Job(["finetune", *model, *text, "--saes", run_folder, "--tokens", 6000, "--context-length", 16]),
        "sweep": Job(["sweep", *model, *text, "--eval-text", text_file, "--sites", "resid_0", *sweep]),
        "cache": Job(["cache", *model, *text, "--context-length", 16, "--tokens", 20_000, "--sites", "resid"]),
        "discover": Job(["discover", *model, "--saes", run_folder, *discover]),
        "mask": Job(["mask", "--steps", 2, "--smallest", 3, "--sizes", 5], "--circuit", (), on_a_run=True),
        "faithfulness": Job(["faithfulness", "--sizes", 5], "--circuit", (), on_a_run=True),
        "ablate": Job(["ablate", "--top", 2, "--random", 1], "--circuit", (), on_a_run=True),
        "behaviours": Job(["behaviours", *model, *text, "--saes", run_folder, *behaviours]),
        "features": Job(
            ["features", *text, "--tokens", 4000, "--top", 12, "--groups", "--automata"], "--circuit", on_a_run=True
        ),
        "shift": Job(["shift", *model, "--saes", run_folder, *shift], again=()),
        "tpp": Job(["tpp", *model, "--saes", run_folder, *classes], again=()),
        "validate": Job(
            ["validate", "--nodes", 5, "--removed", 3, "--verify", 3, "--resamples", 20], "--circuit", (), on_a_run=True
        ),
        "attention": Job(["attention"], "--circuit", (), on_a_run=True),
        "supernodes": Job(["supernodes"], "--circuit", (), on_a_run=True),
        "compare-methods": Job(["compare-methods", *model, "--saes", run_folder, *compare], again=("--overwrite",)),
        "demo": Job(["demo", "--tokens", 4000, "--features", 24], again=("--overwrite",)),
    }


def files_of(folder: Path) -> Iterator[tuple[str, Any]]:
    """(name, what must be equal) of every file below a folder."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            digest = hashlib.sha256()
            for key, tensor in sorted(read_tensors(path).items()):
                digest.update(key.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            yield name, digest.hexdigest()
        elif path.suffix in PICTURES:
            yield name, "a picture"
        elif path.name in TIMED:
            yield name, "a table with times"
        elif path.suffix in (".json", ".jsonl"):
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            yield name, [plain(json.loads(line.replace(str(folder), "OUT"))) for line in lines]
        else:
            yield name, path.read_text().replace(str(folder), "OUT")


def plain(value: Any) -> Any:
    """JSON without what varies."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in VARYING}
    return [plain(item) for item in value] if isinstance(value, list) else value


def different(one: Any, other: Any, at: str = "") -> list[str]:
    """Where two JSON values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = [(key, one.get(key), other.get(key)) for key in one.keys() | other.keys()]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(row, *pair) for row, pair in enumerate(zip(one, other, strict=True))]
    else:
        return [] if one == other else [f"{at}: {str(one)[:60]} is not {str(other)[:60]}"]
    return [line for key, a, b in pairs for line in different(a, b, f"{at}[{key}]")]


def leftovers(folder: Path) -> list[str]:
    return [str(p) for p in folder.rglob("*") if p.name.startswith(".") or is_temporary(p) or p.name in UNFINISHED]


def share(kills: int, jobs: Sequence[str]) -> dict[str, int]:
    """Kills of each job: as equal as they can be, the first ones more."""
    return {name: kills // len(jobs) + (number < kills % len(jobs)) for number, name in enumerate(jobs)}


NAMES = (
    "train", "discover", "mask", "demo", "finetune", "sweep", "cache", "faithfulness", "ablate", "behaviours",
    "features", "shift", "tpp", "validate", "attention", "supernodes", "compare-methods",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.timeout(3000)
def test_killed(name, jobs, run_folder, forked_sfc, tmp_path, capsys):
    job, wanted, chance = jobs[name], share(KILLS, NAMES)[name], random.Random(name)

    def start(folder: Path, *more: str, **options: Any):
        return forked_sfc(*job.words, job.folder, folder, "--json", *more, **options)

    def prepare(folder: Path) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        if job.on_a_run:
            shutil.copytree(run_folder, folder)
        return folder

    whole, out, killed = prepare(tmp_path / "whole"), tmp_path / "killed", 0
    began = time.monotonic()
    result = start(whole, *job.again)
    took = time.monotonic() - began
    assert result.status == 0, result.err
    expected = dict(files_of(whole))
    while killed < wanted:
        prepare(out)
        for _ in range(3):
            if chance.random() < 0.7:
                kill = Kill(path=str(tmp_path), count=chance.randint(1, 60))
            else:
                kill = KillAfter(chance.uniform(0, took))
            result = start(out, *job.again, before=kill)
            killed += result.status in KILLED
            assert result.status in (0, *KILLED), result.err
            if result.status == 0:
                break
        if result.status != 0:
            result = start(out, *job.again)
            assert result.status == 0, result.err
        assert not leftovers(out)
        assert different(dict(files_of(out)), expected) == []
    with capsys.disabled():
        print(f"\n{name:<14}{killed:>3} kills: equal bits, nothing left over")  # noqa: T201

"""A training that is killed with SIGKILL, wherever it is, resumes to the bits of one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from sae.autoencoder import load_saes
from sae.files import is_temporary

FORKING = """
import json, os, sys
import circuits.cli, torch
torch.set_num_threads(1)
circuits.cli._commands()
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)
        circuits.cli.main(json.loads(line))
    sys.stdout.write(f"{child}\\n")
    sys.stdout.flush()
    sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\\n")
    sys.stdout.flush()
"""
"""Imports once and gives each command a process of its own."""

Moment = Callable[[], bool]


class Processes:
    """Runs `sfc` in processes that can be killed."""

    def __init__(self) -> None:
        self.pipe = subprocess.Popen(
            [sys.executable, "-c", FORKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, bufsize=1,
        )  # fmt: skip

    def run(self, *words: object, kill_at: Moment | None = None) -> int:
        """The exit status; -9 where the moment came before the end."""
        assert self.pipe.stdin and self.pipe.stdout
        self.pipe.stdin.write(json.dumps([*map(str, words), "--json"]) + "\n")
        child = int(self.pipe.stdout.readline())
        while kill_at is not None and not kill_at() and Path(f"/proc/{child}/fd/0").exists():
            time.sleep(0.0002)
        if kill_at is not None:
            os.kill(child, signal.SIGKILL)
        return int(self.pipe.stdout.readline())


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    made = Processes()
    yield made
    made.pipe.communicate()


def appears(folder: Path, wanted: Callable[[Path], bool], *, wait: float = 0.0) -> Moment:
    """The moment when something new of the wanted kind is in a folder, or some time after."""
    before = set(folder.iterdir()) if folder.is_dir() else set()
    seen: list[float] = []

    def now() -> bool:
        if not seen and folder.is_dir() and any(wanted(path) for path in set(folder.iterdir()) - before):
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() - seen[0] >= wait

    return now


def is_checkpoint(path: Path) -> bool:
    return path.name.startswith("step_")


def reached(step: int, kind: Callable[[Path], bool], path: Path) -> bool:
    """Whether a path is of that kind, and of that step or a later one."""
    number = path.name.lstrip(".").removeprefix("step_").partition(".")[0]
    return kind(path) and number.isdigit() and int(number) >= step


def same_bits(one: Path, other: Path) -> bool:
    loaded = load_saes(one), load_saes(other)
    return loaded[0].keys() == loaded[1].keys() and all(
        torch.equal(tensor, loaded[1][site].get_buffer(name))
        for site, sae in loaded[0].items()
        for name, tensor in sae.named_buffers()
    )


def test_a_training_killed_anywhere_ends_in_the_same_bits(processes, model_folder, text_file, tmp_path):
    train = ["train", "--model", model_folder, "--text", text_file, "--features", 256, "--k", 4, "--tokens", 30_000]
    train += ["--sites", "resid", "--context-length", 16, "--checkpoints", 30, "--buffer-tokens", 9000]
    assert processes.run(*train, "--out", tmp_path / "whole") == 0

    killed, moments = tmp_path / "killed", random.Random(0)
    checkpoints = killed / "checkpoints"
    train += ["--out", killed, "--resume"]
    assert processes.run(*train, kill_at=appears(tmp_path, lambda path: path.name == "killed")) == -9
    caught = 0
    for kill in range(4):
        step = 11 * (kill + 1)  # a fill of the buffer is 17 of the 58 steps
        wanted = partial(reached, step, is_temporary if kill % 2 else is_checkpoint)
        moment = appears(checkpoints, wanted, wait=0 if kill % 2 else moments.uniform(0, 0.05))
        assert processes.run(*train, kill_at=moment) == -9
        caught += any(map(is_temporary, checkpoints.iterdir()))
        complete = [path for path in checkpoints.iterdir() if is_checkpoint(path)]
        assert 1 <= len(complete) <= 3  # the third is about to go
    assert processes.run(*train, kill_at=appears(killed / "saes" / "resid_0", is_temporary)) in (-9, 0)
    assert processes.run(*train) == 0
    assert caught, "no kill fell into the writing of a checkpoint"
    assert same_bits(tmp_path / "whole", killed)
    assert not [path for path in killed.rglob("*") if is_temporary(path)]
    logs = [(run / "saes" / "training.jsonl").read_text().splitlines() for run in (tmp_path / "whole", killed)]
    timeless = [[json.loads(line) | {"tokens_per_second": 0} for line in lines] for lines in logs]
    assert timeless[0] == timeless[1]

"""Trainings, caches and sweeps that are killed with SIGKILL, wherever they are, resume to the bits of whole ones."""

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

from sae.activation_cache import MANIFEST, CachedActivations
from sae.autoencoder import load_saes
from sae.errors import UserError
from sae.files import is_temporary
from sae.sweep_evaluation import UNFINISHED

FORKING = """
import json, os, sys
import time
from contextlib import contextmanager
import circuits.cli, sae.activation_cache, sae.files, torch
torch.set_num_threads(1)
atomic_write = sae.files.atomic_write
@contextmanager
def slowly(path):
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"half")
        time.sleep(0.01)
        yield temporary
sae.files.atomic_write = slowly
sae.activation_cache.write_cache.__kwdefaults__["shard_tokens"] = 2500
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
"""Imports once and gives each command a process of its own; files take a while to write, caches have short shards."""

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
    logs = [timeless((run / "saes" / "training.jsonl").read_bytes()) for run in (tmp_path / "whole", killed)]
    assert logs[0] == logs[1]


def written_to(name: str, path: Path) -> bool:
    """Whether a path is the temporary name of a file of that name."""
    return is_temporary(path) and path.name.startswith(f".{name}.")


def contents(folder: Path, *, but: str = "nothing") -> dict[str, bytes]:
    """All files by their place in the folder."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != but]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def timeless(log: bytes) -> list[dict[str, object]]:
    """The lines of a training log without how fast it was."""
    return [json.loads(line) | {"tokens_per_second": 0} for line in log.splitlines()]


def test_a_cache_killed_anywhere_ends_in_the_same_files(processes, model_folder, tmp_path):
    text, moments = tmp_path / "text.txt", random.Random(0)
    words = ["man", "men", "boy", "boys", "king", "kings", "dog", "dogs", "sees", "the", "old", "near"]
    text.write_text("\n".join(" ".join(moments.choices(words, k=14)) for _ in range(1500)))
    cache = ["cache", "--model", model_folder, "--text", text, "--context-length", 16, "--tokens", 60_000]
    assert processes.run(*cache, "--out", tmp_path / "whole") == 0
    assert len(list((tmp_path / "whole").glob("shard_*"))) > 5

    killed, caught = tmp_path / "killed", 0
    cache += ["--out", killed, "--resume"]
    for kill in range(5):
        kinds = [
            partial(written_to, f"shard_{kill:05d}"),
            lambda path, kill=kill: path.name == f"shard_{kill:05d}.safetensors",
            partial(written_to, "unfinished"),
        ]
        moment = appears(killed, kinds[kill % 3], wait=moments.uniform(0, 0.01) if kill % 3 == 1 else 0)
        assert processes.run(*cache, kill_at=moment) == -9
        caught += any(map(is_temporary, killed.iterdir()))
        with pytest.raises(UserError, match=r"not finished|no activation cache"):
            CachedActivations(killed)
    assert processes.run("train", "--cache", killed, "--out", tmp_path / "run", "--features", 16, "--k", 2) == 2
    assert caught, "no kill fell into the writing of a file"
    assert processes.run(*cache, kill_at=appears(killed, partial(written_to, "manifest"))) == -9
    assert not (killed / MANIFEST).exists()
    with pytest.raises(UserError, match="not finished"):
        CachedActivations(killed)
    assert processes.run(*cache, kill_at=appears(killed, lambda path: path.name == MANIFEST)) in (-9, 0)
    assert processes.run(*cache) == 0
    assert contents(killed) == contents(tmp_path / "whole")


def test_a_sweep_killed_anywhere_ends_in_the_same_bits(processes, model_folder, text_file, tmp_path):
    sweep = ["sweep", "--model", model_folder, "--text", text_file, "--eval-text", text_file, "--sites", "resid_0"]
    sweep += ["--architectures", "topk,relu", "--features", 128, "--k", 4, "--tokens", 10_000, "--context-length", 16]
    sweep += ["--eval-tokens", 3000, "--checkpoints", 8, "--log-steps", 5]
    assert processes.run(*sweep, "--out", tmp_path / "whole") == 0

    killed = tmp_path / "killed"
    checkpoints, saes = killed / "checkpoints", killed / "relu-128-k4-seed0" / "saes"
    sweep += ["--out", killed, "--resume"]
    moments: list[Callable[[], Moment]] = [
        lambda: appears(tmp_path, lambda path: path.name == "killed"),
        lambda: appears(checkpoints, is_checkpoint, wait=0.01),
        lambda: appears(checkpoints, is_temporary),
        lambda: appears(saes / "resid_0", is_temporary),
        lambda: appears(killed, lambda path: path.name == UNFINISHED, wait=0.02),
        lambda: appears(killed, partial(written_to, Path(UNFINISHED).stem)),
        lambda: appears(saes, partial(written_to, "evaluation")),
    ]
    statuses = [processes.run(*sweep, kill_at=moment()) for moment in moments]
    assert statuses == [-9] * len(moments)
    trained = {path: path.stat().st_mtime_ns for path in killed.rglob("sae.safetensors")}
    assert processes.run(*sweep) == 0
    assert {path: path.stat().st_mtime_ns for path in trained} == trained and len(trained) == 2
    found, expected = contents(killed, but=".svg"), contents(tmp_path / "whole", but=".svg")
    assert found.keys() == expected.keys()
    for name in found:
        if name.endswith("training.jsonl"):
            logs = [
                [json.loads(line) | {"tokens_per_second": 0} for line in x[name].splitlines()]
                for x in (found, expected)
            ]
            assert logs[0] == logs[1]
        else:
            assert found[name] == expected[name], name

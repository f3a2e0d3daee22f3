"""Trainings, caches and sweeps that are killed with SIGKILL, wherever they are, resume to the bits of whole ones."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

import sae._files
import sae.data.cache_writer
from sae._files import is_temporary
from sae.data.activations import ModelActivations
from sae.data.cache import MANIFEST, CachedActivations
from sae.errors import UserError
from sae.evaluation.evaluate import Evaluator
from sae.evaluation.sweep import UNFINISHED
from sae.saes import load_saes
from sae.training.trainer import Trainer
from tests.kill_points import Kill

TEMPORARY = r"\.[0-9a-f]{8}\.sfc\.tmp"


def write_by_halves(kill: Callable[[], None] | None) -> None:
    """Half of every file is written first; caches have short shards, and pictures are empty."""
    Figure.savefig = lambda figure, path, **_: path.touch()
    atomic_write = sae._files.atomic_write

    @contextmanager
    def by_halves(path: Path) -> Iterator[Path]:
        with atomic_write(path) as temporary:
            temporary.write_bytes(b"half")
            yield temporary

    for module in list(sys.modules.values()):
        if getattr(module, "atomic_write", None) is atomic_write:
            module.atomic_write = by_halves
    sae.data.cache_writer.write_cache.__kwdefaults__["shard_tokens"] = 1200
    if kill is not None:
        kill()


@dataclass(frozen=True)
class KillAtCall:
    """Kills the process when a method is called for the n-th time."""

    owner: type
    method: str
    count: int

    def __call__(self) -> None:
        original, left = getattr(self.owner, self.method), [self.count]

        def counted(*arguments: object, **options: object) -> object:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(self.owner, self.method, counted)


@pytest.fixture
def run(forked_sfc) -> Callable[..., int]:
    """The exit status of a command; -9 where it was killed."""
    return lambda *words, kill=None: forked_sfc(*words, "--json", before=partial(write_by_halves, kill)).status


def is_checkpoint(path: Path) -> bool:
    return path.name.startswith("step_")


def temporary(folder: Path) -> list[Path]:
    """What was being written in a folder and in those below it."""
    return [path for path in folder.rglob("*") if is_temporary(path)]


def same_bits(one: Path, other: Path) -> bool:
    loaded = load_saes(one), load_saes(other)
    return loaded[0].keys() == loaded[1].keys() and all(
        torch.equal(tensor, loaded[1][site].get_buffer(name))
        for site, sae in loaded[0].items()
        for name, tensor in sae.named_buffers()
    )


@pytest.mark.slow
def test_a_training_killed_anywhere_ends_in_the_same_bits(run, model_folder, text_file, tmp_path):
    """Between steps, in every part of writing a checkpoint, and at the end; a checkpoint is due every second step."""
    train = ["train", "--model", model_folder, "--text", text_file, "--features", 64, "--k", 4, "--tokens", 14_000]
    train += ["--sites", "resid", "--context-length", 16, "--checkpoints", 14, "--buffer-tokens", 9000]
    assert run(*train, "--out", tmp_path / "whole") == 0

    killed = tmp_path / "killed"
    checkpoints = killed / "checkpoints"
    train += ["--out", killed, "--resume"]
    assert run(*train, kill=Kill(path="/killed/")) == -9
    kills = {
        KillAtCall(Trainer, "_one_step", 6): 0,
        Kill("os.rename", rf"/\.step_00000008{TEMPORARY}/\.state{TEMPORARY}\.safetensors$"): 1,  # written by half
        Kill("os.rename", r"/step_00000012$"): 1,  # whole but for its name
        KillAtCall(Trainer, "_one_step", 9): 0,  # in the second fill of the buffer
        Kill("shutil.rmtree", rf"/\.step_00000018{TEMPORARY}"): 1,
    }
    for kill, unfinished in kills.items():
        assert run(*train, kill=kill) == -9, kill
        assert len([path for path in checkpoints.iterdir() if is_temporary(path)]) == unfinished, kill
        assert 1 <= len([path for path in checkpoints.iterdir() if is_checkpoint(path)]) <= 3, kill
    assert run(*train, kill=Kill("os.rename", r"/saes/resid_0/sae\.safetensors$")) == -9
    assert run(*train) == 0
    assert same_bits(tmp_path / "whole", killed)
    assert not temporary(killed)
    logs = [timeless((run / "saes" / "training.jsonl").read_bytes()) for run in (tmp_path / "whole", killed)]
    assert logs[0] == logs[1]


def contents(folder: Path, *, but: str = "nothing") -> dict[str, bytes]:
    """All files by their place in the folder."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != but]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def timeless(log: bytes) -> list[dict[str, object]]:
    """The lines of a training log without how fast it was."""
    return [json.loads(line) | {"tokens_per_second": 0} for line in log.splitlines()]


@pytest.mark.slow
def test_a_cache_killed_anywhere_ends_in_the_same_files(run, model_folder, tmp_path):
    """In every part of writing a shard and of noting it, and at the end."""
    text, chance = tmp_path / "text.txt", random.Random(0)
    words = ["man", "men", "boy", "boys", "king", "kings", "dog", "dogs", "sees", "the", "old", "near"]
    text.write_text("\n".join(" ".join(chance.choices(words, k=14)) for _ in range(700)))
    cache = ["cache", "--model", model_folder, "--text", text, "--context-length", 16, "--tokens", 60_000]
    assert run(*cache, "--out", tmp_path / "whole") == 0
    assert len(list((tmp_path / "whole").glob("shard_*"))) > 5

    killed = tmp_path / "killed"
    cache += ["--out", killed, "--resume"]
    kills = [
        Kill("os.rename", rf"/\.shard_00000{TEMPORARY}\.safetensors$"),  # written by half
        Kill("os.rename", r"/shard_00000\.safetensors$"),  # whole but for its name
        KillAtCall(ModelActivations, "fill", 2),  # between two shards
        Kill("open", rf"/\.unfinished{TEMPORARY}", 3),  # noted by half
        Kill("os.rename", r"/unfinished\.json$", 2),
    ]
    for kill in kills:
        assert run(*cache, kill=kill) == -9, kill
        assert bool(temporary(killed)) == isinstance(kill, Kill), kill
        with pytest.raises(UserError, match=r"not finished|no activation cache"):
            CachedActivations(killed)
    assert run("train", "--cache", killed, "--out", tmp_path / "run", "--features", 16, "--k", 2) == 2
    assert run(*cache, kill=Kill("os.rename", rf"/{MANIFEST}$")) == -9
    assert not (killed / MANIFEST).exists()
    with pytest.raises(UserError, match="not finished"):
        CachedActivations(killed)
    assert run(*cache, kill=Kill("os.remove", r"/unfinished\.json$")) == -9
    assert (killed / MANIFEST).exists()
    assert run(*cache) == 0
    assert contents(killed) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_sweep_killed_anywhere_ends_in_the_same_bits(run, model_folder, text_file, tmp_path):
    """In training, in writing dictionaries, and in measuring them."""
    sweep = ["sweep", "--model", model_folder, "--text", text_file, "--eval-text", text_file, "--sites", "resid_0"]
    sweep += ["--architectures", "topk,relu", "--features", 64, "--k", 4, "--tokens", 4000, "--context-length", 16]
    sweep += ["--eval-tokens", 800, "--checkpoints", 4, "--log-steps", 3]
    assert run(*sweep, "--out", tmp_path / "whole") == 0

    killed = tmp_path / "killed"
    sweep += ["--out", killed, "--resume"]
    kills = [
        Kill(path="/killed/"),
        KillAtCall(Trainer, "_one_step", 4),
        Kill("os.rename", rf"/relu-64-k4-seed0/saes/resid_0/\.sae{TEMPORARY}\.safetensors$"),
        KillAtCall(Evaluator, "update", 2),
        Kill("os.rename", rf"/{UNFINISHED}$"),
        Kill("os.rename", r"/relu-64-k4-seed0/saes/evaluation\.json$"),
    ]
    for kill in kills:
        assert run(*sweep, kill=kill) == -9, kill
    trained = {path: path.stat().st_mtime_ns for path in killed.rglob("sae.safetensors")}
    assert run(*sweep) == 0
    assert {path: path.stat().st_mtime_ns for path in trained} == trained and len(trained) == 2
    found, expected = contents(killed, but=".svg"), contents(tmp_path / "whole", but=".svg")
    assert found.keys() == expected.keys()
    for name in found:
        if name.endswith("training.jsonl"):
            assert timeless(found[name]) == timeless(expected[name])
        else:
            assert found[name] == expected[name], name

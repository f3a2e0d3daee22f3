"""Trainings, caches and sweeps that are killed with SIGKILL, wherever they are, resume to the bits of whole ones."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

import sae._files
import sae.data.cache_writer
from sae._files import is_temporary
from sae.data.cache import MANIFEST, CachedActivations
from sae.errors import UserError
from sae.evaluation.sweep import UNFINISHED
from sae.saes import load_saes
from tests.forked import Moment


def write_slowly() -> None:
    """Files take a while to write, half of them first; caches have short shards."""
    atomic_write = sae._files.atomic_write

    @contextmanager
    def slowly(path: Path) -> Iterator[Path]:
        with atomic_write(path) as temporary:
            temporary.write_bytes(b"half")
            time.sleep(0.01)
            yield temporary

    for module in list(sys.modules.values()):
        if getattr(module, "atomic_write", None) is atomic_write:
            module.atomic_write = slowly
    sae.data.cache_writer.write_cache.__kwdefaults__["shard_tokens"] = 2500


@pytest.fixture
def run(forked_sfc) -> Callable[..., int]:
    """The exit status of a command; -9 where it was killed before its end."""
    return lambda *words, **options: forked_sfc(*words, "--json", before=write_slowly, **options).status


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


def test_a_training_killed_anywhere_ends_in_the_same_bits(run, model_folder, text_file, tmp_path):
    train = ["train", "--model", model_folder, "--text", text_file, "--features", 256, "--k", 4, "--tokens", 30_000]
    train += ["--sites", "resid", "--context-length", 16, "--checkpoints", 30, "--buffer-tokens", 9000]
    assert run(*train, "--out", tmp_path / "whole") == 0

    killed, moments = tmp_path / "killed", random.Random(0)
    checkpoints = killed / "checkpoints"
    train += ["--out", killed, "--resume"]
    assert run(*train, kill_at=appears(tmp_path, lambda path: path.name == "killed")) == -9
    caught = 0
    for kill in range(4):
        step = 11 * (kill + 1)  # a fill of the buffer is 17 of the 58 steps
        wanted = partial(reached, step, is_temporary if kill % 2 else is_checkpoint)
        moment = appears(checkpoints, wanted, wait=0 if kill % 2 else moments.uniform(0, 0.05))
        assert run(*train, kill_at=moment) == -9
        caught += any(map(is_temporary, checkpoints.iterdir()))
        complete = [path for path in checkpoints.iterdir() if is_checkpoint(path)]
        assert 1 <= len(complete) <= 3  # the third is about to go
    assert run(*train, kill_at=appears(killed / "saes" / "resid_0", is_temporary)) in (-9, 0)
    assert run(*train) == 0
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


def test_a_cache_killed_anywhere_ends_in_the_same_files(run, model_folder, tmp_path):
    text, moments = tmp_path / "text.txt", random.Random(0)
    words = ["man", "men", "boy", "boys", "king", "kings", "dog", "dogs", "sees", "the", "old", "near"]
    text.write_text("\n".join(" ".join(moments.choices(words, k=14)) for _ in range(1500)))
    cache = ["cache", "--model", model_folder, "--text", text, "--context-length", 16, "--tokens", 60_000]
    assert run(*cache, "--out", tmp_path / "whole") == 0
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
        assert run(*cache, kill_at=moment) == -9
        caught += any(map(is_temporary, killed.iterdir()))
        with pytest.raises(UserError, match=r"not finished|no activation cache"):
            CachedActivations(killed)
    assert run("train", "--cache", killed, "--out", tmp_path / "run", "--features", 16, "--k", 2) == 2
    assert caught, "no kill fell into the writing of a file"
    assert run(*cache, kill_at=appears(killed, partial(written_to, "manifest"))) == -9
    assert not (killed / MANIFEST).exists()
    with pytest.raises(UserError, match="not finished"):
        CachedActivations(killed)
    assert run(*cache, kill_at=appears(killed, lambda path: path.name == MANIFEST)) in (-9, 0)
    assert run(*cache) == 0
    assert contents(killed) == contents(tmp_path / "whole")


def test_a_sweep_killed_anywhere_ends_in_the_same_bits(run, model_folder, text_file, tmp_path):
    sweep = ["sweep", "--model", model_folder, "--text", text_file, "--eval-text", text_file, "--sites", "resid_0"]
    sweep += ["--architectures", "topk,relu", "--features", 128, "--k", 4, "--tokens", 10_000, "--context-length", 16]
    sweep += ["--eval-tokens", 3000, "--checkpoints", 8, "--log-steps", 5]
    assert run(*sweep, "--out", tmp_path / "whole") == 0

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
    statuses = [run(*sweep, kill_at=moment()) for moment in moments]
    assert statuses == [-9] * len(moments)
    trained = {path: path.stat().st_mtime_ns for path in killed.rglob("sae.safetensors")}
    assert run(*sweep) == 0
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

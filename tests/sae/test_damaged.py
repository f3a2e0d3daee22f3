"""Runs whose files were damaged or that were asked to stop go on to the bits of whole ones, or say what is damaged."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from sae._files import check_digest, write_tensors
from sae.data.cache_writer import write_cache
from sae.errors import UserError
from sae.training.run_folder import read_log
from sae.training.trainer import Trainer
from tests.sae.training.test_trainer import run, small, stories


def flip(path: Path, byte: int = -3) -> None:
    """Changes one bit of a file."""
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


def same(saes, others) -> bool:
    """Whether two runs gave the same bits."""
    return saes.keys() == others.keys() and all(
        torch.equal(tensor, others[site].get_buffer(name))
        for site, sae in saes.items()
        for name, tensor in sae.named_buffers()
    )


def stop_at(monkeypatch, step: int, number: int | None = None) -> None:
    """Ctrl-C within a step, or a signal that arrives in it."""
    one_step = Trainer._one_step

    def stopped(self):
        if self.step == step:
            if number is None:
                raise KeyboardInterrupt
            os.kill(os.getpid(), number)
        one_step(self)

    monkeypatch.setattr(Trainer, "_one_step", stopped)


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    """A run that nothing happened to, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return run(tiny_model, folder, small(checkpoints=8), "mlp_1"), folder


@pytest.mark.slow
@pytest.mark.parametrize("damaged", ["state.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(tiny_model, tmp_path, monkeypatch, caplog, whole, damaged):
    config = small(checkpoints=8)
    stop_at(monkeypatch, 9)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, tmp_path / "run", config, "mlp_1")
    monkeypatch.undo()
    flip(tmp_path / "run" / "checkpoints" / "step_00000009" / damaged, -20)
    assert same(run(tiny_model, tmp_path / "run", config, "mlp_1", resume=True), whole[0])
    assert "damaged" in caplog.text and not (tmp_path / "run" / "checkpoints").exists()
    logs = [read_log(folder / "saes" / "training.jsonl") for folder in (tmp_path / "run", whole[1])]
    assert [{**line, "tokens_per_second": 0} for line in logs[0]] == [
        {**line, "tokens_per_second": 0} for line in logs[1]
    ]


def test_all_checkpoints_damaged(tiny_model, tmp_path, monkeypatch):
    stop_at(monkeypatch, 9)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, tmp_path, small(checkpoints=8))
    for path in (tmp_path / "checkpoints").glob("*/state.json"):
        path.write_text("{}")
    with pytest.raises(UserError, match=r"key 'schema_version' is missing.*--overwrite"):
        run(tiny_model, tmp_path, small(checkpoints=8), resume=True)


@pytest.mark.slow
def test_a_signal_saves_a_checkpoint_after_the_step(tiny_model, tmp_path, monkeypatch, whole):
    config = small(checkpoints=0)
    stop_at(monkeypatch, 7, signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, tmp_path / "run", config, "mlp_1")
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000008"]
    assert same(run(tiny_model, tmp_path / "run", config, "mlp_1", resume=True), whole[0])


@pytest.mark.slow
def test_a_damaged_log_loses_no_training(tiny_model, tmp_path, monkeypatch, caplog):
    stop_at(monkeypatch, 9)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, tmp_path, small(checkpoints=8), "mlp_1")
    monkeypatch.undo()
    (tmp_path / "saes" / "training.jsonl").write_bytes(b"\xff{\n")
    assert run(tiny_model, tmp_path, small(checkpoints=8), "mlp_1", resume=True)
    assert read_log(tmp_path / "saes" / "training.jsonl") and "damaged line" in caplog.text


def test_shards_that_are_there_are_looked_at(tiny_model, tmp_path):
    options = {"sites": "resid_0", "tokens": 900, "shard_tokens": 350, "progress": False}
    write_cache(tiny_model, stories(), out=tmp_path, **options)
    flip(tmp_path / "shard_00001.safetensors")
    with pytest.raises(UserError, match=r"shard_00001\.safetensors is damaged"):
        write_cache(tiny_model, stories(), out=tmp_path, resume=True, **options)


def test_a_checksum_sees_every_bit(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"x": torch.ones(3), "y": torch.tensor(True)}, checksum=True)
    check_digest(path)
    before = path.read_bytes()
    for byte in range(len(before)):
        flip(path, byte)
        with pytest.raises(UserError):
            check_digest(path)
        path.write_bytes(before)

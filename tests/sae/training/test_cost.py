"""The estimate of a training against the training itself; times are not compared."""

import pytest
from safetensors.torch import load_file

from sae.errors import UserError
from sae.training import checkpoint
from sae.training.config import TrainConfig
from sae.training.cost import estimate_training
from sae.training.train import train_saes
from sae.training.trainer import Trainer
from tests.sae.training.test_trainer import stories


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "identity"])
def test_sizes_are_those_of_the_training(tiny_model, tmp_path, monkeypatch, architecture):
    config = TrainConfig(
        architecture=architecture, features=48, k=4, tokens=3000, batch_size=128, buffer_tokens=2048, checkpoints=2
    )
    monkeypatch.chdir(tmp_path)
    options = {"sites": "resid_0,mlp_1", "config": config}
    estimate = estimate_training(tiny_model, stories(), **options)
    assert not list(tmp_path.iterdir())
    buffers, checkpoints = [], []
    fill, save = Trainer._fill, checkpoint.save

    def noted_fill(trainer):
        buffers.append(sum(x.numel() * x.element_size() for x in trainer.buffer.values()))
        fill(trainer)

    def noted_save(folder, state, processes):
        checkpoints.append(sum(t.numel() * t.element_size() for t in state.tensors.values()))
        return save(folder, state, processes)

    monkeypatch.setattr(Trainer, "_fill", noted_fill)
    monkeypatch.setattr(checkpoint, "save", noted_save)
    saes = train_saes(tiny_model, stories(), out=tmp_path / "run", progress=False, **options)
    assert estimate.memory["buffer"] == buffers[0]
    assert estimate.n_sites == len(saes) and estimate.steps == config.steps
    n_written = sum(
        t.numel() * t.element_size()
        for file in (tmp_path / "run" / "saes").glob("*/sae.safetensors")
        for t in load_file(file).values()
    )
    assert estimate.memory["model"] == 4 * sum(p.numel() for p in tiny_model.hf.parameters())
    if architecture == "identity":  # nothing is trained
        assert estimate.disk == {"autoencoders": 0, "checkpoints": 0} and estimate.seconds["autoencoders"] == 0
        return
    assert estimate.disk["autoencoders"] == pytest.approx(n_written, rel=0.1)
    n_weights = estimate.memory["weights"]
    assert n_weights == estimate.disk["autoencoders"]
    assert estimate.memory["Adam's moments"] == pytest.approx(2 * n_weights, rel=0.2)  # and a few counters
    assert estimate.disk["checkpoints"] == 3 * checkpoints[0]
    gradients = estimate.disk["autoencoders"]
    assert gradients <= estimate.memory["gradients and intermediates"] < 40 * gradients
    assert "tokens/s" in estimate.text() and estimate.to_dict()["total_seconds"] > 0


def test_time_is_that_of_all_tokens_and_all_steps(tiny_model, monkeypatch):
    """With a clock that goes on by a second whenever it is read."""
    ticks = iter(range(10**6))
    monkeypatch.setattr("sae.training.cost.seconds_of", lambda device: float(next(ticks)))
    config = TrainConfig(features=48, k=4, tokens=30_000, batch_size=128)
    estimate = estimate_training(tiny_model, stories(), sites="resid_0,mlp_1", config=config)
    assert estimate.seconds["autoencoders"] == config.steps == 234
    n_read = 120 * 12  # the whole text, in one fill of the buffer
    assert estimate.seconds["model"] == pytest.approx(30_000 / n_read)


def test_what_cannot_be_trained_is_told(tiny_model):
    with pytest.raises(UserError, match="site"):
        estimate_training(tiny_model, stories(), sites="resid_77")

"""One autoencoder in training: how it starts, what is held, what is rescaled and resampled; and its checkpoints."""

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sae
from sae.data.activations import StreamState
from sae.model.sites import Site
from sae.training import checkpoint
from sae.training.checkpoint import Checkpoint
from sae.training.config import TrainConfig
from sae.training.dead_features import resample
from sae.training.loop import BETAS
from sae.training.trainer import Trainer
from sae.training.training_sae import TrainingSAE
from tests.sae.training.test_trainer import optimise, training_sae


def test_checkpoints_are_evenly_spread_and_the_last_is_of_the_last_step():
    for count, steps in ((0, set()), (1, {23}), (4, {6, 12, 18, 23})):
        config = TrainConfig(features=48, tokens=23 * 512, batch_size=512, checkpoints=count)
        run = SimpleNamespace(total=config.steps, n_checkpoints=config.checkpoints)
        due = [Trainer._checkpoints_due(run, step) for step in range(config.steps + 1)]
        assert {step for step in range(1, 24) if due[step] > due[step - 1]} == steps


def test_a_topk_step_goes_through_five_files():
    """A reader of a step opens no more, dead features and their AuxK loss included."""
    one, x, files = training_sae(dead_tokens=10), torch.randn(500, 16), set()
    optimise(one, x, 2)
    one.state["silent"][:5] = 100
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, arg: files.add(Path(frame.f_code.co_filename)))
    try:
        with torch.autograd.set_multithreading_enabled(False):
            one.step(x, 2)
            one.constrain()
    finally:
        sys.setprofile(before)
    root = Path(sae.__file__).parent
    assert {str(path.relative_to(root)) for path in files if path.is_relative_to(root)} == {
        "training/training_sae.py", "architectures/base.py", "architectures/topk.py", "sparse/encoder_pass.py",
        "sparse/activations.py",
    }  # fmt: skip


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    for value in (1.0, 2.0):
        state = Checkpoint(7, {}, StreamState(), 0, {"w": torch.tensor(value)})
        checkpoint.save(tmp_path, state)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000007"]
    assert checkpoint.latest(tmp_path).tensors["w"] == 2.0


def test_inputs_have_unit_mean_squared_norm_about_the_centre():
    one, x = training_sae(), 30 * torch.randn(4000, 16) + 7
    one.prepare(x)
    scaled = (x - one.state["centre"]) / one.state["scale"]
    torch.testing.assert_close(scaled.mean(0), torch.zeros(16), atol=1e-5, rtol=0.0)
    torch.testing.assert_close(scaled.square().sum(1).mean(), torch.tensor(1.0))


@pytest.mark.parametrize("architecture", ["topk", "relu_unit", "relu"])
def test_decoder_rows_are_held_at_unit_norm_or_free(architecture):
    one, x = training_sae(architecture=architecture), torch.randn(500, 16)
    one.prepare(x)
    start = 0.1 if architecture == "relu" else 1.0
    torch.testing.assert_close(one.weights["W_dec"].norm(dim=1), torch.full((64,), start))
    share = 0.5 if architecture == "relu_unit" else 1.0  # 2 d / F
    assert torch.equal(share * one.weights["W_dec"], one.weights["W_enc"])
    one.step(x[:64], 0)
    along = (one.weights["W_dec"].grad * one.weights["W_dec"]).sum(1)
    assert (along.abs().max() < 1e-6) == (architecture != "relu")
    optimise(one, x, 5)
    norms = one.weights["W_dec"].detach().norm(dim=1)
    spread = float(norms.max() - norms.min())
    assert spread > 1e-4 if architecture == "relu" else (norms - 1).abs().max() < 1e-5


def test_a_fixed_weight_follows_the_exponent():
    one, x = training_sae(architecture="p_anneal", sparsity=0.05, tokens=64 * 20, warmup=0.0), torch.randn(500, 16)
    one.prepare(x)
    optimise(one, x, 20)
    assert one.state["sparsity"].item() != pytest.approx(0.05, rel=0.05)
    other = training_sae(architecture="relu_unit", sparsity=0.05, tokens=64 * 20)
    other.prepare(x)
    optimise(other, x, 20)
    assert other.state["sparsity"].item() == pytest.approx(0.05)


def test_tokens_are_resampled_by_the_square_of_their_loss():
    """Errors of lengths 1 and 2: losses 1 and 4, chances 1 and 16."""
    n = 4000
    weights = {"W_enc": torch.eye(2).repeat(n, 1), "W_dec": torch.eye(2).repeat(n, 1), "b_enc": torch.zeros(2 * n)}
    resample(weights, {}, torch.arange(n), torch.tensor([[1.0, 0.0], [0.0, 2.0]]), share=1.0, seed=0)
    assert weights["W_dec"][:n, 1].mean().item() == pytest.approx(16 / 17, abs=0.015)


def test_seeds_and_sites_start_differently():
    def start(site, **options):
        return TrainingSAE("a", Site.parse(site), 16, TrainConfig(features=64, k=4, **options), torch.device("cpu"))

    rows = [start(site, seed=seed).weights["W_dec"] for site, seed in (("mlp_1", 0), ("mlp_1", 1), ("mlp_2", 0))]
    assert torch.equal(rows[0], start("mlp_1", seed=0).weights["W_dec"])
    assert not any(torch.allclose(a, b) for a, b in itertools.combinations(rows, 2))


PENALISED = ["relu", "relu_unit", "jumprelu", "gated", "p_anneal"]


def sparse_rows(n, *, directions=128, width=32):
    """Σ_i a_i g_i over random directions, some of which are active."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(directions, width, generator=generator)
    a = torch.rand(n, directions, generator=generator) * (torch.rand(n, directions, generator=generator) < 0.03125)
    return a @ torch.nn.functional.normalize(rows)


@pytest.mark.parametrize("architecture", PENALISED)
def test_many_features_do_not_start_by_reconstructing_too_much(architecture):
    config = TrainConfig(architecture=architecture, features=1024, k=8, tokens=40_000)
    one, x = TrainingSAE("l", Site.parse("resid_0"), 32, config, torch.device("cpu")), sparse_rows(2000)
    one.prepare(x)
    centred, x_hat = x - one.state["centre"], one.export()(x) - one.state["centre"]
    assert (centred * x_hat).sum() < 1.2 * centred.square().sum()


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "steps"), [(name, 160 if name == "jumprelu" else 80) for name in PENALISED])
def test_a_short_run_arrives_at_its_sparsity(architecture, steps):
    config = TrainConfig(architecture=architecture, features=256, k=8, tokens=128 * steps, batch_size=128)
    one, x = TrainingSAE("l", Site.parse("resid_0"), 32, config, torch.device("cpu")), sparse_rows(128 * 80)
    one.prepare(x)
    optimizer = torch.optim.Adam(one.groups(), betas=BETAS)
    l0 = []
    for step in range(steps):
        one.step(x[128 * (step % 80) :][:128], step)
        l0.append(one.state["l0"].item())
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * one.schedule.learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        one.constrain()
    assert sum(l0[-8:]) / 8 == pytest.approx(8, rel=0.35)

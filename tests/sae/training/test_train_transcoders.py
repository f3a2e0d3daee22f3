"""Training transcoders: where they start, every architecture, what is exported, caches, sweeps, and going on."""

from __future__ import annotations

import pytest
import torch

from sae.architectures import ARCHITECTURES
from sae.data.cache import CachedActivations
from sae.data.cache_writer import write_cache
from sae.errors import UserError
from sae.model.sites import Site
from sae.splice import check_saes
from sae.training.config import FinetuneConfig, TrainConfig
from sae.training.finetuning import finetune_saes
from sae.training.finetuning_sae import FinetuningSAE
from sae.training.loop import BETAS
from sae.training.sweep import grid, sweep
from sae.training.train import train_saes
from sae.training.training_sae import TrainingSAE
from tests.sae.training.test_trainer import Stopped, stop_after, stories

MLP_1, ATTN_1 = Site("mlp", 1), Site("attn", 1)
SITES = "attn_1,mlp_1"
TRAINED = [name for name in ARCHITECTURES if name != "identity"]


def small(**options):
    given = {
        "features": 48,
        "k": 4,
        "tokens": 3000,
        "batch_size": 256,
        "kind": "transcoder",
        "skip": True,
        "checkpoints": 1,
    }
    return TrainConfig(**given | options)


def planted(n=2048, *, read=16, width=24):
    """Rows to read, and what a sparse map with a skip connection makes of them, neither centred nor of unit size."""
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(n, read, generator=generator) + torch.randn(read, generator=generator)
    W, D = torch.randn(64, read, generator=generator), torch.randn(64, width, generator=generator)
    f = (x @ W.T / 16 - 1).relu()
    return x, f @ D + x @ torch.randn(read, width, generator=generator) / 8 + 2


@pytest.mark.parametrize("architecture", TRAINED)
def test_every_architecture_starts_at_the_mean_and_learns(architecture):
    """What is exported does on raw activations what was trained: its error is that of the training log."""
    x, y = planted()
    config = small(architecture=architecture, features=64, k=8, tokens=128 * 50, batch_size=128)
    one = TrainingSAE("one", MLP_1, 24, config, torch.device("cpu"), read_width=16)
    one.prepare(y, x)
    assert not one.weights["W_dec"].any() and not one.weights["W_skip"].any()
    torch.testing.assert_close(one.export()(x[:5]), y.mean(0).expand(5, -1))
    optimizer = torch.optim.Adam(one.groups(), betas=BETAS)
    for step in range(config.steps):
        rows = slice(128 * (step % 16), 128 * (step % 16 + 1))
        one.step(y[rows], step, x[rows])
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * one.schedule.learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        one.constrain()
    sae = one.export()
    assert (sae.config.read, sae.config.d_read, sae.config.subtract_b_dec) == ("mlp_in", 16, False)
    norms = sae.W_dec.norm(dim=1)
    assert torch.allclose(norms[norms > 0], torch.ones(()), atol=1e-5)
    explained = 1 - (y - sae(x)).square().sum() / (y - y.mean(0)).square().sum()
    if architecture in ("topk", "relu"):  # others train with another activation function than they end with
        one.report()
        one.step(y, config.steps - 1, x)
        assert float(explained) == pytest.approx(one.report()["explained_variance"], abs=1e-3)
    assert explained > 0.3


def run(model, out, config, **options):
    return train_saes(model, stories(), sites=SITES, config=config, out=out, progress=False, **options)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits_and_a_cache_gives_them_too(tiny_model, tmp_path, monkeypatch):
    config = small(checkpoints=4)
    whole = run(tiny_model, tmp_path / "whole", config)
    assert whole.config(ATTN_1).read == "" and whole.config(MLP_1).read == "mlp_in" and whole[MLP_1].has_skip
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 7)
        run(tiny_model, tmp_path / "killed", config)
    again = run(tiny_model, tmp_path / "killed", config, resume=True)
    for site, sae in whole.items():
        assert all(torch.equal(tensor, again[site].get_buffer(name)) for name, tensor in sae.named_buffers())
    check_saes(tiny_model, whole)

    write_cache(tiny_model, stories(), sites=f"{SITES},mlp_in", tokens=3000, out=tmp_path / "cache", dtype="float32",
                progress=False)  # fmt: skip
    cache = CachedActivations(tmp_path / "cache")
    assert list(cache.model.sites) == [ATTN_1, MLP_1]
    cached = train_saes(
        cache.model, cache.text, config=config, out=tmp_path / "cached", progress=False, activations=cache
    )
    assert list(cached) == [ATTN_1, MLP_1] and cached.config(MLP_1).read == "mlp_in"
    assert torch.equal(cached[MLP_1].b_dec.isfinite(), torch.ones(32, dtype=torch.bool))
    with pytest.raises(UserError, match=r"has not all of these sites.*mlp_norm_1"):
        run(tiny_model, tmp_path / "other", small(read="mlp_norm"), activations=cache)

    made = sweep(tiny_model, stories(), grid(small(tokens=1000), k=(2, 4)), sites="mlp_1", out=tmp_path / "sweep",
                 progress=False)  # fmt: skip
    assert all(options.kind == "transcoder" for options in made.configs.values())

    tuned = finetune_saes(tiny_model, whole, stories(), out=tmp_path / "tuned", progress=False,
                          config=FinetuneConfig(tokens=1000, batch_size=256, context_length=16))  # fmt: skip
    assert tuned.config(MLP_1).read == "mlp_in" and not torch.equal(tuned[MLP_1].W_skip, whole[MLP_1].W_skip)


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "gated"])
def test_a_trainable_one_computes_what_its_transcoder_does(architecture):
    x, y = planted(256)
    one = TrainingSAE("one", MLP_1, 24, small(architecture=architecture), torch.device("cpu"), read_width=16)
    one.prepare(y, x)
    with torch.no_grad():
        for name in ("W_dec", "W_skip"):
            one.weights[name].normal_(0, 0.2)
    sae = one.export()
    tunable = FinetuningSAE(sae, scale=2.5, l0=4.0, read_scale=7.0)
    torch.testing.assert_close(tunable(x).x_hat, sae(x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tunable.export()(x), sae(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "sae"}, "skip is on, and kind is 'sae'"),
        ({"kind": "sae", "skip": False, "read": "mlp_norm"}, "read is 'mlp_norm', and kind is 'sae'"),
        ({"architecture": "identity"}, "--saes mlp-neurons"),
        ({"revival": "resample"}, "errors are no directions to read"),
    ],
)
def test_options_that_do_not_go_together_are_told(options, message):
    with pytest.raises(UserError, match=message):
        small(**options)


def test_transcoders_without_an_mlp_are_refused(tiny_model, tmp_path):
    with pytest.raises(UserError, match=r"none of attn_1 is an MLP"):
        train_saes(tiny_model, stories(), sites="attn_1", config=small(), out=tmp_path / "run", progress=False)

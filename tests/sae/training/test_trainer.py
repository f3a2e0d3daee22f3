"""Training: resumed runs bit by bit, counters against loops, folding, recovery of known directions."""

import copy
import json

import pytest
import torch

from sae.architectures import ARCHITECTURES
from sae.autoencoder import SparseAutoencoder
from sae.errors import UserError
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.saes import load_saes
from sae.training.config import TrainConfig
from sae.training.train import train_saes
from sae.training.trainer import Trainer
from sae.training.training_sae import Schedule, TrainingSAE, geometric_median
from tests.benchmarks.training_memory import training_memory

SITE = Site.parse("resid_0")
WORDS = [
    "the",
    "a",
    "man",
    "dog",
    "cat",
    "sees",
    "likes",
    "near",
    "old",
    "young",
    "sings",
    "walks",
    ".",
    "king",
    "runs",
]
ALL = list(ARCHITECTURES)


def stories(n=120, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (12,), generator=generator)) for _ in range(n)]


def small(**options):
    """23 steps, of which the first fill of the buffer has 16."""
    defaults = {"features": 48, "k": 4, "tokens": 3000, "batch_size": 128, "buffer_tokens": 2048}
    return TrainConfig(**defaults | {"log_steps": 5, "dead_tokens": 400, "checkpoints": 1} | options)


def run(model, out, config, sites="resid_0,mlp_1", **options):
    return train_saes(model, stories(), sites=sites, config=config, out=out, progress=False, **options)


class Stopped(Exception):
    pass


def stop_after(monkeypatch, step):
    """Makes training die right after this step, as a kill would."""
    one_step = Trainer._one_step

    def dying(self):
        if self.step == step:
            raise Stopped
        one_step(self)

    monkeypatch.setattr(Trainer, "_one_step", dying)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "revival", "sites", "stops"),
    [
        ("topk", "auto", "resid_0,mlp_1", (13, 20)),  # in the first and in the second fill of the buffer
        ("relu", "resample", "mlp_1", (20,)),
        ("batchtopk", "auto", "mlp_1", (20,)),
        ("jumprelu", "auto", "mlp_1", (20,)),
        ("gated", "auto", "mlp_1", (20,)),
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(tiny_model, tmp_path, monkeypatch, architecture, revival, sites, stops):
    config = small(architecture=architecture, revival=revival, checkpoints=4)
    whole = run(tiny_model, tmp_path / "whole", config, sites)
    for stop in stops:
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            stop_after(patch, stop)
            run(tiny_model, tmp_path / "killed", config, sites, resume=True)
    assert len(list((tmp_path / "killed" / "checkpoints").iterdir())) == 2
    resumed = run(tiny_model, tmp_path / "killed", config, sites, resume=True)
    for site, sae in whole.items():
        for name, tensor in sae.named_buffers():
            assert torch.equal(tensor, resumed[site].get_buffer(name)), (site, name)
    logs = [(tmp_path / name / "saes" / "training.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    timeless = [[{k: v for k, v in json.loads(r).items() if k != "tokens_per_second"} for r in rows] for rows in logs]
    assert timeless[0] == timeless[1]


@pytest.mark.slow
def test_what_a_run_leaves_on_disk(tiny_model, tmp_path):
    saes = run(tiny_model, tmp_path / "run", small())
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.json", "saes"}
    assert {p.name for p in (tmp_path / "run" / "saes").iterdir()} == {"resid_0", "mlp_1", "training.jsonl"}
    rows = [json.loads(line) for line in (tmp_path / "run" / "saes" / "training.jsonl").read_text().splitlines()]
    assert {row["site"] for row in rows} == {"resid_0", "mlp_1"}
    assert rows[-1]["step"] == 3000 // 128
    assert {"loss", "l0", "explained_variance", "dead", "tokens_per_second"} <= set(rows[-1])
    assert rows[-1]["explained_variance"] > rows[0]["explained_variance"]
    loaded = load_saes(tmp_path / "run")
    assert list(loaded) == list(saes)
    config = loaded[SITE].config
    assert (config.model_fingerprint, config.k, config.site) == (tiny_model.fingerprint, 4, "resid_0")
    torch.testing.assert_close(loaded[SITE].W_dec.norm(dim=1), torch.ones(48))


def test_every_row_of_a_fill_is_dealt_once_and_every_fill_and_seed_has_its_order(tiny_model, tmp_path, monkeypatch):
    dealt, seeds, one_step, randperm = {}, [], Trainer._one_step, torch.randperm

    def order(n, *, generator):
        seeds.append(generator.initial_seed())
        return randperm(n, generator=generator)

    def recording(self):
        one_step(self)
        rows = self.orders[self.config.seed][: self.dealt * self.config.batch]
        dealt[self.config.seed, self.fill] = rows.tolist(), self.filled // self.config.batch * self.config.batch

    monkeypatch.setattr(Trainer, "_one_step", recording)
    monkeypatch.setattr(torch, "randperm", order)
    for seed in (0, 1):
        run(tiny_model, tmp_path / str(seed), small(seed=seed, tokens=20 * 128), "mlp_1")
    for seed, fill in dealt:
        rows, whole = dealt[seed, fill]
        assert len(set(rows)) == len(rows) and (len(rows) == whole or (seed, fill + 1) not in dealt)
    assert len(set(seeds)) == len(seeds) == len(dealt) > 3


def test_a_run_says_where_its_sites_are(make_tiny_model, tmp_path):
    usual = make_tiny_model("llama")
    path = "model.layers.1.self_attn.o_proj:input"
    moved = LanguageModel(usual.hf, usual.tokenizer, name="m", site_paths={"attn_1": path})
    options = {"sites": "attn_0,attn_1", "config": small(tokens=1024), "progress": False}
    saes = train_saes(moved, stories(), out=tmp_path, **options)
    assert [sae.config.extra["site_path"] for sae in saes.values()] == ["", path]
    train_saes(moved, stories(), out=tmp_path, resume=True, **options)
    with pytest.raises(UserError, match="begun with site_paths"):
        train_saes(usual, stories(), out=tmp_path, resume=True, **options)


@pytest.mark.slow
def test_existing_and_different_runs_are_refused(tiny_model, tmp_path):
    run(tiny_model, tmp_path, small(tokens=1024))
    with pytest.raises(UserError, match="not empty"):
        run(tiny_model, tmp_path, small(tokens=1024))
    with pytest.raises(UserError, match=r"config \{'tokens': 1024\} and cannot be resumed with \{'tokens': 2048\}"):
        run(tiny_model, tmp_path, small(tokens=2048), resume=True)
    halved = LanguageModel(copy.deepcopy(tiny_model.hf).bfloat16(), tiny_model.tokenizer, name="m")
    with pytest.raises(UserError, match="begun with dtype 'float32' and cannot be resumed with 'bfloat16'"):
        run(halved, tmp_path, small(tokens=1024), resume=True)
    again = run(tiny_model, tmp_path, small(tokens=1024), resume=True)  # complete: read, not trained
    assert set(again) == {SITE, Site.parse("mlp_1")}
    run(tiny_model, tmp_path, small(tokens=2048), overwrite=True)


def test_interrupting_leaves_the_last_checkpoint(tiny_model, tmp_path, monkeypatch):
    one_step = Trainer._one_step

    def interrupted(self):
        if self.step == 9:
            raise KeyboardInterrupt
        one_step(self)

    monkeypatch.setattr(Trainer, "_one_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, tmp_path, small(checkpoints=23))
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000008", "step_00000009"]


def training_sae(width=16, **options):
    config = TrainConfig(**{"features": 64, "k": 4, "tokens": 100_000, "batch_size": 64, **options})
    return TrainingSAE("one", SITE, width, config, torch.device("cpu"))


def optimise(one, x, steps):
    optimizer = torch.optim.Adam(one.weights.values(), betas=(0.9, 0.99), fused=True)
    batch = one.config.batch
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = one.schedule.learning_rate(step)
        one.step(x[torch.randint(len(x), (batch,))], step)
        optimizer.step()
        optimizer.zero_grad()
        one.constrain()
    return one


@pytest.mark.parametrize("architecture", ALL)
def test_the_exported_autoencoder_does_on_raw_activations_what_was_trained(architecture):
    x = 30 * torch.randn(2000, 16) + 7
    one = training_sae(architecture=architecture, centre="geometric_median")
    one.prepare(x)
    optimise(one, x, 10 if one.architecture.trained else 0)
    sae = one.export(model="m", fingerprint="f")
    x = x[:50]
    scaled = (x - one.state["centre"]) / one.state["scale"]
    tensors = one.architecture.export(one.weights, one.extra_state)
    config = type(sae.config)(**vars(sae.config))
    plain = SparseAutoencoder(config, tensors)
    expected = plain(scaled) * one.state["scale"] + one.state["centre"]
    torch.testing.assert_close(sae(x), expected.detach(), atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(len(sae.W_dec)))


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_the_first_step_moves_every_tensor_by_its_own_learning_rate(tiny_model, monkeypatch, tmp_path, architecture):
    moved = {}

    def one_step(trainer):
        (sae,) = trainer.saes
        before = {key: weight.detach().clone() for key, weight in sae.weights.items()}
        monkeypatch.setattr(sae, "constrain", lambda: None)
        original(trainer)
        moved.update({key: (sae.weights[key] - before[key]).abs().max().item() for key in before})
        raise Stopped

    original = Trainer._one_step
    monkeypatch.setattr(Trainer, "_one_step", one_step)
    config = small(architecture=architecture, warmup=0.5, learning_rate=0.115)
    assert Schedule(config, 32).learning_rate(0) == pytest.approx(0.01)
    with pytest.raises(Stopped):
        train_saes(tiny_model, stories(), sites="mlp_1", config=config, out=tmp_path, progress=False)
    rates = {key: 0.01 * ARCHITECTURES[architecture].rates.get(key, 1.0) for key in moved}  # Adam's first step
    assert moved == pytest.approx(rates, rel=1e-3)
    assert (moved.get("threshold", 0.0) == pytest.approx(0.003, rel=1e-3)) == (architecture == "jumprelu")


def test_silence_and_log_are_counted_like_a_loop_does():
    one, x = training_sae(dead_tokens=192), torch.randn(2000, 16)  # three batches: silent for that long is not yet dead
    one.prepare(x)
    one.weights["b_enc"].data -= torch.linspace(0, 0.8, 64)  # some are silent for long
    silent, active, squared, seen = torch.zeros(64), 0.0, 0.0, []
    for step in range(6):
        batch = x[64 * step : 64 * (step + 1)]
        scaled = (batch - one.state["centre"]) / one.state["scale"]
        z = (scaled - one.weights["b_dec"]) @ one.weights["W_enc"].T + one.weights["b_enc"]
        value, index = z.topk(4, dim=1)
        f = torch.zeros_like(z).scatter(1, index, value.relu()).detach()
        silent = torch.where((f > 0).any(0), 0, silent + 64)
        active += (f > 0).sum().item()
        squared += (scaled - f @ one.weights["W_dec"] - one.weights["b_dec"]).square().sum().item()
        seen.append(scaled)
        one.step(batch, step)
    assert torch.equal(one.state["silent"], silent)
    everything = torch.cat(seen)
    report = one.report()
    assert report["l0"] == pytest.approx(active / len(everything))
    variance = (everything - everything.mean(0)).square().sum().item()
    assert report["explained_variance"] == pytest.approx(1 - squared / variance, rel=1e-4)
    assert report["dead"] == pytest.approx((silent > 192).float().mean().item())
    assert (silent == 192).any() and 0 < report["dead"] < 1
    one._find_dead()
    assert torch.equal(one.dead, (silent > 192).nonzero()[:, 0])


@pytest.mark.slow
def test_known_directions_are_recovered():
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(32, 32, generator=generator), dim=1)
    x = (torch.rand(20_000, 32, generator=generator) < 0.1) * (0.5 + torch.rand(20_000, 32, generator=generator))
    x = 20 * x @ directions + 5
    for architecture, steps in (("topk", 100), ("batchtopk", 160)):
        one = training_sae(width=32, features=48, architecture=architecture, tokens=steps * 256, batch_size=256)
        one.prepare(x)
        optimise(one, x, steps)
        sae = one.export(model="", fingerprint="")
        best = (directions @ sae.W_dec.T).max(1).values
        assert best.mean() > 0.93, architecture
        assert (best > 0.9).float().mean() > 0.8, architecture


def test_geometric_median_minimises_the_sum_of_distances():
    x = torch.cat([torch.randn(200, 3), torch.randn(20, 3) + 50])
    centre = geometric_median(x, steps=100)
    total = (x - centre).norm(dim=1).sum()
    for _ in range(20):
        assert (x - centre - 0.05 * torch.randn(3)).norm(dim=1).sum() >= total - 1e-3
    assert centre.norm() < 1 < x.mean(0).norm()


def test_resampling_points_dead_features_at_errors_and_leaves_the_living():
    one, x = training_sae(architecture="relu_unit", revival="resample", dead_tokens=10), torch.randn(500, 16)
    one.prepare(x)
    optimise(one, x, 20)
    dead = torch.tensor([3, 5])
    one.state["silent"].zero_()[dead] = 11
    one.weights["W_enc"].data[dead] *= 50  # the living alone say how long a new row is
    before = {key: weight.detach().clone() for key, weight in one.weights.items()}
    moments = {weight: {"exp_avg": torch.ones_like(weight)} for weight in one.weights.values()}
    error = (x - one.export()(x)) / one.state["scale"]
    one.resample(x, moments, step=7)
    living = torch.tensor([i for i in range(64) if i not in (3, 5)])
    for key in ("W_enc", "W_dec", "b_enc"):
        assert torch.equal(one.weights[key][living], before[key][living])
        assert torch.equal(moments[one.weights[key]]["exp_avg"][dead], torch.zeros_like(before[key][dead]))
        assert (moments[one.weights[key]]["exp_avg"][living] == 1).all()
    cosine = torch.nn.functional.normalize(error, dim=1) @ one.weights["W_dec"][dead].detach().T
    torch.testing.assert_close(cosine.max(0).values, torch.ones(2))
    torch.testing.assert_close(
        one.weights["W_enc"][dead].norm(dim=1), torch.full((2,), 0.2 * before["W_enc"][living].norm(dim=1).mean())
    )
    assert one.state["silent"][dead].sum() == 0


@pytest.mark.slow
def test_biases_of_dead_features_rise_by_a_share_of_the_learning_rate_until_they_are_active():
    one, x = training_sae(dead_tokens=10), torch.randn(2000, 16)
    one.prepare(x)
    asleep = torch.tensor([3, 5])
    one.weights["b_enc"].data[asleep] = -0.6  # so that no pre-activation is among the largest
    one.state["silent"][asleep] = 11
    before = one.weights["b_enc"].detach().clone()
    one.step(x[:64], 100)
    rise = one.weights["b_enc"].detach() - before
    assert (one.weights["b_enc"].grad[asleep] == 0).all()  # AuxK moves other weights alone
    assert one.weights["W_enc"].grad[asleep].abs().sum() > 0
    torch.testing.assert_close(rise[asleep], torch.full((2,), 0.2 * one.schedule.learning_rate(100)))
    assert rise.count_nonzero() == 2
    optimise(one, x, 150)
    f = one.export().encode(x)
    assert (f[:, asleep] > 0).any(0).all()


@pytest.mark.parametrize("architecture", [name for name in ALL if name != "identity"])
def test_memory_is_stated_for_the_tensors_that_there_are(architecture):
    one = training_sae(architecture=architecture)
    memory = training_memory(one.config, one.width, one.device)
    parameters = list(one.weights.values())
    optimise(one, torch.randn(200, 16), 2)
    assert memory.weights == memory.gradients == sum(4 * p.numel() for p in parameters)
    assert memory.moments == 2 * memory.weights
    assert memory.total(3) == 3 * 4 * memory.weights + memory.intermediates
    assert memory.intermediates > one.workspace.n_bytes
    assert (one.workspace.n_bytes > 0) == one.architecture.fixed_k  # dense steps at first need none


def test_schedules():
    config = TrainConfig(tokens=100_000, batch_size=1000, warmup=0.1, decay=0.5, learning_rate=1.0)
    rates = [Schedule(config, 64).learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:50] == [1.0] * 40
    assert rates[99] == pytest.approx(1 / 50)
    assert [TrainConfig(tokens=n).dead_after for n in (1000, 10**6, 10**11)] == [4096, 10**4, 10**7]
    assert TrainConfig(tokens=100_000).batch == 512
    assert TrainConfig(tokens=100_000_000).batch == 4096
    for batches, factor in ((100, 2.0), (250, 2.0), (1000, 1.0), (4000, 0.5)):
        for name, peak, decay in (("topk", 0.048, 0.6), ("jumprelu", 0.064, 0.3)):
            config = TrainConfig(architecture=name, tokens=512 * batches, batch_size=512)
            schedule = Schedule(config, 64)
            assert schedule.learning_rate(batches // 3) == pytest.approx(factor * peak / 8)
            falling = schedule.learning_rate(round(batches * (1 - decay / 4)))
            assert falling == pytest.approx(factor * peak / 8 / 4, rel=0.1)
    penalty = training_sae(architecture="p_anneal", sparsity=2.0, warmup=0.5, p_end=0.2, tokens=64 * 100)
    hypers = [penalty.schedule.hyper(step, penalty.state["sparsity"]) for step in (0, 25, 50, 75, 100)]
    assert [float(hyper.sparsity) for hyper in hypers] == pytest.approx([0.0, 1.0, 2.0, 2.0, 2.0])
    assert [hyper.p for hyper in hypers] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    usual = training_sae(architecture="jumprelu", revival="auxk", features=64, width=16).schedule.hyper(
        0, torch.tensor(1.0)
    )
    assert (usual.k_aux, usual.bandwidth, usual.target_l0) == (1, pytest.approx(0.8 / 4), None)
    assert [TrainConfig(k=k).k_aux for k in (8, 9, 32)] == [1, 2, 4] and TrainConfig(aux_k=7).k_aux == 7
    assert training_sae(revival="resample", tokens=64 * 100).resample_steps == {10, 20, 30, 40}
    assert training_sae().resample_steps == set()
    annealed = training_sae(k_start=20, warmup=0.5)
    assert [annealed.schedule.hyper(step, torch.tensor(1.0)).k for step in (0, 10_000)] == [20, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": 8, "k": 9}, "k is at most"),
        ({"k": 0}, "k is 0"),
        ({"tokens": 0}, "tokens is 0"),
        ({"architecture": "topkk"}, "did you mean 'topk'"),
        ({"learning_rate": -1.0}, "learning-rate is -1.0"),
        ({"centre": "median"}, "allowed are mean"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**options)

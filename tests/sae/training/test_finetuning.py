"""Fine-tuning: gradients by finite differences, sparsity and unit rows kept, better predictions, interrupted runs."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import softmax

from sae.architectures import ARCHITECTURES
from sae.autoencoder import SparseAutoencoder
from sae.data.activations import ContextStream
from sae.data.batches import counted_tokens, token_batches
from sae.data.text import TextSource
from sae.errors import UserError
from sae.evaluation.evaluate import Evaluator
from sae.formats import load_sae, save_sae
from sae.model.sites import Site
from sae.saes import load_saes
from sae.splice import spliced_predictions
from sae.training.config import FinetuneConfig, TrainConfig
from sae.training.finetuning import Finetuner, finetune_saes, make_trainable, prediction_loss, spliced_loss
from sae.training.finetuning_sae import FinetuningSAE
from sae.training.train import train_saes
from tests.sae.training.test_trainer import stories

SITES = "embed,resid_0"
TRAINED = [name for name in ARCHITECTURES if name != "identity"]
TEXTS, HELD_OUT = stories(120, seed=1), stories(16, seed=2)


def small(**options):
    """Eight steps."""
    defaults = {"tokens": 2000, "batch_size": 256, "learning_rate": 0.003, "context_length": 16}
    return FinetuneConfig(**defaults | {"log_steps": 2, "checkpoints": 1} | options)


@pytest.fixture(autouse=True, scope="module")
def _few_batches_are_measured():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sae.training.finetuning.MEASURED_BATCHES", 4)
        yield


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """Autoencoders of every nonlinearity for the same sites, by architecture."""

    def of(architecture):
        config = TrainConfig(architecture=architecture, features=48, k=4, tokens=4000, batch_size=256, checkpoints=0)
        out = tmp_path_factory.mktemp("trained") / architecture
        return train_saes(tiny_model, stories(), sites=SITES, config=config, out=out, progress=False)

    made = {}
    return lambda name: made.setdefault(name, of(name)) if name not in made else made[name]


def tuned(model, saes, out, config=None, **options):
    return finetune_saes(model, saes, TEXTS, config=config or small(), out=out, progress=False, **options)


def trainable_of(model, saes, config):
    stream = ContextStream(model, TextSource.of(TEXTS), context_length=16, forward_tokens=config.batch)
    return make_trainable(model, saes, stream, config), stream.take()


@pytest.mark.parametrize("architecture", ["topk", "relu", "jumprelu", "batchtopk", "gated"])
def test_a_trainable_one_computes_what_its_autoencoder_does(tiny_model, trained, architecture):
    sae = trained(architecture)[Site.parse("resid_0")]
    one = FinetuningSAE(sae, scale=2.5, l0=4.0)
    x = 3 * torch.randn(50, sae.config.d_model)
    x_hat, _, n_active = one(x)
    torch.testing.assert_close(x_hat, sae(x), atol=1e-5, rtol=1e-5)
    assert n_active == (sae.encode(x) > 0).sum()
    torch.testing.assert_close(one.export()(x), sae(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["topk", "relu", "jumprelu", "gated"])
def test_gradients_of_a_trainable_one_are_those_of_plain_autograd(trained, architecture):
    """The sparse backward pass, in the weights and in x, against dense autograd through `SparseAutoencoder`."""
    sae = trained(architecture)[Site.parse("resid_0")]
    one = FinetuningSAE(sae, scale=1.0, l0=4.0)
    x, g = torch.randn(2, 30, sae.config.d_model)
    x_sparse, x_dense = x.clone().requires_grad_(), x.clone().requires_grad_()
    dense = {name: tensor.detach().clone() for name, tensor in sae.named_buffers()}
    leaves = {name: dense[name].requires_grad_() for name in one.weights}
    (one(x_sparse).x_hat * g).sum().backward()
    (torch.func.functional_call(sae, dense, (x_dense,)) * g).sum().backward()
    torch.testing.assert_close(x_sparse.grad, x_dense.grad, atol=1e-5, rtol=1e-4)
    for name, weight in one.weights.items():
        torch.testing.assert_close(weight.grad, leaves[name].grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_the_gradient_agrees_with_finite_differences_through_the_model(make_tiny_model, trained, loss):
    """The derivative along a random direction in all weights of all sites at once, both terms included.

    R / P is a constant of the step, so the loss differenced is that with the balance at the middle.
    """
    model = make_tiny_model("gpt_neox")
    model.hf.double()
    config = small(loss=loss, reconstruction=0.7)
    saes = {
        s: SparseAutoencoder(sae.config, dict(sae.named_buffers())).double() for s, sae in trained("jumprelu").items()
    }
    saes_in_training, tokens = trainable_of(model, saes, config)
    counted = counted_tokens(model, tokens, special_tokens=False)
    middle = spliced_loss(model, saes_in_training, tokens, counted, config)
    middle.loss.backward()
    balance = (torch.stack(list(middle.unexplained.values())).mean() / middle.prediction).item()
    weights = [weight for one in saes_in_training.values() for weight in one.weights.values()]
    directions = [torch.randn_like(weight) for weight in weights]

    def at(step):
        with torch.no_grad():
            for weight, direction in zip(weights, directions, strict=True):
                weight += step * direction
            losses = spliced_loss(model, saes_in_training, tokens, counted, config)
            for weight, direction in zip(weights, directions, strict=True):
                weight -= step * direction
        return float(balance * losses.prediction + 0.7 * torch.stack(list(losses.unexplained.values())).mean())

    slope = sum(float((weight.grad * d).sum()) for weight, d in zip(weights, directions, strict=True))
    assert slope == pytest.approx((at(1e-7) - at(-1e-7)) / 2e-7, rel=1e-3)


@pytest.mark.parametrize(("architecture", "factor"), [("relu", 0.6), ("relu", 1.2), ("jumprelu", 0.6), ("gated", 0.6)])
def test_steering_brings_l0_where_it_was_asked_to(trained, architecture, factor):
    """Nothing but the cuts moves, until as many features are active as was asked for."""
    sae = trained(architecture)[Site.parse("resid_0")]
    x = torch.randn(400, sae.config.d_model)
    before = sae.encode_sparse(x)
    one = FinetuningSAE(sae, scale=1.7, l0=factor * len(before.value) / len(x))
    for _ in range(60):
        one.steer(one(x).acts)
    after = one.export()
    assert len(after.encode_sparse(x).value) / len(x) == pytest.approx(one.l0, rel=0.03)
    assert torch.equal(after.W_dec, sae.W_dec)


@pytest.mark.parametrize("architecture", ["jumprelu", "gated"])
def test_cuts_stay_where_values_are_positive(trained, architecture):
    """More features than have a positive value cannot be had: steering stops there, and finds back at once."""
    sae = trained(architecture)[Site.parse("resid_0")]
    x = torch.randn(400, sae.config.d_model)
    one = FinetuningSAE(sae, scale=1.0, l0=48.0)
    for _ in range(60):
        one.steer(one(x).acts)
    most = len(one.export().encode_sparse(x).value) / len(x)
    assert most > len(sae.encode_sparse(x).value) / len(x)
    one.l0 = most / 2
    for _ in range(60):
        one.steer(one(x).acts)
    assert len(one.export().encode_sparse(x).value) / len(x) == pytest.approx(most / 2, rel=0.03)


def test_the_early_site_learns_from_the_predictions(tiny_model, trained):
    """With no weight on reconstruction, the embedding's autoencoder has a gradient through all later ones."""
    config = small(reconstruction=0.0)
    saes_in_training, tokens = trainable_of(tiny_model, trained("topk"), config)
    counted = counted_tokens(tiny_model, tokens, special_tokens=False)
    spliced_loss(tiny_model, saes_in_training, tokens, counted, config).loss.backward()
    for one in saes_in_training.values():
        assert one.weights["W_enc"].grad.abs().sum() > 0


def test_prediction_losses_against_their_definitions(tiny_model):
    tokens = tiny_model.tokenize(["the man sees the old dog", "a cat"])
    ours, theirs = torch.randn(2, *tokens.input_ids.shape, 7)
    tokens = replace(tokens, input_ids=tokens.input_ids % 7)
    kl, ce = [], []
    for b, s in tokens.attention_mask.nonzero().tolist():
        p, q = softmax(theirs[b, s], 0), softmax(ours[b, s], 0)
        kl.append(float((p * (p / q).log()).sum()))
        if s + 1 < tokens.n_positions:
            ce.append(-float(q[tokens.input_ids[b, s + 1]].log()))
    assert float(prediction_loss("kl", ours, theirs, tokens)) == pytest.approx(sum(kl) / len(kl), rel=1e-5)
    assert float(prediction_loss("ce", ours, theirs, tokens)) == pytest.approx(sum(ce) / len(ce), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["topk", "relu", "jumprelu", "gated"])
def test_predictions_get_better_and_sparsity_stays(tiny_model, trained, tmp_path, architecture):
    before = trained(architecture)
    after = tuned(tiny_model, before, tmp_path / "run")
    evaluator = Evaluator(tiny_model, {"before": before, "after": after})
    for tokens in token_batches(tiny_model, HELD_OUT, max_tokens=None, batch_size=16, context=16):
        evaluator.update(tokens)
    measured = list(evaluator.results().values())
    assert measured[1].spliced["all"].kl < 0.85 * measured[0].spliced["all"].kl
    for site, sae in after.items():
        then, now = (m.sites[site.name] for m in measured)
        assert now.l0 == pytest.approx(then.l0, rel=1e-6 if architecture == "topk" else 0.15)
        assert now.explained_variance > then.explained_variance - 0.1
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(48), atol=1e-5, rtol=0)
        assert sae.config.architecture == architecture and sae.config.extra["finetuning"]["loss"] == "kl"
    assert list(load_saes(tmp_path / "run")) == list(after)


@pytest.mark.slow
def test_cross_entropy_goes_down_with_the_loss_ce(tiny_model, trained, tmp_path):
    before = trained("topk")
    after = tuned(tiny_model, before, tmp_path / "run", small(loss="ce", reconstruction=0.1))
    ce = [spliced_predictions(tiny_model, s, TEXTS, max_tokens=4000)["ce"] for s in (before, after)]
    assert ce[1] < ce[0]
    lines = [json.loads(line) for line in (tmp_path / "run" / "saes" / "finetuning.jsonl").read_text().splitlines()]
    assert lines[-1]["ce"] < lines[0]["ce"] and lines[-1]["tokens"] >= 2000
    assert lines[-1]["learning_rate"] == 0 and all(line["learning_rate"] > 0 for line in lines[:4])


@pytest.mark.slow
def test_a_foreign_autoencoder_can_be_fine_tuned(tiny_model, trained, tmp_path):
    """One that comes in SAELens' format, with nothing but its site known, goes back into it."""
    site = Site.parse("resid_0")
    save_sae(trained("jumprelu")[site], tmp_path / "foreign", file_format="saelens")
    foreign = load_sae(tmp_path / "foreign", site=site)
    after = tuned(tiny_model, {site: foreign}, tmp_path / "run")[site]
    assert after.config.model_fingerprint == tiny_model.fingerprint
    kl = [spliced_predictions(tiny_model, {site: s}, HELD_OUT, max_tokens=1000)["kl"] for s in (foreign, after)]
    assert kl[1] < kl[0]


def test_a_batch_of_special_tokens_alone_is_left_out(tiny_model, trained, tmp_path, monkeypatch):
    monkeypatch.setattr("sae.training.finetuning.MEASURED_BATCHES", 2)
    config = FinetuneConfig(tokens=12, batch_size=16, checkpoints=0)
    saes = {site: sae for site, sae in trained("topk").items() if site.name == "resid_0"}
    texts = ["the man sees the old dog", *["<eos>"] * 40]
    after = finetune_saes(tiny_model, saes, texts, config=config, out=tmp_path / "run", progress=False)
    assert list(after) == list(saes)


class Stopped(Exception):
    pass


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_bits(tiny_model, trained, tmp_path, monkeypatch):
    saes, config = trained("gated"), small(checkpoints=3)
    whole = tuned(tiny_model, saes, tmp_path / "whole", config)
    one_step = Finetuner._one_step

    def dying(self):
        if self.step == 6:
            raise Stopped
        one_step(self)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Finetuner, "_one_step", dying)
        tuned(tiny_model, saes, tmp_path / "killed", config)
    assert not list((tmp_path / "killed" / "saes").glob("*/*.safetensors"))
    resumed = tuned(tiny_model, saes, tmp_path / "killed", config, resume=True)
    for site, sae in whole.items():
        for name, tensor in sae.named_buffers():
            assert torch.equal(tensor, dict(resumed[site].named_buffers())[name]), (site, name)
    logs = [(tmp_path / name / "saes" / "finetuning.jsonl").read_text() for name in ("whole", "killed")]
    assert logs[0] == logs[1] and not (tmp_path / "killed" / "checkpoints").exists()
    again = tuned(tiny_model, saes, tmp_path / "killed", config, resume=True)
    assert torch.equal(again[Site("embed")].W_dec, whole[Site("embed")].W_dec)
    with pytest.raises(UserError, match="begun with"):
        tuned(tiny_model, saes, tmp_path / "killed", replace(config, tokens=7000), resume=True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"loss": "mse"}, "unknown loss 'mse'"),
        ({"tokens": 0}, "tokens is 0"),
        ({"reconstruction": -1}, "reconstruction is -1"),
        ({"learning_rate": 0.0}, "learning-rate is 0.0"),
    ],
)
def test_options_out_of_range_are_told(options, sentence):
    with pytest.raises(UserError, match=sentence):
        FinetuneConfig(**options)


def test_neurons_are_refused(tiny_model, trained, tmp_path):
    neurons = {Site("embed"): SparseAutoencoder.load(identity(tiny_model, tmp_path))}
    with pytest.raises(UserError, match="nothing to fine-tune"):
        tuned(tiny_model, neurons, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def identity(model, tmp_path):
    config = TrainConfig(architecture="identity", tokens=600, batch_size=512)
    train_saes(model, TEXTS, sites="embed", config=config, out=tmp_path / "identity", progress=False)
    return tmp_path / "identity" / "saes" / "embed"

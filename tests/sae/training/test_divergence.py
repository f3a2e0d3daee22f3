"""Training whose numbers run away ends with a sentence; what cannot be trained or stored is told; nothing hangs."""

import gzip
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.architectures import architecture
from sae.data import text
from sae.data.activations import ContextStream, ModelActivations
from sae.data.cache import CachedActivations
from sae.data.cache_writer import write_cache
from sae.data.text import TextSource
from sae.errors import UserError
from sae.model.sites import Site
from sae.saes import load_saes
from sae.sparse import encoder_pass
from sae.sparse.encoder_pass import EncoderPass
from sae.training.config import FinetuneConfig, TrainConfig
from sae.training.finetuning import finetune_saes
from sae.training.sweep import grid, sweep
from sae.training.train import train_saes
from sae.training.trainer import Trainer
from sae.training.training_sae import Schedule, TrainingSAE

TEXTS = ["the man sees the dog", "she walks near the old cat .", "kings know queens"] * 60
SITE = Site.parse("resid_0")
CONFIG = TrainConfig(features=24, k=3, tokens=3000, batch_size=512, log_steps=4, checkpoints=1)


def run(model, out, config=CONFIG, **options):
    return train_saes(model, TEXTS, sites="resid_0", config=config, out=out, progress=False, **options)


def recorded(out: Path, command: str) -> dict:
    return json.loads((out / "config.json").read_text())[command]


@pytest.mark.parametrize(("name", "rate"), [("topk", 1e30), ("relu", 1e308), ("gated", 1e30)])
def test_training_that_diverges_is_no_success(tiny_model, tmp_path, monkeypatch, name, rate):
    monkeypatch.setattr(Schedule, "learning_rate", lambda self, step: rate)  # more than options allow
    config = TrainConfig(**vars(CONFIG) | {"architecture": name})
    with pytest.raises(UserError, match=r"the training of resid_0 diverged: at step \d+ .* lower learning rate"):
        run(tiny_model, tmp_path / "out", config)
    assert not recorded(tmp_path / "out", "train")["complete"]
    assert not list((tmp_path / "out" / "saes").glob("*/sae.safetensors"))


def test_the_last_good_checkpoint_stays(tiny_model, tmp_path, monkeypatch):
    one_step = Trainer._one_step

    def breaking(self):
        one_step(self)
        if self.step == 4:
            self.saes[0].weights["W_enc"].data[0, 0] = torch.nan

    monkeypatch.setattr(Trainer, "_one_step", breaking)
    with pytest.raises(UserError, match=r"resid_0 diverged: at step 4 .*\(the checkpoint step_00000003 stands\)"):
        run(tiny_model, tmp_path, TrainConfig(**vars(CONFIG) | {"checkpoints": 5}))
    state = load_file(sorted((tmp_path / "checkpoints").glob("step_*/state.safetensors"))[-1])
    assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.slow
def test_fine_tuning_that_diverges_is_no_success(tiny_model, tmp_path, monkeypatch):
    saes = run(tiny_model, tmp_path / "trained")
    monkeypatch.setattr(FinetuneConfig, "learning_rate_at", lambda self, done, width: 1e308)
    with pytest.raises(UserError, match=r"the training of .* diverged"):
        config = FinetuneConfig(tokens=4000, batch_size=256)
        finetune_saes(tiny_model, saes, TEXTS, out=tmp_path / "tuned", config=config, progress=False)
    assert not recorded(tmp_path / "tuned", "finetune")["complete"]
    assert not list((tmp_path / "tuned" / "saes").glob("*/sae.safetensors"))


def test_an_autoencoder_worse_than_the_mean_is_warned_of(tiny_model, tmp_path, caplog, monkeypatch):
    run(tiny_model, tmp_path / "well")
    assert "below zero" not in caplog.text
    monkeypatch.setattr(Schedule, "learning_rate", lambda self, step: 1e4)
    with caplog.at_level(logging.WARNING):
        run(tiny_model, tmp_path / "badly")
    assert "resid_0: explained variance is -" in caplog.text


def test_identity_is_never_trained(tiny_model, tmp_path, monkeypatch):
    stepped, step = set(), TrainingSAE.step
    monkeypatch.setattr(TrainingSAE, "step", lambda self, *x: (stepped.add(self.name), step(self, *x))[1])
    configs = grid(CONFIG, architectures=("topk", "identity"), features=(24,), k=(3,))
    done = sweep(tiny_model, TEXTS, configs, sites="resid_0", out=tmp_path, progress=False)
    assert stepped == {"topk-24-k3-seed0/resid_0"}
    sae, eye = load_saes(done.run("identity"))[SITE], torch.eye(32)
    assert torch.equal(sae.W_enc, eye) and torch.equal(sae.W_dec, eye) and not sae.b_dec.any()


@pytest.mark.parametrize("other", [{"autocast": False}, {"batch_size": 64}, {"exclude_special": False}])
def test_options_that_a_sweep_has_once_are_the_same_in_all_configs(tiny_model, tmp_path, other):
    configs = {"one": CONFIG, "two": replace(CONFIG, **other)}
    with pytest.raises(UserError, match=f"{next(iter(other))} is .* in 'two' and .* in 'one'"):
        sweep(tiny_model, TEXTS, configs, sites="resid_0", out=tmp_path / "sweep", progress=False)


def test_identity_in_several_chunks_is_still_exact(monkeypatch):
    monkeypatch.setattr(encoder_pass, "MIN_CHUNK_ROWS", 4)
    monkeypatch.setattr(encoder_pass, "CPU_CHUNK_BYTES", 1)
    x, one = torch.randn(10, 8), TrainingSAE("", SITE, 8, TrainConfig(architecture="identity"), torch.device("cpu"))
    encoder = EncoderPass(x, one.weights["W_enc"].detach(), None, workspace=one.workspace)
    acts = architecture("identity").select(encoder, one.weights, one.schedule.hyper(0, torch.tensor(1.0)))
    assert torch.equal(acts.z.reshape(10, 8), x)


def test_a_cache_that_cannot_hold_its_numbers_is_refused(tiny_model, tmp_path, monkeypatch):
    fill = ModelActivations.fill

    def large(self, buffer, ids=None, *, one_epoch=False):
        n = fill(self, buffer, ids, one_epoch=one_epoch)
        buffer[SITE][7, 3] = 70_000
        return n

    monkeypatch.setattr(ModelActivations, "fill", large)
    options = {"sites": "resid_0", "tokens": 500, "progress": False}
    with pytest.raises(UserError, match=r"site resid_0 reach 7e\+04, and float16 holds no more than 6.55e\+04"):
        write_cache(tiny_model, TEXTS, out=tmp_path / "half", dtype="float16", **options)
    assert not (tmp_path / "half" / "manifest.json").exists()
    write_cache(tiny_model, TEXTS, out=tmp_path / "brain", **options)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_of_a_cache_are_checked(tiny_model, tmp_path, value):
    write_cache(tiny_model, TEXTS, sites="resid_0", tokens=500, out=tmp_path / "cache", progress=False)
    shard = next((tmp_path / "cache").glob("shard_*"))
    state = load_file(shard)
    state["resid_0"][17, 3] = value
    save_file(state, shard)
    cache = CachedActivations(tmp_path / "cache")
    with pytest.raises(UserError, match=r"shard_00000.safetensors.*site resid_0 holds numbers that are not finite"):
        train_saes(cache.model, cache.text, activations=cache, config=CONFIG, out=tmp_path / "out", progress=False)


def test_a_context_longer_than_the_buffer_is_trained_on(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("sae.training.trainer.MIN_BUFFER_TOKENS", 16)
    monkeypatch.setattr(ContextStream.__init__, "__kwdefaults__", {"forward_tokens": 8, "packed": False})
    options = {"context_length": 60, "packed": True, "buffer_tokens": 16, "batch_size": 16, "tokens": 200}
    assert run(tiny_model, tmp_path, TrainConfig(**vars(CONFIG) | options))[SITE].config.n_features == 24


@pytest.mark.parametrize("packed", [True, False])
def test_text_without_tokens_is_refused(tiny_model, packed, monkeypatch):
    stream = ContextStream(tiny_model, TextSource.of(["\x01", "\x02"]), packed=packed)
    monkeypatch.setattr(stream, "model", NoTokens())
    with pytest.raises(UserError, match=r"has no tokens: the tokenizer of deaf makes none of any of its 2 documents"):
        stream.peek()


class NoTokens:
    """A model whose tokenizer makes nothing of a text."""

    name = "deaf"

    @staticmethod
    def tokenizer(texts, verbose):
        return {"input_ids": [[] for _ in texts]}


def test_a_packed_line_of_gigabytes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "LONGEST_LINE", 2**16)
    with gzip.open(tmp_path / "text.txt.gz", "wb") as file:
        file.write(b"one line\n")
        for _ in range(4):
            file.write(b"a" * 2**20)
    documents = TextSource.of(tmp_path / "text.txt.gz").read()
    assert next(documents) == "one line"
    with pytest.raises(UserError, match=r"text.txt.gz, line 2 has more than 65,536 characters: give a document a line"):
        next(documents)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"text": ' + "1" * 5000 + "}", "malformed"),
        ('"a\\ud800"', "surrogate"),
    ],
)
def test_lines_that_are_no_documents_are_located(tmp_path, line, reason):
    (tmp_path / "text.jsonl").write_text(line)
    with pytest.raises(UserError, match=rf"text.jsonl, line 1: .*{reason}"):
        next(TextSource.of(tmp_path / "text.jsonl").read())

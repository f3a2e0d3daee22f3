"""Models on several devices, and models whose weights wait on disk, give what they give on one device."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from circuits.discovery.discover import discover
from circuits.options import DiscoverOptions
from sae._run import processes
from sae.errors import UserError
from sae.features.logits import direct_effects
from sae.model.device_map import is_offloaded, parse_device_map
from sae.model.load import load_model
from sae.neurons import mlp_neuron_dictionaries, neuron_dictionaries
from sae.sparse.activations import using
from sae.training.config import TrainConfig
from sae.training.train import train_saes
from tests.conftest import WORDS, tiny_hf, word_tokenizer
from tests.simulated_device import bring, simulated_device

TEXT = [" ".join(WORDS[i * j % len(WORDS)] for j in range(1, 13)) for i in range(1, 60)]


def assert_same_runs(model, expected):
    """Activations, gradients at every site, runs that begin at a site, and generation."""
    tokens = expected.probe_tokens()
    runs = [one.run(tokens, capture=one.sites, grad=True) for one in (model, expected)]
    torch.testing.assert_close(runs[0].logits.detach(), runs[1].logits.detach())
    gradients = [torch.autograd.grad(run.logits.square().sum(), [*run.activations.values()]) for run in runs]
    for x, y in zip(*gradients, strict=True):
        assert x.device == model.device
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))
    for site in expected.sites[-3:]:
        skip = model.resume_from(site, {place: x.detach() for place, x in runs[0].activations.items()})
        torch.testing.assert_close(model.run(tokens, skip=skip).logits, runs[1].logits.detach())
    assert model.generate(tokens, max_new_tokens=2).equal(expected.generate(tokens, max_new_tokens=2))


@pytest.mark.slow
def test_a_block_on_another_device(make_tiny_model, tiny_prompts, tmp_path):
    expected = make_tiny_model("gpt_neox")
    options = DiscoverOptions(method="attrib", edge_nodes=8, sites="mlp")
    config = TrainConfig(features=40, k=4, tokens=500, batch_size=100, dead_tokens=200)
    circuits, trained = [], []
    with simulated_device("cuda") as device, using("torch"):
        hf = tiny_hf("gpt_neox")
        bring(hf.gpt_neox.layers[1], device)
        bring(hf.gpt_neox.final_layer_norm, "cpu")
        model = load_model(hf, tokenizer=word_tokenizer())
        assert {site.layer for site in model.sites if model.device_of(site) == device} == {1}
        assert_same_runs(model, expected)
        for one in (model, expected):
            circuits.append(discover(one, neuron_dictionaries(one), tiny_prompts[:2], options, progress=False))
            where = {"config": config, "out": tmp_path / str(len(trained)), "progress": False}
            trained.append(train_saes(one, TEXT, sites="mlp", **where))
    for site, nodes in circuits[1].nodes.items():
        torch.testing.assert_close(circuits[0].nodes[site].effect, nodes.effect, rtol=1e-3, atol=1e-5)
    assert circuits[0].edges.keys() == circuits[1].edges.keys()
    for site, sae in trained[1].items():  # read from disk onto the first device
        other = trained[0][site]
        assert (other.W_dec - sae.W_dec).norm() <= 0.02 * sae.W_dec.norm(), site


@pytest.mark.slow
def test_weights_on_disk(tmp_path):
    pytest.importorskip("accelerate", reason="needs accelerate, which spreads models")
    tiny_hf("gpt_neox").save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    expected, model = load_model(tmp_path, device="cpu"), load_model(tmp_path, device_map="disk")
    assert is_offloaded(model.hf) and model.device.type == "cpu" and model.fingerprints == expected.fingerprints
    assert_same_runs(model, expected)
    rows = [direct_effects(one, torch.eye(32)[:2], k=3) for one in (model, expected)]
    assert rows[0] == rows[1]
    mlps = [mlp_neuron_dictionaries(one) for one in (model, expected)]
    assert all(mlps[0][site].W_dec.equal(sae.W_dec) for site, sae in mlps[1].items())
    narrow = load_model(tmp_path, device_map={"gpt_neox": "cpu", "lm_head": "disk"}, dtype="bfloat16", check=False)
    assert narrow.dtype == torch.bfloat16 and narrow.fingerprint == expected.fingerprint
    for wrong, words in (("gpt_neox.layer=disk", "layers"), ("gpt_neox=cpu,lm_heads=disk", "lm_head"), ("dsk", "disk")):
        with pytest.raises(UserError, match=words):
            load_model(tmp_path, device_map=wrong)


def test_maps_that_cannot_be(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="give one of them"):
        load_model(tmp_path, device="cpu", device_map="auto")
    with pytest.raises(UserError, match="loaded already"):
        load_model(tiny_hf("gpt_neox"), device_map="auto")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        parse_device_map("auto")
    monkeypatch.setattr(processes, "_current", processes.Processes(0, 2))
    with pytest.raises(UserError, match="one process"):
        parse_device_map("auto")

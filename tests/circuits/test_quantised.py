"""Models with weights in 8 and 4 bits: effects add up, nearly those of float32, and stored ones load as they are."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from circuits.attribution.activations import Setting, capture_activations
from circuits.attribution.node_effects import attribute
from circuits.circuit import Circuit
from circuits.discovery.discover import discover
from circuits.options import DiscoverOptions
from sae.errors import UserError
from sae.model.device_map import weight_of
from sae.model.huggingface import quantization
from sae.model.load import load_model
from sae.model.sites import Site
from sae.neurons import mlp_neuron_dictionaries, neuron_dictionaries
from tests.conftest import tiny_hf, word_tokenizer


@pytest.fixture
def stored(tmp_path):
    """A folder with a tiny model."""
    folder = tmp_path / "model"
    tiny_hf("gpt_neox").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_effects_of_quantised_models(stored, tiny_prompts, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, which holds weights in 8 and 4 bits")
    plain = load_model(stored, device="cpu")
    saes, prompts = neuron_dictionaries(plain).subset([Site("resid", 0), Site("mlp", 1)]), tiny_prompts[:2]

    def effects_of(model):
        states = capture_activations(Setting.of(model, saes), prompts)
        result = attribute(states, method="ig", steps=6)
        for site, of_site in result.effects.items():
            total = result.site_totals[site].sum()
            assert abs(of_site.value.sum() - total) < 0.2 * of_site.value.abs().sum() + 1e-3, site
        sums = [torch.zeros(of_site.n_features + 2).index_add(0, of_site.feature.long(), of_site.value.float())
                for of_site in result.effects.values()]  # fmt: skip
        return torch.cat(sums)

    expected = effects_of(plain)
    for quantize, alike in (("8bit", 0.98), ("4bit", 0.8)):
        model = load_model(stored, device="cpu", quantize=quantize)
        assert quantization(model.hf) == quantize and model.fingerprint == plain.fingerprint
        assert model.dtype == torch.float32 and quantization(plain.hf) is None
        assert torch.corrcoef(torch.stack([effects_of(model), expected]))[0, 1] > alike
        layer = model.hf.gpt_neox.layers[0].mlp.dense_4h_to_h
        weight, before = weight_of(layer), plain.hf.gpt_neox.layers[0].mlp.dense_4h_to_h.weight
        assert weight.shape == before.shape and (weight - before).norm() < 0.2 * before.norm()
    assert set(mlp_neuron_dictionaries(model)) == {Site("mlp", 0), Site("mlp", 1)}
    model.hf.save_pretrained(tmp_path / "packed")
    word_tokenizer().save_pretrained(tmp_path / "packed")
    again = load_model(tmp_path / "packed", device="cpu")
    assert quantization(again.hf) == "4bit"
    torch.testing.assert_close(again.run(prompts.clean).logits, model.run(prompts.clean).logits)
    with pytest.raises(UserError, match="stored quantised"):
        load_model(tmp_path / "packed", device="cpu", quantize="8bit")
    options = DiscoverOptions(method="attrib", edge_nodes=0, sites="resid_0")
    circuit = discover(model, saes, prompts, options, progress=False)
    circuit.save(tmp_path / "circuit")
    assert circuit.metadata["quantize"] == "4bit"
    assert (
        quantization(Circuit.load(tmp_path / "circuit", model=str(stored), saes=saes, device="cpu").model.hf) == "4bit"
    )


def test_what_cannot_be_quantised(stored, monkeypatch):
    with pytest.raises(UserError, match="8bit, 4bit"):
        load_model(stored, quantize="3bit")
    with pytest.raises(UserError, match="by name"):
        load_model(tiny_hf("gpt2"), quantize="4bit")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        load_model(stored, quantize="4bit")

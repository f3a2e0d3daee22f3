"""Gradients are taken where they are needed, whatever state the caller left torch in, and added up in float32."""

from __future__ import annotations

import logging
import sys
from functools import partial

import pytest
import torch
from torch import nn

from circuits.attribution.activations import Setting, capture_activations
from circuits.attribution.integrated_gradients import integrated_gradients
from circuits.attribution.node_effects import attribute
from circuits.discovery.discover import discover
from circuits.faithfulness.learned_mask import MaskOptions, learn_node_mask
from circuits.faithfulness.nodes import FaithfulnessOptions, measure_faithfulness
from circuits.faithfulness.optimal_ablation import FitOptions
from circuits.metrics.metrics import logit_difference
from circuits.options import DiscoverOptions
from sae.model.language_model import LanguageModel
from sae.model.load import load_model
from sae.model.sites import Site
from tests.conftest import tiny_hf, word_tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ig", "attrib", "graddrop", "ig-adaptive", "ig-inputs"])
def test_gradients_switched_off_by_the_caller_change_nothing(tiny_model, tiny_saes, tiny_prompts, method):
    options = DiscoverOptions(method=method, steps=2, edge_nodes=10, sites="embed,resid")
    expected = discover(tiny_model, tiny_saes, tiny_prompts, options, progress=False)
    with torch.no_grad():
        found = discover(tiny_model, tiny_saes, tiny_prompts, options, progress=False)
    for site, effects in expected.effects.items():
        assert torch.equal(found.effects[site].value, effects.value)
    assert all(torch.equal(found.edges[pair], weights) for pair, weights in expected.edges.items())


def test_masks_and_constants_are_learned_without_gradients_too(tiny_model, tiny_saes, tiny_prompts, monkeypatch):
    monkeypatch.setattr("circuits.faithfulness.optimal_ablation.FitOptions", partial(FitOptions, steps=3))
    options = DiscoverOptions(method="attrib", edge_nodes=0, sites="resid")
    with torch.no_grad():
        nodes = discover(tiny_model, tiny_saes, tiny_prompts, options, progress=False).nodes
        assert len(
            learn_node_mask(
                Setting.of(tiny_model, tiny_saes), nodes, tiny_prompts, MaskOptions(steps=1), progress=False
            ).losses
        )
        measured = measure_faithfulness(
            Setting.of(tiny_model, tiny_saes),
            nodes,
            tiny_prompts,
            FaithfulnessOptions(ablation="optimal", random=0),
            sizes=[5],
            progress=False,
        )
    assert measured.gain is not None


class WithoutBackward(nn.Module):
    """A module through which no gradient flows, as quantised kernels have it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.inner(x)


def test_effects_that_do_not_add_up_are_told(make_saes, tiny_prompts, caplog):
    hf = tiny_hf("gpt_neox")
    for block in hf.gpt_neox.layers:
        block.mlp.dense_4h_to_h = WithoutBackward(block.mlp.dense_4h_to_h)
    model = load_model(hf, tokenizer=word_tokenizer(), device="cpu", check=False)
    with caplog.at_level(logging.WARNING):
        one = tiny_prompts[[0, 0]]  # the metric does not cancel
        discover(model, make_saes(model), one, DiscoverOptions(edge_nodes=0, sites="resid"), progress=False)
    assert any("through which no gradient flows" in record.getMessage() for record in caplog.records)


@pytest.mark.slow
def test_many_steps_in_bfloat16_add_up_as_few_do(make_tiny_model, make_saes, tiny_prompts):
    """The mean gradient over 64 points, two at a time, is no further from float32's than over 8."""
    exact, rounded = (make_tiny_model("gpt_neox", layers=1, dtype=dtype) for dtype in ("float32", "bfloat16"))
    site = Site("embed")

    def gradient(model: LanguageModel, steps: int) -> torch.Tensor:
        states = capture_activations(Setting(model, make_saes(model), logit_difference), tiny_prompts[:1], sites=[site])
        return integrated_gradients(states, site=site, steps=steps, max_rows=2)

    truth, few, many = gradient(exact, 8), gradient(rounded, 8), gradient(rounded, 64)
    assert many.dtype == torch.float32
    assert (many - truth).norm() < 1.5 * (few - truth).norm() + 0.01 * truth.norm()


@pytest.mark.parametrize("method", ["exact", "random", "activation-difference"])
def test_methods_without_a_gradient_can_do_without_one(tiny_model, tiny_saes, tiny_prompts, method, monkeypatch):
    sites = [Site("resid", 1)]
    states = capture_activations(Setting(tiny_model, tiny_saes, logit_difference), tiny_prompts[:2], sites=sites)
    module = sys.modules["circuits.attribution.node_effects"]
    monkeypatch.setattr(module, "attribution_patching", lambda *_, **__: pytest.fail("a pass"))
    found = attribute(states, sites=sites, method=method, totals=False, gradients=False)
    assert found.gradients == {} and len(found.effects[sites[0]].value)

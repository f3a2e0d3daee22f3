"""The node methods beside attribution patching and integrated gradients, each against a plain statement of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from circuits.attribution.activations import Setting, capture_activations, site_total_effect
from circuits.attribution.attribution_patching import attribution_patching
from circuits.attribution.effects import SiteEffects
from circuits.attribution.gim import gim_patching
from circuits.attribution.graddrop import gradients_with_layer_blocked, mean_magnitude
from circuits.attribution.ig_adaptive import adaptive_gradient, path_scale
from circuits.attribution.ig_inputs import integrated_gradients_of_inputs
from circuits.attribution.integrated_gradients import integrated_gradients
from circuits.attribution.node_effects import attribute
from circuits.attribution.relp import relevance_patching
from circuits.metrics.metrics import logit_difference
from circuits.options import METHODS
from sae.errors import UserError
from sae.model.gim import gim_rules
from sae.model.sites import Site
from sae.neurons import neuron_dictionaries
from tests.circuits.conftest import dense
from tests.near import assert_near

EMBED = Site("embed")
MODEL_FAMILIES = ("gpt_neox", "llama", "gemma2")  # parallel, sequential, and with a norm behind each sublayer


def as_set(effects: SiteEffects) -> set[tuple[int, int, int]]:
    return set(zip(effects.example.tolist(), effects.position.tolist(), effects.feature.tolist(), strict=True))


# ---- ig-inputs


@pytest.mark.parametrize("architecture", MODEL_FAMILIES)
def test_inputs_variant_is_a_loop_over_the_embedding_path(architecture, make_tiny_model, make_saes, tiny_prompts):
    model = make_tiny_model(architecture)
    states = capture_activations(Setting(model, make_saes(model), logit_difference), tiny_prompts, sites=model.sites)
    found = integrated_gradients_of_inputs(states, sites=model.sites, steps=3, rule="left-riemann", max_rows=9)
    expected = {site: torch.zeros_like(x) for site, x in states.clean.items()}
    for alpha in (0, 1 / 3, 2 / 3):
        x = ((1 - alpha) * states.clean[EMBED] + alpha * states.patch[EMBED]).requires_grad_()
        run = model.run(states.tokens, edits={EMBED: lambda _, x=x: x}, capture=model.sites, grad=True)
        m = logit_difference(run.logits[:, -1], tiny_prompts).sum()
        for site, g in zip(model.sites, torch.autograd.grad(m, [run.activations[s] for s in model.sites]), strict=True):
            expected[site] += g / 3
    for site in model.sites:
        assert_near(found[site], expected[site], msg=site)


def test_inputs_variant_is_integrated_gradients_at_the_embedding(tiny_model, states):
    found = integrated_gradients_of_inputs(states, sites=[EMBED], steps=4)[EMBED]
    assert_near(found, integrated_gradients(states, site=EMBED, steps=4))


def test_inputs_variant_finds_the_embedding_of_circuits_without_it(tiny_model, tiny_saes, tiny_prompts, states):
    site = Site.parse("resid_0")
    few = capture_activations(
        Setting(tiny_model, {site: tiny_saes[site]}, logit_difference), tiny_prompts, sites=[site]
    )
    found, expected = (integrated_gradients_of_inputs(s, sites=[site], steps=4)[site] for s in (few, states))
    assert_near(found, expected)


# ---- adaptive


@pytest.mark.slow
def test_adaptive_reaches_the_residual_with_fewer_nodes(make_tiny_model, make_saes, tiny_prompts):
    model = make_tiny_model("llama")
    prompts = tiny_prompts[:4]
    states = capture_activations(Setting(model, make_saes(model), logit_difference), prompts, sites=model.sites)
    at_clean = attribution_patching(states, sites=model.sites)
    scale = path_scale(states, {})
    used, sites = {}, [Site.parse(name) for name in ("attn_0", "mlp_1", "resid_0")]
    for site in sites:
        fine = integrated_gradients(states, site=site, steps=50, max_rows=200)
        total = site_total_effect(states, site=site)
        dx = (states.patch[site] - states.clean[site]) * states.mask[..., None]
        for residual in (0.1, 0.01, 1e-3):
            gradient, used[residual, site] = adaptive_gradient(
                states, site=site, at_clean=at_clean[site], residual=residual, scale=scale, max_rows=6
            )
            gap = ((dx * gradient).sum((1, 2)) - total).abs().mean()
            assert gap <= residual * scale + 1e-5, site
        assert torch.allclose((dx * gradient).sum(-1), (dx * fine).sum(-1), atol=5e-3 * scale)
        assert used[0.1, site] <= used[0.01, site] <= used[1e-3, site]
    spent = [sum(n for (r, _), n in used.items() if r == residual) for residual in (0.1, 1e-3)]
    assert spent[0] < spent[1] < 30 * len(sites)


def test_adaptive_is_simpsons_rule_where_nothing_is_halved(tiny_model, states):
    site = Site.parse("mlp_0")
    at_clean = attribution_patching(states, sites=[site])[site]
    found, n = adaptive_gradient(states, site=site, at_clean=at_clean, residual=0.99, scale=1e6)
    middle = integrated_gradients(states, site=site, steps=1)
    end = attribution_end(tiny_model, states, site)
    assert n == 2
    assert_near(found, (at_clean + 4 * middle + end) / 6)


def attribution_end(model, states, site) -> torch.Tensor:
    """dm/dx with the site alone patched."""
    x = states.patch[site].clone().requires_grad_()
    run = model.run(states.tokens, edits={site: lambda _: x}, grad=True, last_only=True)
    return torch.autograd.grad(logit_difference(run.logits[:, -1], states.prompts).sum(), x)[0]


def test_adaptive_without_patch_prompts(tiny_model, tiny_saes, tiny_prompts):
    prompts = replace(tiny_prompts, patch=None, patch_answers=None)
    sites = [Site.parse("mlp_1"), Site.parse("resid_1")]
    saes = {site: tiny_saes[site] for site in sites}
    states = capture_activations(Setting(tiny_model, saes, logit_difference), prompts, sites=sites)
    result = attribute(states, sites=sites, method="ig-adaptive", residual=0.02)
    scale = max(abs(total.mean().item()) for total in result.site_totals.values())
    for site in sites:
        gap = (result.effects[site].per_example(8) - result.site_totals[site]).abs().mean()
        assert gap <= 0.03 * scale
        assert result.path_nodes[site] >= 2


def test_adaptive_ends_where_no_residual_is_small_enough(tiny_model, states):
    site = Site.parse("mlp_1")
    at_clean = attribution_patching(states, sites=[site])[site]
    found, n = adaptive_gradient(states, site=site, at_clean=at_clean, residual=0.1, scale=0.0)
    assert n < 130
    assert torch.allclose(found, integrated_gradients(states, site=site, steps=50), atol=1e-4)


# ---- graddrop


@pytest.mark.parametrize("architecture", MODEL_FAMILIES)
def test_blocked_gradients_are_those_of_a_model_with_detached_sublayers(
    architecture, make_tiny_model, make_saes, tiny_prompts
):
    model = make_tiny_model(architecture, layers=3)
    states = capture_activations(Setting(model, make_saes(model), logit_difference), tiny_prompts, sites=model.sites)
    for layer, found in gradients_with_layer_blocked(states, sites=model.sites):
        inner = {Site("attn", layer), Site("mlp", layer)}
        rest = [site for site in model.sites if site not in inner]
        assert list(found) == rest
        run = model.run(states.tokens, edits=dict.fromkeys(inner, torch.detach), capture=rest, grad=True)
        m = logit_difference(run.logits[:, -1], tiny_prompts).sum()
        expected = torch.autograd.grad(m, [run.activations[site] for site in rest])
        for site, g in zip(rest, expected, strict=True):
            assert_near(found[site], g, msg=(layer, site))


def test_graddrop_is_the_mean_magnitude_over_open_layers(make_tiny_model, make_saes, tiny_prompts):
    model = make_tiny_model("llama", layers=3)
    saes = make_saes(model)
    states = capture_activations(Setting(model, saes, logit_difference), tiny_prompts, sites=model.sites)
    found = attribute(states, sites=model.sites, method="graddrop").effects
    site, sae = Site.parse("attn_1"), saes[Site.parse("attn_1")]
    runs = dict(gradients_with_layer_blocked(states, sites=[site, Site.parse("resid_2")]))
    delta = sae.encode(states.patch[site]) - sae.encode(states.clean[site])
    parts = torch.stack([delta * (runs[layer][site] @ sae.W_dec.T) for layer in (0, 2)])
    expected = parts.abs().mean(0) * parts.sum(0).sign()
    padding = states.mask.shape[1] - states.mask.sum(1)
    rows = zip(*(getattr(found[site], n).tolist() for n in ("example", "position", "feature", "value")), strict=True)
    checked = 0
    for b, s, i, value in rows:
        if i < found[site].n_features:
            assert value == pytest.approx(expected[b, s + padding[b], i].item(), abs=1e-5)
            checked += 1
    assert checked > 20


def test_mean_magnitude_by_hand():
    """Node 0 cancels but for sign, node 1 is in one part only."""
    zero = torch.zeros(2, dtype=torch.int32)
    parts = [
        SiteEffects(2, zero, zero, torch.tensor([0, 1], dtype=torch.int32), torch.tensor([3.0, 2.0])),
        SiteEffects(2, zero[:1], zero[:1], torch.tensor([0], dtype=torch.int32), torch.tensor([-5.0])),
    ]
    assert mean_magnitude(parts).value.tolist() == [-4.0, 1.0]


def test_methods_that_need_the_stream_say_so(tiny_model, tiny_saes, tiny_prompts, monkeypatch):
    site = Site.parse("mlp_1")
    states = capture_activations(Setting(tiny_model, tiny_saes, logit_difference), tiny_prompts, sites=[site])
    monkeypatch.setattr(tiny_model, "sites", (site, Site.parse("resid_1")))
    for method, other in (("ig-inputs", "use ig"), ("graddrop", "use attrib")):
        with pytest.raises(UserError, match=f"'embed'.*{other}"):
            attribute(states, sites=[site], method=method)


# ---- relp and the baselines


@pytest.mark.parametrize("architecture", ["gpt_neox", "gemma2"])
def test_relevance_patching_is_not_the_gradient_but_agrees_behind_the_last_norm(
    architecture, make_tiny_model, make_saes, tiny_prompts
):
    """Relevance of the whole stream is the same at every depth where a model has no biases."""
    model = make_tiny_model(architecture)
    states = capture_activations(Setting(model, make_saes(model), logit_difference), tiny_prompts, sites=model.sites)
    relevance = relevance_patching(states, sites=model.sites)
    gradient = attribution_patching(states, sites=model.sites)
    assert not torch.allclose(relevance[EMBED], gradient[EMBED], rtol=0.1)
    if architecture == "gemma2":
        sums = [
            (states.clean[site] * relevance[site] * states.mask[..., None]).sum((1, 2))
            for site in model.sites
            if site.kind in ("embed", "resid")
        ]
        assert all(torch.allclose(total, sums[0], rtol=1e-3, atol=1e-4) for total in sums)


def test_gim_is_attribution_patching_under_its_rules(tiny_model, states):
    found = gim_patching(states, sites=tiny_model.sites)
    with gim_rules(tiny_model.hf):
        expected = attribution_patching(states, sites=tiny_model.sites)
    assert all(torch.equal(found[site], expected[site]) for site in tiny_model.sites)
    assert not torch.allclose(found[EMBED], attribution_patching(states, sites=[EMBED])[EMBED], rtol=0.1)


def test_activation_difference_is_what_it_says(tiny_saes, states, tiny_model):
    found = attribute(states, sites=tiny_model.sites, method="activation-difference")
    site = Site.parse("attn_1")
    sae, effects = tiny_saes[site], found.effects[site]
    f_clean, f_patch = sae.encode(states.clean[site]), sae.encode(states.patch[site])
    error = (states.patch[site] - sae.decode(f_patch)) - (states.clean[site] - sae.decode(f_clean))
    expected = torch.cat([(f_patch - f_clean).abs(), error.norm(dim=-1, keepdim=True)], -1) * states.mask[..., None]
    full = dense(effects, states.mask.shape)
    for row, real in enumerate(states.mask):
        assert_near(full[row, : real.sum()], expected[row, real])


@pytest.mark.parametrize("joint", [True, False])
def test_random_ranks_every_live_node_by_one_number(tiny_model, tiny_saes, states, joint):
    """Aggregated over examples (and positions) each node has its own normal number, whatever the batches."""
    options = {"sites": tiny_model.sites, "aggregation": "sum" if joint else "position"}
    found, other, again = (attribute(states, method="random", seed=seed, **options).effects for seed in (0, 1, 0))
    live = attribute(states, method="activation-difference", **options).effects
    for site in tiny_model.sites:
        assert as_set(found[site]) == as_set(live[site])
        assert torch.equal(found[site].value, again[site].value)
        assert not torch.equal(found[site].value, other[site].value)
    means = torch.cat([found[site].summed(8) if joint else found[site].by_position(8, 7).values() for site in found])
    drawn = means[means != 0]
    assert len(drawn) > 100
    assert abs(drawn.mean()) < 0.3
    assert 0.8 < drawn.std() < 1.2


# ---- neurons, and all methods at once


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_on_neurons(method, make_tiny_model, tiny_prompts):
    """The identity dictionary has no errors, and every method gives coordinates that differ their numbers."""
    model = make_tiny_model("llama")
    neurons = neuron_dictionaries(model)
    prompts = tiny_prompts[:2]
    states = capture_activations(Setting(model, neurons, logit_difference), prompts, sites=model.sites)
    result = attribute(states, sites=model.sites, method=method, max_rows=128)
    for site, effects in result.effects.items():
        assert effects.n_features == 32
        assert not (effects.feature == 32).any(), site
        assert len(effects.value) and torch.isfinite(effects.value).all()
    assert set(result.gradients) == set(model.sites)


def test_neurons_reconstruct_exactly(tiny_model):
    sites = [Site.parse("mlp_1"), Site.parse("attn_0")]
    neurons = neuron_dictionaries(tiny_model, sites=sites)
    assert list(neurons) == sorted(sites)
    x = torch.randn(3, 32)
    for site, sae in neurons.items():
        assert torch.equal(sae(x), x) and torch.equal(sae.encode(x), x)
        assert sae.config.site == site.name

"""Node effects against explicit splicing, the completeness identity and one-by-one patching."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from circuits.attribution.activation_patching import exact_effects
from circuits.attribution.activations import Setting, capture_activations, site_total_effect
from circuits.attribution.attribution_patching import attribution_patching
from circuits.attribution.effects import SiteEffects
from circuits.attribution.feature_effects import contract_gradient
from circuits.attribution.integrated_gradients import integrated_gradients, quadrature
from circuits.attribution.node_effects import attribute
from circuits.attribution.nodes import aggregate_site, positions_by, select_nodes
from circuits.metrics.metrics import logit_difference
from circuits.options import MethodOptions
from sae.errors import UserError
from sae.model.sites import Site
from tests.circuits.conftest import dense
from tests.near import assert_near

MODEL_FAMILIES = ("gpt2", "gpt_neox", "llama", "gemma2")


def left_aligned(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B, S, ...] with padding moved to the right and set to zero."""
    out = torch.zeros_like(x)
    for row, real in enumerate(mask):
        out[row, : real.sum()] = x[row, real]
    return out


def test_attribution_patching_is_the_gradient_of_spliced_leaves(tiny_model, tiny_saes, tiny_prompts, states):
    """Put f and e as leaves into the model at every site, pass gradients through to x, and multiply with the deltas."""
    leaves = {}

    def spliced(site):
        def edit(x):
            sae = tiny_saes[site]
            f = sae.encode(x.detach()).requires_grad_()
            e = (x.detach() - sae.decode(f.detach())).requires_grad_()
            leaves[site] = f, e
            made = sae.decode(f) + e
            return x + (made - made.detach())

        return edit

    edits = {site: spliced(site) for site in tiny_model.sites}
    run = tiny_model.run(tiny_prompts.clean, edits=edits, grad=True, last_only=True)
    logit_difference(run.logits[:, -1], tiny_prompts).sum().backward()
    result = attribute(states, sites=tiny_model.sites, method="attrib", max_rows=4)
    for site, (f, e) in leaves.items():
        sae, patch = tiny_saes[site], states.patch[site]
        f_patch = sae.encode(patch)
        of_features = f.grad * (f_patch - f.detach())
        of_error = (e.grad * (patch - sae.decode(f_patch) - e.detach())).sum(-1, keepdim=True)
        expected = left_aligned(torch.cat([of_features, of_error], -1), states.mask)
        assert_near(dense(result.effects[site], states.mask.shape), expected, msg=site)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", MODEL_FAMILIES)
def test_integrated_gradients_are_complete(make_tiny_model, make_saes, tiny_prompts, architecture):
    """The effects of a site add up to the measured effect of patching it, example by example, as nodes are added."""
    model, prompts = make_tiny_model(architecture), tiny_prompts[:4]
    saes = make_saes(model)
    states = capture_activations(Setting(model, saes, logit_difference), prompts, sites=model.sites)
    for site in model.sites:
        measured = site_total_effect(states, site=site)
        gap = {}
        for steps in (2, 40):
            gradient = integrated_gradients(states, site=site, steps=steps, max_rows=160)
            effects = contract_gradient(saes[site], states.clean[site], states.patch[site], gradient, mask=states.mask)
            gap[steps] = (effects.per_example(len(prompts)) - measured).abs().max()
        assert gap[40] < 2e-3 * measured.abs().max() + 1e-5, site
        assert gap[40] <= gap[2] + 1e-6


def test_patching_the_embedding_is_the_whole_effect(tiny_model, states):
    total = site_total_effect(states, site=Site("embed"))
    assert_near(total, states.m_patch - states.m_clean)


def test_chunks_of_rows_change_nothing(tiny_model, states):
    site = Site.parse("mlp_0")
    whole, parts = (integrated_gradients(states, site=site, steps=5, max_rows=rows) for rows in (1000, 8))
    assert_near(whole, parts)


def test_quadrature_rules_integrate_polynomials():
    for rule, degree in (("midpoint", 1), ("left-riemann", 0), ("gauss-legendre", 9)):
        nodes, weights = quadrature(rule, 5)
        integral = sum(w * a**degree for a, w in zip(nodes, weights, strict=True))
        assert integral == pytest.approx(1 / (degree + 1))
    with pytest.raises(UserError, match="did you mean 'midpoint'"):
        MethodOptions(rule="midpont")


@pytest.mark.slow
@pytest.mark.parametrize("joint", [True, False])
def test_exact_patching_is_a_loop_over_nodes(tiny_model, tiny_saes, tiny_prompts, joint):
    """Every (example, [position,] node) patched alone by a plain edit of the full model."""
    site = Site.parse("attn_1")
    sae, prompts = tiny_saes[site], tiny_prompts[:2]  # of both lengths
    states = capture_activations(Setting(tiny_model, {site: sae}, logit_difference), prompts, sites=[site])
    positions = positions_by("sum" if joint else "position", states.prompts)
    effects = exact_effects(states, site=site, positions=positions, max_rows=7)
    f_clean, f_patch = sae.encode(states.clean[site]), sae.encode(states.patch[site])
    e_delta = (states.patch[site] - sae.decode(f_patch)) - (states.clean[site] - sae.decode(f_clean))
    n_positions = states.mask.shape[1]
    padding = n_positions - states.mask.sum(1)
    assert len(effects.value) > 20
    assert (effects.feature == effects.n_features).any()
    rows = zip(*(getattr(effects, name).tolist() for name in ("example", "position", "feature", "value")), strict=True)
    for b, s, i, value in rows:
        change = torch.zeros(1, n_positions, tiny_model.d_model)
        at = slice(None) if joint else s + padding[b]
        is_error = i == effects.n_features
        change[0, at] = e_delta[b, at] if is_error else (f_patch - f_clean)[b, at, i, None] * sae.W_dec[i]
        x = states.clean[site][[b]] + change * states.mask[[b]][..., None]
        run = tiny_model.run(states.tokens[[b]], edits={site: lambda _, x=x: x}, last_only=True)
        answers = tiny_prompts.clean_answers[b], tiny_prompts.patch_answers[b]
        m = run.logits[0, -1, answers[1]] - run.logits[0, -1, answers[0]]
        assert value == pytest.approx((m - states.m_clean[b]).item(), abs=2e-5)


def test_exact_patching_of_chosen_nodes(tiny_model, tiny_saes, states):
    site = Site.parse("mlp_1")
    whole = exact_effects(states, site=site, positions=None)
    chosen = whole.feature.unique()[:3].long()
    some = exact_effects(states, site=site, positions=None, features=chosen)
    assert_near(some.summed(8)[chosen], whole.summed(8)[chosen])
    assert set(some.feature.tolist()) == set(chosen.tolist())


@pytest.mark.parametrize("name", ["mlp_0", "attn_1", "resid_1"])
def test_exact_patching_leaves_out_what_nothing_reads(tiny_model, tiny_saes, tiny_prompts, states, name):
    """In the last block the metric sees the last position alone: fewer rows, the same effects."""
    site = Site.parse(name)
    known = capture_activations(
        Setting(tiny_model, tiny_saes, logit_difference), tiny_prompts, sites=tiny_model.sites, gradient=True
    )
    for positions in (None, positions_by("position", states.prompts)):
        whole, fewer = (exact_effects(of, site=site, positions=positions) for of in (states, known))
        assert_near(fewer.summed(8), whole.summed(8))
        assert len(fewer.value) < len(whole.value) if site.layer == 1 else len(fewer.value) == len(whole.value)


def test_exact_and_gradient_agree_where_the_model_is_nearly_linear(tiny_model, tiny_saes, states):
    """At the last site only the final norm and the unembedding follow."""
    site = tiny_model.sites[-1]
    exact = exact_effects(states, site=site, positions=None).summed(8)
    gradient = attribution_patching(states, sites=[site])[site]
    estimate = contract_gradient(
        tiny_saes[site], states.clean[site], states.patch[site], gradient, mask=states.mask
    ).summed(8)
    assert torch.corrcoef(torch.stack([exact, estimate]))[0, 1] > 0.9


def test_without_patch_prompts_the_patch_state_is_zero(tiny_model, tiny_saes, tiny_prompts):
    prompts = replace(tiny_prompts, patch=None, patch_answers=None)
    site = Site.parse("resid_0")
    sae = copy.deepcopy(tiny_saes[site])
    sae.b_dec *= 50  # a layer norm is too curved near 0 for few quadrature nodes
    states = capture_activations(Setting(tiny_model, {site: sae}, logit_difference), prompts, sites=[site])
    gradient = integrated_gradients(states, site=site, steps=50)
    effects = contract_gradient(
        sae, states.clean[site], states.patch[site], gradient, mask=states.mask, zero_patch=states.zero_patch
    )
    f = sae.encode(states.clean[site])
    of_error = -((states.clean[site] - sae.decode(f)) * gradient).sum(-1, keepdim=True)
    expected = left_aligned(torch.cat([-f * (gradient @ sae.W_dec.T), of_error], -1), states.mask)
    assert_near(dense(effects, states.mask.shape), expected)
    measured = site_total_effect(states, site=site)
    assert torch.allclose(effects.per_example(8), measured, atol=5e-3 * measured.abs().max().item() + 1e-5)


def test_small_chunks_of_tokens_change_nothing(tiny_saes, states, monkeypatch):
    site = Site.parse("resid_1")
    args = (tiny_saes[site], states.clean[site], states.patch[site], torch.randn_like(states.clean[site]))
    whole = contract_gradient(*args, mask=states.mask)
    monkeypatch.setattr("circuits.attribution.effects.CHUNK_BYTES", 1)
    parts = contract_gradient(*args, mask=states.mask)
    assert_near(dense(whole, states.mask.shape), dense(parts, states.mask.shape))


def test_aggregation_and_selection():
    """Two examples, three features and the error (index 3), by hand."""
    effects = SiteEffects(
        3,
        example=torch.tensor([0, 0, 1, 1]),
        position=torch.tensor([0, 1, 1, 1]),
        feature=torch.tensor([0, 0, 2, 3]),
        value=torch.tensor([1.0, 3.0, -8.0, 2.0]),
    )
    summed = aggregate_site(effects, n_examples=2, n_positions=2, aggregation="sum")
    assert summed.ids(Site.parse("mlp_1")) == ["mlp_1/2", "mlp_1/0", "mlp_1/error"]
    assert summed.effect.tolist() == [-4.0, 2.0, 1.0]
    by_position = aggregate_site(effects, n_examples=2, n_positions=2, aggregation="position")
    assert by_position.ids(Site.parse("mlp_1")) == ["mlp_1/2@1", "mlp_1/0@1", "mlp_1/error@1", "mlp_1/0@0"]
    nodes = {Site.parse("mlp_1"): summed, Site.parse("attn_1"): by_position}
    assert sum(len(chosen) for chosen in select_nodes(nodes, top=3).values()) == 3
    assert [len(chosen) for chosen in select_nodes(nodes, threshold=1.5).values()] == [2, 1]


def test_the_gradient_of_the_capturing_run_is_that_of_attribution_patching(tiny_model, tiny_saes, tiny_prompts, states):
    sites = tiny_model.sites
    both = capture_activations(
        Setting(tiny_model, tiny_saes, logit_difference), tiny_prompts, sites=sites, gradient=True
    )
    gradients = attribution_patching(states, sites=sites)
    for site in sites:
        assert torch.equal(both.clean[site], states.clean[site]) and not both.clean[site].requires_grad
        assert_near(both.gradients[site], gradients[site])


def test_unknown_method_is_refused(tiny_model, tiny_saes, states):
    with pytest.raises(UserError, match="attrib"):
        attribute(states, sites=tiny_model.sites, method="atrib")


def test_nan_in_activations_names_the_site(make_tiny_model, make_saes, tiny_prompts):
    model = make_tiny_model("gpt_neox")
    model.hf.gpt_neox.layers[1].mlp.dense_4h_to_h.bias.data[0] = float("nan")
    with pytest.raises(UserError, match="mlp_1"):
        capture_activations(Setting(model, make_saes(model), logit_difference), tiny_prompts, sites=model.sites)

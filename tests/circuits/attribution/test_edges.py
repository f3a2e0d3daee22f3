"""Edges against finite differences through the cut model, for every kind of block, and against their own sums."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from circuits.attribution.activations import Setting, capture_activations
from circuits.attribution.attribution_patching import attribution_patching
from circuits.attribution.edges import cut_forward, edge_effects
from circuits.attribution.feature_effects import contract, contract_gradient
from circuits.attribution.node_effects import Attribution
from circuits.attribution.nodes import SiteNodes
from circuits.metrics.metrics import logit_difference
from sae.model.sites import Site
from tests.near import assert_near

MODEL_FAMILIES = ("gpt_neox", "llama", "gemma2")  # parallel, sequential, and with a norm behind each sublayer


def some_nodes(sae, *, n: int = 6, seed: int = 0, position: int = -1) -> SiteNodes:
    """A few features and the error node of a site."""
    width = sae.config.n_features
    feature = torch.randperm(width, generator=torch.Generator().manual_seed(seed))[:n].sort().values
    feature = torch.cat([feature, torch.tensor([width])])
    return SiteNodes(width, feature, torch.full_like(feature, position), torch.zeros(n + 1))


def setting(model, make_saes, prompts, **options):
    saes = make_saes(model, architecture="relu", **options)
    states = capture_activations(Setting(model, saes, logit_difference), prompts, sites=model.sites)
    gradients = attribution_patching(states, sites=model.sites)
    return saes, states, gradients


def computed_at_sites(model, states, changed: Site, x):
    """What every site computes when all others have their clean values and `changed` is put at x."""
    seen = {}

    def fixed(site):
        def edit(y):
            seen[site] = y
            return x if site == changed else states.clean[site]

        return edit

    model.run(states.tokens, edits={site: fixed(site) for site in model.sites}, last_only=True)
    return seen


def downstream_value(saes, states, gradients, y, down: Site, feature: int, where: str):
    """g_d . a_d summed over examples and positions, where the site computes y."""
    sae, real = saes[down], states.mask[..., None]
    active = sae.encode(states.clean[down]) != 0  # the encoder's kinks are not part of the derivative
    if where == "either":
        active |= sae.encode(states.patch[down]) != 0
    f = ((y - sae.b_dec) @ sae.W_enc.T + sae.b_enc) * active
    if feature < sae.config.n_features:
        return ((gradients[down] @ sae.W_dec[feature]) * (f * real)[..., feature]).sum()
    return (gradients[down] * (y - sae.decode(f)) * real).sum()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "active"), [*((architecture, "clean") for architecture in MODEL_FAMILIES), ("llama", "either")]
)
def test_edges_are_finite_differences_of_the_cut_model(make_tiny_model, make_saes, tiny_prompts, architecture, active):
    """Move one upstream node a little along its delta with every other site held at its clean value."""
    model = make_tiny_model(architecture, dtype="float64")
    saes, states, gradients = setting(model, make_saes, tiny_prompts[1::2])
    for sae in saes.values():
        sae.double()
    nodes = {site: some_nodes(saes[site], seed=i) for i, site in enumerate(model.sites)}
    edges = edge_effects(Attribution(states, gradients=gradients), nodes, active=active, max_rows=24)
    parallel = architecture == "gpt_neox"
    expected_pairs = {("resid_0", "attn_1"), ("resid_0", "mlp_1"), ("attn_1", "resid_1"), ("mlp_1", "resid_1")}
    expected_pairs |= {("resid_0", "resid_1"), ("embed", "attn_0"), ("embed", "mlp_0"), ("embed", "resid_0")}
    expected_pairs |= {("attn_0", "resid_0"), ("mlp_0", "resid_0"), ("resid_1", None)}
    expected_pairs |= set() if parallel else {("attn_0", "mlp_0"), ("attn_1", "mlp_1")}
    assert {(up.name, down and down.name) for up, down in edges} == expected_pairs
    h, runs = 1e-3, {}
    for (up, down), weights in edges.items():
        if down is None:
            continue
        sae = saes[up]
        f_clean, f_patch = sae.encode(states.clean[up]), sae.encode(states.patch[up])
        e_delta = (states.patch[up] - sae.decode(f_patch)) - (states.clean[up] - sae.decode(f_clean))
        scale = weights.abs().max().item()
        for column in (int(weights.abs().sum(0)[:-1].argmax()), weights.shape[1] - 1):
            u = int(nodes[up].feature[column])
            step = e_delta if u == sae.config.n_features else (f_patch - f_clean)[..., u, None] * sae.W_dec[u]
            if (up, u) not in runs:
                ends = [states.clean[up] + sign * h * step for sign in (1, -1)]
                runs[up, u] = [computed_at_sites(model, states, up, x) for x in ends]
            for row in (int(weights[:-1, column].abs().argmax()), weights.shape[0] - 1):
                d = int(nodes[down].feature[row])
                high, low = (
                    downstream_value(saes, states, gradients, seen[down], down, d, active) for seen in runs[up, u]
                )
                assert weights[row, column].item() == pytest.approx(
                    ((high - low) / (2 * h)).item(), rel=2e-3, abs=1e-3 * scale + 1e-6
                ), f"{up}/{u} -> {down}/{d}"


def test_lanes_change_nothing(tiny_model, make_saes, tiny_prompts):
    """One downstream node a backward pass, or all of them in one."""
    saes, states, gradients = setting(tiny_model, make_saes, tiny_prompts)
    nodes = {site: some_nodes(saes[site], seed=i) for i, site in enumerate(tiny_model.sites)}
    one, many = (edge_effects(Attribution(states, gradients=gradients), nodes, max_rows=rows) for rows in (8, 800))
    assert one.keys() == many.keys()
    for pair, weights in one.items():
        assert_near(weights, many[pair], msg=pair)


@pytest.mark.parametrize("active", ["clean", "either"])
@pytest.mark.parametrize("architecture", ["relu", "topk"])
def test_what_the_node_pass_keeps_changes_nothing(tiny_model, make_saes, tiny_prompts, architecture, active):
    """Edges from the node pass's codes and errors, without activations where the codes hold all, or from scratch."""
    saes = make_saes(tiny_model, architecture=architecture)
    states = capture_activations(
        Setting(tiny_model, saes, logit_difference), tiny_prompts, sites=tiny_model.sites, gradient=True
    )
    nodes = {site: some_nodes(saes[site], seed=i) for i, site in enumerate(tiny_model.sites)}
    inputs = {site: contract(states, states.gradients[site], site=site, active=active)[1] for site in saes}
    g = states.gradients
    fewer = replace(states, clean={}, patch={}) if architecture == "topk" else states
    batch = Attribution(fewer, gradients=g, edge_inputs=inputs)
    known = edge_effects(batch, nodes, active=active)
    scratch = edge_effects(Attribution(states, gradients=g), nodes, active=active)
    assert known.keys() == scratch.keys()
    for pair, weights in known.items():
        assert weights.abs().max() > 0
        assert_near(weights, scratch[pair], msg=pair)


@pytest.mark.parametrize("architecture", ["relu", "topk"])
@pytest.mark.parametrize("active", ["clean", "either"])
def test_the_errors_part_is_the_formula(tiny_model, make_saes, tiny_prompts, architecture, active, monkeypatch):
    """e_patch - e_clean and g - sum_active (W_dec[i] . g) W_enc[i] over all tokens, whatever is left out on the way."""
    saes = make_saes(tiny_model, architecture=architecture)
    states = capture_activations(
        Setting(tiny_model, saes, logit_difference), tiny_prompts, sites=tiny_model.sites, gradient=True
    )
    for site in (Site.parse("mlp_0"), tiny_model.sites[-1]):
        sae, g = saes[site], states.gradients[site]
        f_clean, f_patch = sae.encode(states.clean[site]), sae.encode(states.patch[site])
        on = (f_clean != 0) | (f_patch != 0) if active == "either" else f_clean != 0
        live = states.live(site, g)[..., None]
        delta = (states.patch[site] - sae.decode(f_patch) - states.clean[site] + sae.decode(f_clean)) * live
        cotangent = (g - ((g @ sae.W_dec.T) * on) @ sae.W_enc) * live
        assert live.sum() == (states.mask[:, 1:].sum() - 4 if site.name == "mlp_0" else len(states.mask))
        for share in (0.0, 1.0):
            monkeypatch.setattr("circuits.attribution.feature_effects.SPARSE", share)
            effects, inputs = contract(states, g, site=site, active=active)
            torch.testing.assert_close(inputs.error_delta, delta, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(inputs.error_cotangent, cotangent, atol=1e-5, rtol=1e-4)
            expected = ((f_patch - f_clean) * (g @ sae.W_dec.T)).sum((0, 1))
            torch.testing.assert_close(effects.summed(1)[:-1], expected, atol=1e-5, rtol=1e-4)


def test_edges_of_a_batch_are_the_sum_over_its_examples(tiny_model, make_saes, tiny_prompts):
    """Examples do not interact; left padding of the shorter ones changes nothing either."""
    prompts = tiny_prompts[:3]
    saes, states, gradients = setting(tiny_model, make_saes, prompts)
    nodes = {site: some_nodes(saes[site], seed=i) for i, site in enumerate(tiny_model.sites)}
    batch = edge_effects(Attribution(states, gradients=gradients), nodes)
    total = {pair: torch.zeros_like(weights) for pair, weights in batch.items()}
    for row in range(len(prompts)):
        alone = capture_activations(Setting(tiny_model, saes, logit_difference), prompts[[row]], sites=tiny_model.sites)
        g = attribution_patching(alone, sites=tiny_model.sites)
        for pair, weights in edge_effects(Attribution(alone, gradients=g), nodes).items():
            total[pair] += weights
    for pair, weights in batch.items():
        assert torch.allclose(weights, total[pair], atol=2e-5), pair


def test_edges_to_the_metric_of_the_last_site_are_its_effects(tiny_model, make_saes, tiny_prompts):
    saes, states, gradients = setting(tiny_model, make_saes, tiny_prompts)
    last = tiny_model.sites[-1]
    nodes = {site: some_nodes(saes[site], seed=i) for i, site in enumerate(tiny_model.sites)}
    edges = edge_effects(Attribution(states, gradients=gradients), nodes)
    effects = contract_gradient(saes[last], states.clean[last], states.patch[last], gradients[last], mask=states.mask)
    expected = effects.summed(1)[nodes[last].feature]
    assert_near(edges[last, None][0], expected)
    assert [pair for pair in edges if pair[1] is None] == [(last, None)]


def test_without_residual_sites_every_site_reaches_the_metric(tiny_model, make_saes, tiny_prompts):
    """Missing sites: the residual stream then carries every path between the sites that are there."""
    sites = [Site.parse(name) for name in ("mlp_0", "attn_1", "mlp_1")]
    saes = {site: sae for site, sae in make_saes(tiny_model, architecture="relu").items() if site in sites}
    states = capture_activations(Setting(tiny_model, saes, logit_difference), tiny_prompts, sites=sites)
    gradients = attribution_patching(states, sites=sites)
    nodes = {site: some_nodes(saes[site], seed=i) for i, site in enumerate(sites)}
    edges = edge_effects(Attribution(states, gradients=gradients), nodes)
    names = {(up.name, down and down.name) for up, down in edges}
    assert names == {("mlp_0", "attn_1"), ("mlp_0", "mlp_1"), ("mlp_0", None), ("attn_1", None), ("mlp_1", None)}


def test_the_cut_model_computes_the_same(tiny_model, tiny_saes, tiny_prompts):
    """Cutting changes no value: outputs are the clean activations, the metric is the clean metric."""
    states = capture_activations(Setting(tiny_model, tiny_saes, logit_difference), tiny_prompts, sites=tiny_model.sites)
    graph = cut_forward(states, sites=tiny_model.sites, copies=2)
    for site, x in states.clean.items():
        assert_near(graph.outputs[site], x.repeat(2, 1, 1))
    assert_near(graph.m, states.m_clean.repeat(2))

"""Transcoders at the MLPs and autoencoders elsewhere in one circuit: sums of effects, and edges by three oracles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from circuits.attribution.activation_patching import exact_effects
from circuits.attribution.activations import Setting, capture_activations, site_total_effect
from circuits.attribution.attribution_patching import attribution_patching
from circuits.attribution.edges import edge_effects
from circuits.attribution.node_effects import Attribution, attribute
from circuits.attribution.nodes import SiteNodes
from circuits.attribution.path_patching import path_effects
from circuits.metrics.metrics import logit_difference
from sae.autoencoder import SAEConfig, SparseAutoencoder
from sae.folding import fold_norms
from sae.model.load import load_model
from sae.model.sites import Site
from sae.neurons import mlp_neuron_dictionaries
from sae.saes import SAEs
from tests.conftest import tiny_hf, word_tokenizer
from tests.near import assert_near

MLP_0, MLP_1 = Site("mlp", 0), Site("mlp", 1)


def mixed(model, make_saes, *, architecture="relu", read="mlp_in", skip=True) -> SAEs:
    """Random autoencoders, and at the MLPs random transcoders with a skip connection."""
    saes = dict(make_saes(model, architecture=architecture))
    for site in (MLP_0, MLP_1):
        sae = saes[site]
        config = replace(sae.config, read=read, subtract_b_dec=False)
        generator = torch.Generator().manual_seed(site.layer)
        tensors = dict(sae.named_buffers())
        tensors |= {"W_skip": 0.2 * torch.randn(32, 32, generator=generator)} if skip else {}
        saes[site] = SparseAutoencoder(config, tensors)
    return SAEs(saes)


def clean_states(model, saes, prompts):
    states = capture_activations(Setting(model, saes, logit_difference), prompts, sites=model.sites)
    return states, attribution_patching(states, sites=model.sites)


def nodes_of(sae, *, n=5, seed=0) -> SiteNodes:
    """A few features, the error node, and the skip connection's if there is one."""
    width = sae.config.n_features
    feature = torch.randperm(width, generator=torch.Generator().manual_seed(seed))[:n].sort().values
    feature = torch.cat([feature, width + torch.arange(2 if sae.has_skip else 1)])
    return SiteNodes(width, feature, torch.full_like(feature, -1), torch.zeros(len(feature)))


@pytest.mark.parametrize(("architecture", "zero_patch"), [("relu", False), ("topk", False), ("jumprelu", True)])
def test_features_skip_and_error_add_up_to_the_site(tiny_model, make_saes, tiny_prompts, architecture, zero_patch):
    """Integrated gradients to m with the site patched, attribution patching to the change along the gradient."""
    prompts = replace(tiny_prompts, patch=None) if zero_patch else tiny_prompts
    saes = mixed(tiny_model, make_saes, architecture=architecture)
    states, gradients = clean_states(tiny_model, saes, prompts)
    attrib = attribute(states, method="attrib", sites=[MLP_0, MLP_1])
    ig = attribute(states, method="ig", steps=40, sites=[MLP_1])
    for site, effects in attrib.effects.items():
        assert {saes[site].config.n_features, saes[site].config.n_features + 1} < set(effects.feature.tolist())
        along = ((states.patch[site] - states.clean[site]) * gradients[site] * states.mask[..., None]).sum((1, 2))
        assert_near(effects.per_example(len(prompts)), along)
    assert_near(ig.effects[MLP_1].per_example(len(prompts)), site_total_effect(states, site=MLP_1), 1e-3)


def node_value(sae, gradient, real, active, y, x_read, feature):
    """g_d . a_d summed over examples and positions, from what a site writes and what its dictionary reads."""
    f = (x_read @ sae.W_enc.T + sae.b_enc - (sae.W_enc @ sae.b_dec if sae.config.subtract_b_dec else 0)) * active
    width = sae.config.n_features
    if feature < width:
        return ((gradient @ sae.W_dec[feature]) * (f * real)[..., feature]).sum()
    skip = x_read @ sae.W_skip.T if sae.has_skip else torch.zeros_like(y)
    return (gradient * (skip if feature > width else y - sae.decode(f) - skip) * real).sum()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "read"), [("gpt_neox", "mlp_norm"), ("gemma2", "mlp_resid")])
def test_edges_are_finite_differences_of_the_cut_model(make_tiny_model, make_saes, tiny_prompts, family, read):
    """One upstream node moves a little along its delta, every other site held at its clean value."""
    model = make_tiny_model(family, dtype="float64")
    saes = mixed(model, make_saes, read=read)
    for sae in saes.values():
        sae.double()
    states, gradients = clean_states(model, saes, tiny_prompts[1::2])
    nodes = {site: nodes_of(saes[site], seed=i) for i, site in enumerate(model.sites)}
    edges = edge_effects(Attribution(states, gradients=gradients), nodes, active="clean", max_rows=24)
    reads, real = saes.read_sites(saes), states.mask[..., None]
    into_mlp = {(up.name, down.name) for up, down in edges if down == MLP_1}
    assert into_mlp == {("resid_0", "mlp_1")} | (set() if family == "gpt_neox" else {("attn_1", "mlp_1")})

    def moved(up, x, down, feature):
        clean = {site: states.clean[site] for site in model.sites if site < down} | {up: x}
        seen = {}

        def fixed(site):
            return lambda y: seen.setdefault(site, y) if site not in clean else clean[site]

        run = model.run(
            states.tokens, edits={site: fixed(site) for site in model.sites}, capture=[reads[down]], last_only=True
        )
        active = saes[down].encode(states.clean[reads[down]]) != 0
        y = seen[down]
        x_read = y if reads[down] == down else run.activations[reads[down]]
        return node_value(saes[down], gradients[down], real, active, y, x_read, feature)

    h = 1e-3
    pairs = [pair for pair in edges if (pair[1] is not None and MLP_0 in pair) or MLP_1 in pair]
    for up, down in (pair for pair in pairs if pair[1] is not None):
        weights, sae, read_up = edges[up, down], saes[up], reads[up]
        f_clean, f_patch = sae.encode(states.clean[read_up]), sae.encode(states.patch[read_up])
        dx, dx_read = states.patch[up] - states.clean[up], states.patch[read_up] - states.clean[read_up]
        skip = sae.skip(dx_read) if sae.has_skip else torch.zeros_like(dx)
        for column in {int(weights.abs().sum(0)[:5].argmax()), *range(5, weights.shape[1])}:
            u = int(nodes[up].feature[column])
            error = dx - (f_patch - f_clean) @ sae.W_dec - skip
            step = {48: error, 49: skip}.get(u, (f_patch - f_clean)[..., u % 48, None] * sae.W_dec[u % 48])
            for row in {int(weights[:5, column].abs().argmax()), *range(5, weights.shape[0])}:
                d = int(nodes[down].feature[row])
                high, low = (moved(up, states.clean[up] + sign * h * step, down, d) for sign in (1, -1))
                assert float(weights[row, column]) == pytest.approx(
                    float(high - low) / (2 * h), rel=2e-3, abs=1e-3 * float(weights.abs().max()) + 1e-6
                ), f"{up}/{u} -> {down}/{d}"


def test_neurons_of_a_plain_mlp_have_no_error_and_its_jacobian(tiny_prompts):
    """y = relu(x A + a) B + b: with W_enc = A and W_dec = B edges into the features add up to the model's gradient."""
    hf = tiny_hf("gpt2")
    for block in hf.transformer.h:
        block.mlp.act = torch.nn.ReLU()
    model = load_model(hf, tokenizer=word_tokenizer(), device="cpu")
    saes = {}
    for site, block in zip((MLP_0, MLP_1), hf.transformer.h, strict=True):
        mlp = block.mlp
        tensors = {"W_enc": mlp.c_fc.weight.T, "b_enc": mlp.c_fc.bias, "W_dec": mlp.c_proj.weight,
                   "b_dec": mlp.c_proj.bias}  # fmt: skip
        config = SAEConfig("relu", 32, 64, str(site), subtract_b_dec=False, read="mlp_in")
        saes[site] = SparseAutoencoder(config, fold_norms(tensors))
    setting = Setting(model, SAEs(saes), logit_difference)
    states = capture_activations(setting, tiny_prompts, sites=[MLP_0, MLP_1])
    gradients = attribution_patching(states, sites=[MLP_0, MLP_1])
    effects = attribute(states, method="attrib").effects
    of_error = [effects[site].value[effects[site].feature == 64].abs().max() for site in saes]
    assert max(of_error) < 1e-4 * max(effects[site].value.abs().max() for site in saes)
    every = torch.arange(64)
    nodes = {site: SiteNodes(64, every, torch.full((64,), -1), torch.zeros(64)) for site in saes}
    edges = edge_effects(Attribution(states, gradients=gradients), nodes, active="clean")[MLP_0, MLP_1]  # [D, U]

    leaf = {}

    def cut(x):
        leaf[0] = x.detach().requires_grad_()
        return leaf[0]

    run = model.run(states.tokens, edits={MLP_0: cut}, capture=[MLP_1], grad=True)
    y, real = run.activations[MLP_1], states.mask[..., None]
    (jacobian,) = torch.autograd.grad(y, leaf[0], gradients[MLP_1] * real)
    f_delta = saes[MLP_0].encode(states.patch[Site("mlp_in", 0)]) - saes[MLP_0].encode(states.clean[Site("mlp_in", 0)])
    expected = ((jacobian @ saes[MLP_0].W_dec.T) * f_delta * real).sum((0, 1))
    assert_near(edges.sum(0), expected)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_hidden_neurons_have_no_error_and_add_up_to_the_site(make_tiny_model, tiny_prompts, family):
    """Gated, without a norm behind the MLP and with one; edges run from neurons to neurons."""
    model = make_tiny_model(family)
    saes = mlp_neuron_dictionaries(model)
    states = capture_activations(Setting(model, saes, logit_difference), tiny_prompts)
    result = attribute(states, method="attrib")
    for site, effects in result.effects.items():
        assert int(effects.feature.max()) < saes[site].config.n_features == 64
        change = (states.patch[site] - states.clean[site]) * states.mask[..., None]
        assert_near(effects.per_example(len(tiny_prompts)), (change * result.gradients[site]).sum((1, 2)))
    every = torch.arange(64)
    nodes = {site: SiteNodes(64, every, torch.full((64,), -1), torch.zeros(64)) for site in saes}
    assert edge_effects(result, nodes)[MLP_0, MLP_1].abs().max() > 0


def written_part(sae, y, x_read, feature):
    """What a node of a transcoder adds to x, [B, S, d], where the MLP writes y and the transcoder reads x_read."""
    f, skip, width = sae.encode(x_read), x_read @ sae.W_skip.T, sae.config.n_features
    if feature < width:
        return f[..., feature, None] * sae.W_dec[feature]
    return skip if feature > width else y - sae.decode(f) - skip


def test_path_patching_between_transcoders_is_two_plain_runs(make_tiny_model, make_saes, tiny_prompts):
    """From features, error and skip connection of one MLP to those of the next, and to the metric."""
    model = make_tiny_model("gpt2")
    saes = SAEs({site: sae for site, sae in mixed(model, make_saes).items() if site in (MLP_0, MLP_1)})
    prompts = tiny_prompts[:3]
    states = capture_activations(Setting(model, saes, logit_difference), prompts)
    nodes = {site: nodes_of(saes[site], n=3) for site in saes}
    edges = path_effects(states, nodes)
    exact = exact_effects(states, site=MLP_1, positions=None, features=nodes[MLP_1].feature).summed(1)
    assert_near(edges[MLP_1, None][0], exact[nodes[MLP_1].feature])

    real, (read_0, read_1) = states.mask[..., None], saes.read_sites(saes).values()
    between = edges[MLP_0, MLP_1]  # [D, U]
    expected = torch.zeros_like(between)
    for column, up in enumerate(nodes[MLP_0].feature.tolist()):
        before, after = (written_part(saes[MLP_0], run[MLP_0], run[read_0], up) for run in (states.clean, states.patch))
        x = states.clean[MLP_0] + (after - before) * real
        run = model.run(states.tokens, edits={MLP_0: lambda y, x=x: x}, capture=[MLP_1, read_1])
        y, x_read = run.activations[MLP_1], run.activations[read_1]
        for row, down in enumerate(nodes[MLP_1].feature.tolist()):
            change = written_part(saes[MLP_1], y, x_read, down)
            change = (change - written_part(saes[MLP_1], states.clean[MLP_1], states.clean[read_1], down)) * real
            edit = {MLP_1: lambda y, change=change: states.clean[MLP_1] + change}
            m = logit_difference(model.run(states.tokens, edits=edit).logits[:, -1], prompts)
            expected[row, column] = (m - states.m_clean).sum()
    assert_near(between, expected, 1e-3)
    assert (between.abs().amax(0)[-2:] > 0.01 * between.abs().max()).all()  # of the error and the skip connection
    assert (between.abs().amax(1)[-2:] > 0.01 * between.abs().max()).all()  # and into them

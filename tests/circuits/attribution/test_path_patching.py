"""Exact edges against a loop over single edges, against the derivative they tend to, and on circuits known by
construction.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from circuits.attribution.activations import Setting, capture_activations
from circuits.attribution.attribution_patching import attribution_patching
from circuits.attribution.edges import edge_effects
from circuits.attribution.node_effects import Attribution
from circuits.attribution.nodes import SiteNodes
from circuits.attribution.path_patching import path_effects
from circuits.metrics.metrics import logit_difference
from sae.model.sites import Site
from tests.circuits.attribution.test_ground_truth import TASKS, edge_scores, found, setting
from tests.circuits.ground_truth import recovery


def some_nodes(saes, *, n: int = 2, position: int = -1):
    """A few features and the error node of every site."""
    nodes = {}
    for seed, (site, sae) in enumerate(saes.items()):
        width = sae.config.n_features
        feature = torch.randperm(width, generator=torch.Generator().manual_seed(seed))[:n]
        feature = torch.cat([feature, torch.tensor([width])])
        nodes[site] = SiteNodes(width, feature, torch.full_like(feature, position), torch.zeros(n + 1))
    return nodes


def change(sae, clean, other, feature: int, at):
    """What the node adds to x when the site has `other` in place of `clean`."""
    f, f_other = sae.encode(clean), sae.encode(other)
    if feature < sae.config.n_features:
        return (f_other - f)[..., feature, None] * sae.W_dec[feature] * at
    return ((other - sae.decode(f_other)) - (clean - sae.decode(f))) * at


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "position"), [("gpt_neox", -1), ("llama", 6)])
def test_every_edge_is_two_plain_runs(make_tiny_model, make_saes, tiny_prompts, architecture, position):
    model = make_tiny_model(architecture)
    saes = make_saes(model, architecture="relu")
    prompts = tiny_prompts[1::2]
    states = capture_activations(Setting(model, saes, logit_difference), prompts, sites=model.sites)
    nodes = some_nodes(saes, position=position)
    edges = path_effects(states, nodes, max_rows=7)
    at = states.mask[..., None].clone()
    if position >= 0:
        at &= (torch.arange(at.shape[1]) == position)[None, :, None]
    checked = 0
    for up, down in [("embed", "attn_0"), ("resid_0", "mlp_1"), ("mlp_1", "resid_1"), ("attn_0", None)]:
        up, down = Site.parse(up), down and Site.parse(down)
        for column, u in enumerate(nodes[up].feature.tolist()):
            moved = states.clean[up] + change(saes[up], states.clean[up], states.patch[up], u, at)
            pins = {site: (lambda y, value=value: value) for site, value in states.clean.items()}
            pins[up] = lambda y, moved=moved: moved
            if down is None:
                logits = model.run(prompts.clean, edits=pins).logits[:, -1]
                expected = [(logit_difference(logits, prompts) - states.m_clean).sum()]
            else:
                seen = []
                pins[down] = lambda y, seen=seen: seen.append(y) or y
                model.run(prompts.clean, edits=pins)
                expected = []
                for d in nodes[down].feature.tolist():
                    x = states.clean[down] + change(saes[down], states.clean[down], seen[0], d, at)
                    logits = model.run(prompts.clean, edits={down: lambda y, x=x: x}).logits[:, -1]
                    expected.append((logit_difference(logits, prompts) - states.m_clean).sum())
            assert torch.allclose(edges[up, down][:, column], torch.stack(expected), atol=2e-5)
            checked += int((torch.stack(expected).abs() > 1e-4).sum())
    assert checked > 3


@pytest.mark.slow
def test_small_steps_give_the_edge_weights(make_tiny_model, make_saes, tiny_prompts):
    """With the patch end moved to a thousandth of the way, exact edges are those of attribution patching."""
    model = make_tiny_model("gpt2", dtype="float64")
    saes = make_saes(model, architecture="relu")
    for sae in saes.values():
        sae.double()
    states = capture_activations(Setting(model, saes, logit_difference), tiny_prompts[1::2], sites=model.sites)
    h = 1e-4
    near = {site: clean + h * (states.patch[site] - clean) for site, clean in states.clean.items()}
    states = replace(states, patch=near)
    nodes = some_nodes(saes)
    gradients = attribution_patching(states, sites=model.sites)
    batch = Attribution(states, gradients=gradients)
    estimated = edge_effects(batch, nodes, active="clean")
    exact = path_effects(states, nodes)
    assert set(estimated) <= set(exact)
    for pair, weights in estimated.items():
        assert torch.allclose(exact[pair].double(), weights.double(), atol=2e-4 * h, rtol=2e-3), pair
    assert all(exact[pair].abs().max() < 1e-9 for pair in set(exact) - set(estimated))


def test_without_a_patch_prompt_features_go_to_zero(tiny_model, tiny_saes, tiny_prompts):
    prompts = replace(tiny_prompts[1::2], patch=None)
    states = capture_activations(Setting(tiny_model, tiny_saes, logit_difference), prompts, sites=tiny_model.sites)
    site, down = Site.parse("resid_0"), Site.parse("resid_1")
    sae = tiny_saes[site]
    f = sae.encode(states.clean[site])
    feature = int(f.sum((0, 1)).argmax())
    one = torch.tensor([feature])
    nodes = {site: SiteNodes(sae.config.n_features, one, torch.tensor([-1]), torch.zeros(1))}
    none = torch.zeros(0, dtype=torch.long)
    nodes[down] = SiteNodes(sae.config.n_features, none, none, torch.zeros(0))
    edges = path_effects(states, nodes)
    without = states.clean[site] - f[..., feature, None] * sae.W_dec[feature] * states.mask[..., None]
    pins = {site: lambda y: without, down: lambda y: states.clean[down]}
    logits = tiny_model.run(prompts.clean, edits=pins).logits[:, -1]
    expected = (logit_difference(logits, prompts) - states.m_clean).sum()
    assert edges[site, None].item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_exact_edges_recover_a_circuit_known_by_construction(task):
    """Between the true nodes and twice as many others."""
    truth, circuit = setting(task), found(task)
    nodes = circuit.strongest(3 * len(truth.nodes))
    states = capture_activations(Setting(truth.model, truth.saes, logit_difference), truth.prompts, sites=list(nodes))
    edges = path_effects(states, nodes)
    scores = edge_scores(replace(circuit, edge_nodes=nodes, edges=edges))
    between = [edge for edge in scores if not any("error" in end for end in edge)]
    result = recovery(scores, truth.edges, between)
    assert result.auroc >= 0.99
    assert result.precision_at_truth >= 0.9

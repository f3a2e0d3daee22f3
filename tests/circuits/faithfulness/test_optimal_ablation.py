"""Optimal constants: against their closed forms in a linear model, and never worse than means in a transformer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from circuits.attribution.activations import Setting
from circuits.attribution.nodes import SiteNodes, select_nodes
from circuits.discovery.discover import discover
from circuits.faithfulness.ablation import AblationValues, NodeTable
from circuits.faithfulness.learned_mask import MaskOptions, learn_node_mask
from circuits.faithfulness.nodes import FaithfulnessOptions, from_start_site, measure_faithfulness
from circuits.faithfulness.optimal_ablation import (
    FitOptions,
    ablation_values,
    both_ends,
    fit_optimal_values,
    mean_divergence,
)
from circuits.metrics.metrics import logit_difference
from circuits.options import DiscoverOptions
from circuits.prompts.dataset import PromptSet
from sae.autoencoder import SAEConfig, SparseAutoencoder
from sae.model.language_model import Tokens
from sae.model.sites import Site
from tests.circuits.faithfulness.test_learned_mask import every_node

EMBED = Site("embed")


class LinearModel:
    """logits = U E[token] at every position: a language model without context."""

    def __init__(self, embedding, unembedding) -> None:
        self.E, self.U, self.device = embedding, unembedding, torch.device("cpu")

    def run(self, tokens, *, edits=None, capture=(), **_):
        x = self.E[tokens.input_ids]
        x = (edits or {}).get(EMBED, lambda x: x)(x)
        return SimpleNamespace(activations=dict.fromkeys(capture, x), logits=x @ self.U.T)


@pytest.fixture(scope="module")
def linear():
    """(model, dictionary, prompts): 12 tokens in width 5, 4 logits, two features (axes 0 and 1) and an error."""
    draw = torch.Generator().manual_seed(3)
    model = LinearModel(torch.randn(12, 5, generator=draw), 2 * torch.randn(4, 5, generator=draw))
    decoder = torch.eye(2, 5)
    tensors = {"W_enc": decoder, "b_enc": torch.zeros(2), "W_dec": decoder, "b_dec": torch.zeros(5)}
    sae = SparseAutoencoder(SAEConfig(architecture="identity", d_model=5, n_features=2, site="embed"), tensors)
    ids = torch.arange(12)[:, None]
    prompts = PromptSet(
        Tokens(ids[:6], torch.ones_like(ids[:6])), Tokens(ids[6:], torch.ones_like(ids[6:])),
        torch.zeros(6, dtype=torch.long), torch.ones(6, dtype=torch.long), ["a"] * 6, ["t"] * 6, [""] * 6,
    )  # fmt: skip
    return model, {EMBED: sae}, prompts


def fitted(linear, circuits, steps=250):
    model, saes, prompts = linear
    nodes = every_node(saes)
    values = AblationValues(
        Setting(model, saes, logit_difference), NodeTable(saes, [nodes], sites=[EMBED]), "optimal", reference=prompts
    )
    return values, fit_optimal_values(
        values, circuits, prompts, FitOptions(steps=steps, learning_rate=0.1), progress=False
    )


@pytest.mark.slow
def test_the_best_constant_prediction_is_the_mean_distribution(linear):
    """No node kept: the fitted x0 says mean M(x), the loss is the mean divergence from it; the mean x0 says neither."""
    model, _saes, prompts = linear
    means, optimal = fitted(linear, [({}, True)])
    p = (model.E @ model.U.T).softmax(-1)  # clean and patch prompts together are the 12 tokens
    mixture = p.mean(0)
    said = (optimal.tables[EMBED].x[0] @ model.U.T).softmax(-1)
    torch.testing.assert_close(said, mixture, atol=2e-3, rtol=0)
    floor = (p * (p / mixture).log()).sum(-1).mean().item()
    assert mean_divergence(optimal, [({}, True)], prompts) == pytest.approx(floor, abs=1e-3)
    assert mean_divergence(means, [({}, True)], prompts) > floor + 0.05


@pytest.mark.slow
def test_constants_of_a_circuit_by_brute_force(linear):
    """One feature kept and the error ablated: the rest of x0 that torch's L-BFGS finds in the model written out."""
    model, _saes, prompts = linear
    kept = {EMBED: SiteNodes(2, torch.tensor([0]), torch.tensor([-1]), torch.ones(1))}
    _, optimal = fitted(linear, [(kept, True)])
    log_p = (model.E @ model.U.T).log_softmax(-1)
    rest = torch.zeros(5, requires_grad=True)
    first = torch.eye(5)[0]

    def loss():
        x = model.E[:, :1] * first + rest * (1 - first)
        return (log_p.exp() * (log_p - (x @ model.U.T).log_softmax(-1))).sum(-1).mean()

    solver = torch.optim.LBFGS([rest], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        value = loss()
        value.backward()
        return value

    solver.step(closure)
    assert mean_divergence(optimal, [(kept, True)], prompts) == pytest.approx(loss().item(), abs=2e-3)


def test_every_node_kept_is_the_model_whatever_the_constants(linear):
    _model, saes, prompts = linear
    whole = every_node(saes)
    one = {EMBED: SiteNodes(2, torch.tensor([0]), torch.tensor([-1]), torch.ones(1))}
    _, optimal = fitted(linear, [({}, True), (one, True), (one, False)], steps=20)
    assert optimal.tables[EMBED].features.sub(optimal.means[EMBED].features).abs().min() > 0.01
    assert mean_divergence(optimal, [(whole, True)], prompts) == pytest.approx(0, abs=1e-6)
    assert mean_divergence(optimal, [(whole, False)], prompts) > 0.01


def test_the_reference_of_both_ends_is_the_model_after_each(tiny_model, tiny_prompts):
    ends = both_ends(tiny_prompts, tiny_model, batch_size=3)
    assert len(ends) == 2 * len(tiny_prompts) and ends.templates == tiny_prompts.templates * 2
    after = tiny_model.run(tiny_prompts.patch, last_only=True).logits[:, -1].log_softmax(-1)
    torch.testing.assert_close(ends.reference[len(tiny_prompts) :], after, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def nodes(tiny_model, tiny_saes, tiny_prompts):
    options = DiscoverOptions(method="attrib", edge_nodes=0)
    return discover(tiny_model, tiny_saes, tiny_prompts, options, progress=False).nodes


@pytest.mark.slow
@pytest.mark.parametrize("errors", ["nodes", "ablate"])
def test_faithfulness_with_optimal_constants(tiny_model, tiny_saes, tiny_prompts, nodes, errors, monkeypatch):
    """Nearer to the whole model than with means; m of the empty circuit is that of the same constants."""
    monkeypatch.setattr("circuits.faithfulness.optimal_ablation.FitOptions", partial(FitOptions, steps=15))
    nodes = from_start_site(nodes, "mlp_1")
    options = FaithfulnessOptions(ablation="optimal", errors=errors, random=1, resamples=0, batch_size=8)
    result = measure_faithfulness(
        Setting.of(tiny_model, tiny_saes), nodes, tiny_prompts, options, sizes=[10, 40], progress=False
    )
    assert result.ablation == "optimal" and result.gain.optimal < result.gain.means
    if errors == "nodes":
        circuits = [({}, True), *((select_nodes(nodes, top=size), True) for size in (10, 40))]
        values = ablation_values(
            Setting(tiny_model, tiny_saes, logit_difference),
            "optimal",
            circuits,
            nodes=nodes,
            reference=tiny_prompts,
            batch_size=8,
            progress=False,
        )
        clean = replace(tiny_prompts, patch=None, patch_answers=None)
        assert mean_divergence(values, circuits, clean) == pytest.approx(result.gain.optimal, abs=1e-4)


@pytest.mark.slow
def test_masks_learned_with_their_constants(tiny_model, tiny_saes, tiny_prompts, nodes):
    options = MaskOptions(steps=3, batch_size=4, smallest=5, ablation="optimal")
    mask = learn_node_mask(Setting.of(tiny_model, tiny_saes), nodes, tiny_prompts, options, progress=False)
    assert mask.options["ablation"] == "optimal" and len(mask.losses) == 3

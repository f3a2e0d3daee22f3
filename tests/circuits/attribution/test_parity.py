"""Against recorded outputs of the paper's own code, on the same weights, SAEs and prompts (recorded/feature_circuits).

Where that code does not do what it means to, the recorded values are the intended ones, or the deviation is put into
the test:
1. its integrated gradients are compared in the variant whose metric reads the interpolated runs (`nodes_ig`);
2. its attribution patching lets the gradient pass through the SAE at mlp sites, so the test does that there, by an
   edit;
3. its edges out of error nodes are always zero, so features are compared with it and error columns with their formula.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from circuits.attribution.activations import Setting, capture_activations
from circuits.attribution.attribution_patching import attribution_patching
from circuits.attribution.edges import cut_forward, edge_effects
from circuits.attribution.feature_effects import contract_gradient
from circuits.attribution.integrated_gradients import integrated_gradients
from circuits.attribution.node_effects import Attribution, attribute
from circuits.attribution.nodes import SiteNodes
from circuits.metrics.metrics import logit_difference
from circuits.prompts.dataset import PromptSet
from sae.autoencoder import SAEConfig, SparseAutoencoder
from sae.model.language_model import Tokens
from sae.model.load import load_model
from sae.model.sites import Site

RECORDED = Path(__file__).resolve().parents[1] / "recorded" / "feature_circuits"
TOLERANCE = 1e-4  # relative L2 error; the arithmetic is float32 on both sides


@pytest.fixture(scope="module")
def recorded():
    """The recorded files by name."""
    files = {path.stem: load_file(path) for path in RECORDED.glob("*.safetensors")}
    return files | {"config": json.loads((RECORDED / "config.json").read_text())}


@pytest.fixture(scope="module")
def model(recorded):
    config = GPTNeoXConfig(**{key: value for key, value in recorded["config"].items() if key != "transformers_version"})
    hf = GPTNeoXForCausalLM(config)
    head = next(name for name in hf.state_dict() if name in ("embed_out.weight", "lm_head.weight"))
    weights = {head if name == "embed_out.weight" else name: value for name, value in recorded["model"].items()}
    hf.load_state_dict(weights)
    return load_model(hf.eval(), device="cpu")


@pytest.fixture(scope="module")
def saes(recorded, model):
    tensors = recorded["saes"]
    return {
        site: SparseAutoencoder(
            SAEConfig(architecture="relu", d_model=32, n_features=64, site=site.name),
            {
                "W_enc": tensors[f"{site}.encoder.weight"],
                "b_enc": tensors[f"{site}.encoder.bias"],
                "W_dec": tensors[f"{site}.decoder.weight"].T,
                "b_dec": tensors[f"{site}.bias"],
            },
        )
        for site in model.sites
    }


@pytest.fixture(scope="module")
def prompts(recorded):
    inputs = recorded["inputs"]
    n = len(inputs["clean"])
    ones = torch.ones_like(inputs["clean"])
    return PromptSet(
        clean=Tokens(inputs["clean"], ones),
        patch=Tokens(inputs["patch"], ones),
        clean_answers=inputs["clean_answer"],
        patch_answers=inputs["patch_answer"],
        cases=[""] * n,
        templates=["6"] * n,
        texts=[""] * n,
    )


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def dense(effects, shape) -> torch.Tensor:
    """[B, S, F + 1]"""
    full = torch.zeros(*shape, effects.n_features + 1)
    full[effects.example.long(), effects.position.long(), effects.feature.long()] = effects.value
    return full


def recorded_nodes(tensors, site) -> torch.Tensor:
    return torch.cat([tensors[f"{site}.effect.act"], tensors[f"{site}.effect.resc"]], dim=-1)


def test_integrated_gradients(recorded, model, saes, prompts):
    result = attribute(
        capture_activations(Setting(model, saes, logit_difference), prompts, sites=model.sites),
        sites=model.sites,
        method="ig",
        rule="left-riemann",
        steps=10,
    )
    for site in model.sites:
        ours = dense(result.effects[site], prompts.clean.input_ids.shape)
        assert relative_error(ours, recorded_nodes(recorded["nodes_ig"], site)) < TOLERANCE, site


def test_attribution_patching_with_the_recorded_mlp_gradient(recorded, model, saes, prompts):
    def through_the_sae(site: Site):
        def edit(x):
            x_hat = saes[site](x)
            return x_hat + (x - x_hat).detach()

        return edit

    mlps = [site for site in model.sites if site.kind == "mlp"]
    run = model.run(
        prompts.clean,
        capture=model.sites,
        edits={site: through_the_sae(site) for site in mlps},
        grad=True,
        last_only=True,
    )
    m = logit_difference(run.logits[:, -1], prompts)
    gradients = torch.autograd.grad(m.sum(), [run.activations[site] for site in model.sites])
    states = capture_activations(Setting(model, saes, logit_difference), prompts, sites=model.sites)
    for site, gradient in zip(model.sites, gradients, strict=True):
        effects = contract_gradient(saes[site], states.clean[site], states.patch[site], gradient, mask=states.mask)
        ours = dense(effects, prompts.clean.input_ids.shape)
        assert relative_error(ours, recorded_nodes(recorded["nodes_attrib"], site)) < TOLERANCE, site


def test_attribution_patching_agrees_where_nothing_deviates(recorded, model, saes, prompts):
    """No SAE lies between the last layer's sites and the metric, so there the plain method must agree."""
    states = capture_activations(Setting(model, saes, logit_difference), prompts, sites=model.sites)
    gradients = attribution_patching(states, sites=model.sites)
    for site in model.sites[-3:]:
        effects = contract_gradient(
            saes[site], states.clean[site], states.patch[site], gradients[site], mask=states.mask
        )
        ours = dense(effects, prompts.clean.input_ids.shape)
        assert relative_error(ours, recorded_nodes(recorded["nodes_attrib"], site)) < TOLERANCE, site


def all_nodes(sae, n_positions: int) -> SiteNodes:
    """Every (position, feature or error) of a site."""
    width = sae.config.n_features + 1
    position, feature = torch.meshgrid(torch.arange(n_positions), torch.arange(width), indexing="ij")
    return SiteNodes(width - 1, feature.flatten(), position.flatten(), torch.zeros(n_positions * width))


@pytest.mark.slow
def test_edges(recorded, model, saes, prompts):
    """Every recorded edge (example, position, node) -> (example, position, node), computed one example at a time."""
    tensors = recorded
    shape = prompts.clean.input_ids.shape
    width = 65
    pairs = {name.removesuffix(".idx") for name in tensors["edges"] if name.endswith(".idx")} - {"resid_1|y"}
    ours = {pair: torch.zeros(shape[0], shape[1] * width, shape[1] * width) for pair in pairs if "agg." not in pair}
    for b in range(len(prompts)):
        states = capture_activations(Setting(model, saes, logit_difference), prompts[[b]], sites=model.sites)
        gradients = {
            site: integrated_gradients(states, site=site, rule="left-riemann", steps=10) for site in model.sites
        }
        nodes = {site: all_nodes(saes[site], shape[1]) for site in model.sites}
        batch = Attribution(states, gradients=gradients)
        edges = edge_effects(batch, nodes, active="clean")
        for pair in ours:
            up, down = pair.split("|")
            ours[pair][b] = edges[Site.parse(up), Site.parse(down)]
    for pair, weights in ours.items():
        index, value = tensors["edges"][f"{pair}.idx"].long(), tensors["edges"][f"{pair}.val"]
        b, s_down, j_down, b_up, s_up, j_up = index
        assert torch.equal(b, b_up)
        assert (j_up != width - 1).all()  # the paper's code has no edge out of an error node
        found = weights[b, s_down * width + j_down, s_up * width + j_up]
        assert relative_error(found, value) < TOLERANCE, pair
        kept_down = torch.zeros(weights.shape[:2], dtype=torch.bool)
        kept_down[b, s_down * width + j_down] = True
        others = weights.unflatten(2, (shape[1], width))[..., :-1].flatten(2)[kept_down].abs().sum()
        assert torch.isclose(others, value.abs().sum(), rtol=1e-4), f"{pair} has edges that were not recorded"


@pytest.mark.slow
def test_edges_summed_over_positions_are_the_sum(recorded, model, saes, prompts):
    """One product for all positions and examples gives the sum of the single ones."""
    states = capture_activations(Setting(model, saes, logit_difference), prompts, sites=model.sites)
    gradients = attribution_patching(states, sites=model.sites)
    width = 65
    by_position = {site: all_nodes(saes[site], states.mask.shape[1]) for site in model.sites}
    summed = {
        site: SiteNodes(width - 1, torch.arange(width), torch.full((width,), -1), torch.zeros(width))
        for site in model.sites
    }
    batch = Attribution(states, gradients=gradients)
    one = edge_effects(batch, by_position, active="clean")
    both = edge_effects(batch, summed, active="clean")
    assert one.keys() == both.keys()
    for pair, weights in one.items():
        rows = 1 if pair[1] is None else states.mask.shape[1]
        total = weights.unflatten(0, (rows, -1)).unflatten(2, (-1, width)).sum((0, 2))
        assert torch.allclose(total, both[pair], atol=1e-6 + 1e-4 * both[pair].abs().max().item()), pair


def test_error_columns_follow_the_formula(model, saes, prompts):
    """Edges out of an error node: [left * dd/de_u] . (e_patch - e_clean), by one plain backward pass."""
    states = capture_activations(Setting(model, saes, logit_difference), prompts, sites=model.sites)
    gradients = attribution_patching(states, sites=model.sites)
    up, down = Site.parse("resid_0"), Site.parse("mlp_1")
    width = 65
    nodes = {
        site: SiteNodes(width - 1, torch.arange(width), torch.full((width,), -1), torch.zeros(width))
        for site in model.sites
    }
    batch = Attribution(states, gradients=gradients)
    edges = edge_effects(batch, nodes, active="clean")[up, down]
    graph = cut_forward(states, sites=model.sites)
    y = graph.outputs[down]
    f = saes[down].encode(y)
    left = gradients[down] @ saes[down].W_dec.T
    error = y - saes[down].decode(f)
    delta = (states.patch[up] - saes[up](states.patch[up])) - (states.clean[up] - saes[up](states.clean[up]))
    for j in [0, 5, 64]:
        scalar = (gradients[down] * error).sum() if j == 64 else (left * f)[..., j].sum()
        (g,) = torch.autograd.grad(scalar, graph.leaves[up], retain_graph=True)
        assert torch.allclose(edges[j, 64], (g * delta).sum(), rtol=1e-4, atol=1e-6)

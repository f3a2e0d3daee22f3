"""Prompts whose backward pass does not fit: the graph of one block at a time, for the same effects and edges."""

from __future__ import annotations

import pytest
import torch

from circuits.discovery.batching import GIB, DiscoveryRun, backward_bytes
from circuits.discovery.discover import discover
from circuits.options import DiscoverOptions
from sae._peak_memory import peak_memory
from sae.model.activation_checkpointing import Checkpointed
from sae.neurons import mlp_neuron_dictionaries, neuron_dictionaries


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_neox", "gemma2"])
def test_effects_and_edges_are_the_same(family, make_tiny_model, tiny_prompts):
    model, prompts = make_tiny_model(family), tiny_prompts[:1]
    mlps = mlp_neuron_dictionaries(model) if family == "gpt_neox" else neuron_dictionaries(model)
    saes = neuron_dictionaries(model).subset([site for site in model.sites if site.kind == "resid"])
    saes = type(saes)({**saes, **mlps.subset([site for site in mlps if site.layer == 1])})
    small = backward_bytes(model, prompts.clean.n_positions) / GIB / 2
    for method in ("ig", "attrib"):
        options = [DiscoverOptions(method=method, steps=1, edge_nodes=8, memory=memory) for memory in (1.0, small)]
        runs = [DiscoveryRun.of(model, saes, prompts, one) for one in options]
        assert runs[0].setting.model.checkpointed is None and runs[1].setting.model.checkpointed is not None
        expected, circuit = (discover(model, saes, prompts, one, progress=False) for one in options)
        for site, nodes in expected.nodes.items():
            torch.testing.assert_close(circuit.nodes[site].effect, nodes.effect, rtol=1e-4, atol=1e-6)
        assert circuit.edges.keys() == expected.edges.keys()
        for pair, weights in expected.edges.items():
            torch.testing.assert_close(circuit.edges[pair], weights, rtol=1e-4, atol=1e-6)
    assert model.checkpointed is None


@pytest.mark.slow
def test_memory_is_that_of_one_block(make_tiny_model):
    """Beside what stands at the residual sites."""
    model = make_tiny_model("llama", layers=6)
    tokens = model.probe_tokens().repeat(20)

    def backward(one):
        run = one.run(tokens, capture=[model.sites[0]], grad=True, last_only=True)
        run.gradients(run.logits.sum(), [model.sites[0]])

    plain, cut = (
        peak_memory(lambda one=one: backward(one), torch.device("cpu")) for one in (model, Checkpointed.of(model))
    )
    assert cut < 0.5 * plain

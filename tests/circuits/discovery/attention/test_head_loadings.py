"""Head loadings against edges of a model in which every other head is cut off, and against weights by hand."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from pytest import approx

from circuits import discover
from circuits.attribution.activations import capture_activations
from circuits.attribution.attribution_patching import attribution_patching
from circuits.attribution.edges import edge_effects
from circuits.attribution.node_effects import Attribution
from circuits.discovery.attention.head_loadings import head_loadings, site_by_head
from sae.model.sites import Site

D_HEAD, HEADS = 8, 4


@pytest.fixture(scope="module")
def circuit(tiny_model, make_saes, tiny_prompts):
    return discover(
        tiny_model, make_saes(tiny_model, architecture="relu"), tiny_prompts, method="attrib", edge_nodes=60,
        progress=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def loadings(circuit):
    return head_loadings(circuit, edges=200, progress=False)


@pytest.mark.slow
def test_heads_and_rest_add_up_to_the_edges_of_the_circuit(circuit, loadings):
    weights = circuit.edges_frame().set_index(["source", "target"])["weight"]
    assert {edge.is_into for edge in loadings.edges} == {True, False}
    assert "attn_0/error" in {edge.source for edge in loadings.edges}
    for edge in loadings.edges:
        assert edge.weight == approx(weights[edge.source, edge.target], abs=1e-5)
        assert sum(edge.heads) + edge.rest == approx(edge.weight, abs=1e-9)
        assert not edge.is_into or abs(edge.rest) < 1e-5
    assert "head 3" in loadings.text() and len(loadings.to_dict()["edges"]) == len(loadings.edges)


@pytest.mark.slow
def test_edges_into_a_site_are_those_with_the_other_heads_cut_off(circuit, loadings):
    """A head is cut off where what it gives to the output projection is a constant."""
    setting, prompts = circuit.setting(), circuit.prompts
    for head in range(HEADS):
        with ExitStack() as stack:
            for block in setting.model.hf.gpt_neox.layers:
                stack.callback(block.attention.dense.register_forward_pre_hook(only(head)).remove)
            weights, names = {}, {site: nodes.ids(site) for site, nodes in circuit.edge_nodes.items()}
            for rows in ([0, 2, 4, 6], [1, 3, 5, 7]):
                states = capture_activations(setting, prompts[rows])
                gradients = uncut_gradients(circuit, rows)
                edges = edge_effects(Attribution(states, gradients=gradients), circuit.edge_nodes)
                for (up, down), of_pair in edges.items():
                    for row, target in enumerate(["metric"] if down is None else names[down]):
                        for column, source in enumerate(names[up]):
                            key = source, target
                            weights[key] = weights.get(key, 0.0) + of_pair[row, column].item() / len(prompts)
        for edge in loadings.edges:
            if edge.is_into:
                assert edge.heads[head] == approx(weights[edge.source, edge.target], abs=1e-5)


def only(head: int):
    def cut(module, args):
        (z,) = args
        alone = z.detach().clone()
        columns = slice(head * D_HEAD, (head + 1) * D_HEAD)
        alone[..., columns] = z[..., columns]
        return (alone,)

    return cut


def uncut_gradients(circuit, rows):
    """dm/dx with all heads, which the nodes' own gradients are."""
    hooks = [block.attention.dense._forward_pre_hooks.copy() for block in circuit.model.hf.gpt_neox.layers]
    for block in circuit.model.hf.gpt_neox.layers:
        block.attention.dense._forward_pre_hooks.clear()
    states = capture_activations(circuit.setting(), circuit.prompts[rows])
    gradients = attribution_patching(states, sites=states.sites)
    for block, of_block in zip(circuit.model.hf.gpt_neox.layers, hooks, strict=True):
        block.attention.dense._forward_pre_hooks.update(of_block)
    return gradients


@pytest.mark.parametrize("name", ["gpt_neox", "gemma2"])
def test_what_heads_write_is_their_part_of_the_projection(make_tiny_model, tiny_prompts, name):
    """Gemma's site is behind a norm, whose scale is that of all heads together."""
    model, tokens, site = make_tiny_model(name), tiny_prompts[1::2].clean, Site("attn", 1)
    blocks = model.hf.gpt_neox.layers if name == "gpt_neox" else model.hf.model.layers
    dense = blocks[1].attention.dense if name == "gpt_neox" else blocks[1].self_attn.o_proj
    seen = {}
    handle = dense.register_forward_pre_hook(lambda module, args: seen.update(z=args[0]))
    heads = site_by_head(model, tokens, site)
    handle.remove()
    parts = [
        seen["z"][..., columns] @ dense.weight[:, columns].T
        for columns in (slice(head * D_HEAD, (head + 1) * D_HEAD) for head in range(HEADS))
    ]
    if name == "gemma2":
        norm, total = blocks[1].post_attention_layernorm, sum(parts)
        scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-6) * (1 + norm.weight)
        parts = [part * scale for part in parts]
    for head, part in enumerate(parts):
        torch.testing.assert_close(heads.of_head(head), part.detach(), atol=1e-5, rtol=1e-4)


def test_edges_out_of_a_site_follow_what_each_head_changes(tiny_model, make_saes, tiny_prompts):
    """At a single token of a single prompt the shares of the heads are those of the feature's pre-activation."""
    saes = make_saes(tiny_model, architecture="relu")
    circuit = discover(
        tiny_model, saes, tiny_prompts[[1]], method="attrib", sites="attn,mlp", aggregation="position", edge_nodes=80,
        progress=False,
    )  # fmt: skip
    edges = [edge for edge in head_loadings(circuit, edges=100, progress=False).edges if not edge.is_into]
    clean, patch = (
        site_by_head(tiny_model, side, Site("attn", 0)) for side in (circuit.prompts.clean, circuit.prompts.patch)
    )
    sae, checked = saes[Site("attn", 0)], 0
    assert "metric" in {edge.target for edge in edges}
    for edge in edges:
        name, _, position = edge.source.partition("@")
        if not name.startswith("attn_0/") or name == "attn_0/error":
            continue
        feature, at = int(name.partition("/")[2]), int(position)
        delta = (sae.encode(patch.x) - sae.encode(clean.x))[0, at, feature]
        of_heads = [
            (patch.of_head(head) - clean.of_head(head))[0, at] @ sae.encoder_rows(torch.tensor([feature]))[0]
            for head in range(HEADS)
        ]
        expected = [float(edge.weight * of_head / delta) for of_head in of_heads]
        assert edge.heads == approx(expected, abs=1e-4)
        checked += 1
    assert checked > 3

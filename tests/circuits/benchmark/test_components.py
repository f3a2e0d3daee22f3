"""Heads and MLPs as nodes: against hooks on the output projections, and the areas against the benchmark's rule."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest
import torch

from circuits.attribution.activations import Setting, capture_activations
from circuits.attribution.attribution_patching import attribution_patching
from circuits.benchmark.components import (
    ComponentCurve,
    PatchedComponents,
    component_effects,
    component_faithfulness,
    component_names,
)
from circuits.metrics.metrics import logit_difference
from graphs.errors import GraphError
from graphs.formats.eap_ig import read_eap_ig
from graphs.formats.mib import SHARES, component_edges, to_mib, write_mib
from sae.errors import UserError
from sae.neurons import neuron_dictionaries

HEADS, D_HEAD = 4, 8


@pytest.fixture(scope="module")
def pairs(tiny_prompts):
    return tiny_prompts[1::2]


def by_hooks(model, prompts, kept):
    """m with the components outside `kept` at their value after the patch prompt, by hooks on the modules."""
    values = {}
    body = model.hf.gpt_neox
    places = {"input": (body.embed_in, "output")}
    for number, layer in enumerate(body.layers):
        places |= {f"m{number}": (layer.mlp, "output"), f"a{number}": (layer.attention.dense, "input")}
    with ExitStack() as stack, torch.no_grad():
        for name, (module, side) in places.items():
            hook = module.register_forward_pre_hook if side == "input" else module.register_forward_hook
            stack.callback(hook(keep_in(values, name)).remove)
        model.hf(input_ids=prompts.patch.input_ids, attention_mask=prompts.patch.attention_mask)
    with ExitStack() as stack, torch.no_grad():
        for name, (module, side) in places.items():
            if side == "output" and name not in kept:
                stack.callback(module.register_forward_hook(lambda *_, x=values[name]: x).remove)
            if side == "input":
                stack.callback(module.register_forward_pre_hook(only(kept, name, values[name])).remove)
        logits = model.hf(input_ids=prompts.clean.input_ids, attention_mask=prompts.clean.attention_mask).logits
    return logit_difference(logits[:, -1], prompts)


def keep_in(values, name):
    def hook(module, inputs, output=None):
        values[name] = inputs[0] if output is None else output

    return hook


def only(kept, layer, patch):
    def hook(module, inputs):
        z, other = (x.unflatten(-1, (HEADS, D_HEAD)).clone() for x in (inputs[0], patch))
        for head in range(HEADS):
            if f"{layer}.h{head}" not in kept:
                z[:, :, head] = other[:, :, head]
        return (z.flatten(-2),)

    return hook


def test_components_are_patched_where_hooks_would(tiny_model, pairs):
    batch = pairs[pairs.clean.lengths == pairs.clean.lengths.max()]
    patched, names = PatchedComponents(tiny_model, batch), component_names(tiny_model)
    assert names[:6] == ["input", "a0.h0", "a0.h1", "a0.h2", "a0.h3", "m0"] and len(names) == 11
    for kept in (names, [], ["a0.h1", "m1"], ["input", "a1.h0", "a1.h2", "m0"]):
        m = logit_difference(patched.logits(kept), batch)
        torch.testing.assert_close(m, by_hooks(tiny_model, batch, kept), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_heads_add_up_to_their_site(tiny_model, pairs):
    """To first order, and the exact effect of a component is that of a hook."""
    effects = component_effects(tiny_model, pairs, method="attrib", batch_size=3, progress=False)
    setting = Setting.of(tiny_model, neuron_dictionaries(tiny_model), "logit_difference")
    states = capture_activations(setting, pairs)
    gradients, real = attribution_patching(states, sites=states.sites), states.mask[..., None]
    for site in states.sites:
        whole = ((states.patch[site] - states.clean[site]) * gradients[site] * real).sum().item() / len(pairs)
        names = {"embed": ["input"], "mlp": [f"m{site.layer}"], "attn": [f"a{site.layer}.h{h}" for h in range(HEADS)]}
        if site.kind in names:
            assert sum(effects[name] for name in names[site.kind]) == pytest.approx(whole, abs=1e-5)
    exact = component_effects(tiny_model, pairs, method="exact", progress=False)
    m = by_hooks(tiny_model, pairs, component_names(tiny_model)).mean().item()
    for name in ("a1.h2", "m0"):
        alone = by_hooks(tiny_model, pairs, {*exact} - {name}).mean().item()
        assert exact[name] == pytest.approx(alone - m, abs=1e-5)
    mixed = component_effects(tiny_model, pairs, method="ensemble:attrib,gim", progress=False)
    assert list(mixed) == list(exact) == component_names(tiny_model)
    with pytest.raises(UserError, match="takes no gradient"):
        component_effects(tiny_model, pairs, method="random", progress=False)


@pytest.mark.slow
def test_areas_are_the_benchmarks(tiny_model, pairs):
    """Its script adds trapezoids from the first share to 1; everything kept is the model, nothing the patch run."""
    effects = component_effects(tiny_model, pairs, method="attrib", progress=False)
    curve = component_faithfulness(tiny_model, pairs, effects, batch_size=3, progress=False)
    assert curve.by_effect[0] == curve.by_magnitude[0] == 0  # int(.001 * 11) components
    assert curve.by_effect[-1] == curve.by_magnitude[-1] == pytest.approx(1)
    ranking = sorted(effects, key=lambda name: -effects[name])
    m = [by_hooks(tiny_model, pairs, kept).mean().item() for kept in (ranking, [], ranking[:5])]
    assert curve.by_effect[curve.shares.index(0.5)] == pytest.approx((m[2] - m[1]) / (m[0] - m[1]), abs=1e-4)
    by_hand = ComponentCurve({}, [0.1, 0.5, 1.0], [0.0, 1.2, 1.0], [0.5, 0.8, 1.0], 1)
    assert by_hand.cpr == pytest.approx(0.4 * 0.6 + 0.5 * 1.1)
    assert by_hand.cmd == pytest.approx(0.4 * 0.35 + 0.5 * 0.1)
    assert len(curve.to_frame()) == 10 and curve.to_dict()["cpr"] == curve.cpr


def test_a_submission_has_nine_circuits_within_their_shares(tmp_path):
    shape = {"n_layers": 3, "n_heads": 4, "d_model": 8}
    edges = component_edges(3, 4)
    n_edges = sum(map(len, edges.values()))
    effects = {name: (-1) ** n * 1 / (1 + n) for n, name in enumerate(dict.fromkeys(u for u, _ in edges))}
    paths = write_mib(effects, tmp_path, task="ioi", model="gpt2", **shape)
    assert [path.parent.name for path in paths] == ["ioi_gpt2"] * 9 and len(SHARES) == 9
    sizes = []
    for path, share in zip(paths, SHARES, strict=True):
        data = json.loads(path.read_text())
        chosen = {name for name, edge in data["edges"].items() if edge["in_graph"]}
        assert len(data["edges"]) == n_edges and len(chosen) <= share / 100 * n_edges
        assert {edge["score"] for edge in data["edges"].values()} <= {0.0, 1.0} and data["nodes"]["logits"]["in_graph"]
        inside = {name for name, node in data["nodes"].items() if node["in_graph"]}
        ends = {end.partition("<")[0] for name in chosen for end in name.split("->")}
        assert ends <= inside
        one_more = {*list(effects)[: len(inside)], "logits"}  # effects are in the order of their size
        assert sum(len(names) for pair, names in edges.items() if {*pair} <= one_more) > share / 100 * n_edges
        joined = {tuple(end.partition("<")[0] for end in name.split("->")) for name in chosen}
        assert len(list(read_eap_ig(path).edges())) == len(joined)
        sizes.append(len(chosen))
    assert sizes == sorted(sizes) and sizes[-1] > 0.3 * n_edges
    write_mib(effects, tmp_path, task="ioi", model="gpt2", **shape)  # its own files are replaced
    paths[0].write_text("{}")
    with pytest.raises(GraphError, match="not written by this program"):
        write_mib(effects, tmp_path, task="ioi", model="gpt2", **shape)
    with pytest.raises(GraphError, match="MIB has ioi"):
        write_mib(effects, tmp_path, task="greater-than", model="gpt2", **shape)
    with pytest.raises(GraphError, match="other components"):
        to_mib({"input": 1.0}, **shape)

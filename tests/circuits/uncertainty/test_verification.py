"""Exact beside estimated effects: against patching by hand, and what is done with the difference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from circuits.circuit import Circuit
from circuits.discovery.discover import discover
from circuits.metrics.metrics import logit_difference
from circuits.options import DiscoverOptions
from circuits.uncertainty.verification import disagreement, verified, verify
from sae.errors import UserError
from sae.model.sites import Site


def patched_by_hand(model, saes, prompts, name: str) -> float:
    """Mean of m with one node at its patch value minus m(clean), every site but its own left to the model."""
    site_name, _, rest = name.partition("/")
    what, _, at = rest.partition("@")
    site = Site.parse(site_name)
    sae = saes[site]
    clean, patch = (model.run(side, capture=[site]).activations[site] for side in (prompts.clean, prompts.patch))
    f_clean, f_patch = sae.encode(clean), sae.encode(patch)
    if what == "error":
        change = (patch - sae.decode(f_patch)) - (clean - sae.decode(f_clean))
    else:
        change = (f_patch - f_clean)[..., int(what), None] * sae.W_dec[int(what)]
    change = change * prompts.clean.attention_mask[..., None]
    if at:
        change = change * (torch.arange(change.shape[1]) == int(at))[:, None]
    m = [
        logit_difference(model.run(prompts.clean, edits=edits, last_only=True).logits[:, -1], prompts)
        for edits in ({site: lambda x: x + change}, {})
    ]
    return (m[0] - m[1]).mean().item()


@pytest.mark.parametrize("aggregation", ["sum", "position"])
def test_exact_effects_by_hand(tiny_model, tiny_saes, tiny_prompts, aggregation):
    prompts = tiny_prompts if aggregation == "sum" else tiny_prompts[1::2]
    circuit = discover(
        tiny_model, tiny_saes, prompts, DiscoverOptions(method="attrib", aggregation=aggregation, edge_nodes=0),
        progress=False,
    )  # fmt: skip
    result = verify(circuit, prompts, nodes=8, batch_size=3, max_rows=9, progress=False)
    assert len(result.names) == 8 and any("error" in name for name in result.names)
    assert [abs(value) for value in result.estimated] == sorted(map(abs, result.estimated), reverse=True)
    for name, exact in zip(result.names, result.exact, strict=True):
        assert exact == pytest.approx(patched_by_hand(tiny_model, tiny_saes, prompts, name), abs=1e-5), name


def test_the_exact_method_agrees_with_itself(tiny_model, tiny_saes, tiny_prompts):
    circuit = discover(
        tiny_model, tiny_saes, tiny_prompts, DiscoverOptions(method="exact", edge_nodes=0), progress=False
    )
    result = verify(circuit, tiny_prompts, nodes=20, progress=False)
    assert result.to_frame()["exact"].tolist() == result.exact and result.names[0] in result.text()
    assert result.exact == pytest.approx(result.estimated, abs=1e-5)
    assert not result.disagreements and result.correlation == pytest.approx(1)
    assert result.summary() == "verified 20 nodes by exact patching, correlation 1.000: all agree"


def test_spans_are_known_by_name_whatever_their_order(tiny_model, tiny_saes, tiny_prompts):
    mask = tiny_prompts.clean.attention_mask
    numbers = torch.where(mask.bool(), (mask.cumsum(1) > 2).long(), -1)  # two tokens of "first", the others "rest"
    prompts = replace(tiny_prompts, spans=("first", "rest"), span_numbers=numbers)
    turned = replace(prompts, spans=("rest", "first"), span_numbers=torch.where(numbers < 0, -1, 1 - numbers))
    options = DiscoverOptions(method="attrib", aggregation="spans", edge_nodes=0)
    circuit = discover(tiny_model, tiny_saes, prompts, options, progress=False)
    one, other = (verify(circuit, given, nodes=6, progress=False) for given in (prompts, turned))
    assert one.names == other.names and other.exact == pytest.approx(one.exact, abs=1e-6)


def test_wrong_estimates_are_marked_and_kept_with_the_graph(tiny_model, tiny_saes, tiny_prompts, tmp_path):
    """One estimate's sign is turned and another one's size trebled."""
    circuit = discover(
        tiny_model, tiny_saes, tiny_prompts, DiscoverOptions(method="exact", edge_nodes=20), progress=False
    )
    first, second, *_ = verify(circuit, tiny_prompts, nodes=2, progress=False).names
    wrong = circuit
    for name, factor in ((first, -1.0), (second, 3.0)):
        wrong = scaled(wrong, name, factor)
    result = verify(wrong, tiny_prompts, nodes=5, progress=False)
    assert result.disagreements == {first: "sign", second: "size"}
    assert result.summary().endswith("1 disagree in sign and 1 disagree in size")
    wrong = verified(wrong, result)
    wrong.save(tmp_path, graph=wrong.graph(nodes=10))
    graph = Circuit.load(tmp_path).graph(nodes=10)
    assert graph.node(first).attributes["disagrees"] == "sign"
    exact = dict(zip(result.names, result.exact, strict=True))
    for node in graph.nodes():
        assert node.attributes.get("exact_effect") == exact.get(node.id)
        assert ("disagrees" in node.attributes) == (node.id in (first, second))


def scaled(circuit: Circuit, name: str, factor: float) -> Circuit:
    """The circuit with one node's effects multiplied."""
    site_name, _, what = name.partition("/")
    site = Site.parse(site_name)
    effects = circuit.effects[site]
    feature = effects.n_features if what == "error" else int(what)
    value = torch.where(effects.feature == feature, factor * effects.value, effects.value)
    return replace(circuit, effects={**circuit.effects, site: replace(effects, value=value)})


def test_what_counts_as_disagreement():
    assert disagreement(1.0, -0.01) == "sign"
    assert disagreement(1.0, 2.1) == disagreement(-1.0, -0.49) == "size"
    assert disagreement(1.0, 1.9) is disagreement(-1.0, -0.51) is disagreement(0.0, 0.0) is None
    assert disagreement(1.0, 0.0) == "size"


def test_no_node_to_verify(tiny_model, tiny_saes, tiny_prompts):
    circuit = discover(
        tiny_model, tiny_saes, tiny_prompts, DiscoverOptions(method="attrib", edge_nodes=0), progress=False
    )
    with pytest.raises(UserError, match="at least 1"):
        verify(circuit, tiny_prompts, nodes=0, progress=False)

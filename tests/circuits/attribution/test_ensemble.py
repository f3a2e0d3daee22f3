"""Ensembles against their definition, and nodes that keep their sign against a loop over resamples."""

from __future__ import annotations

import pytest
import torch

from circuits.attribution.nodes import ranked
from circuits.comparison.compare import compare_methods
from circuits.comparison.options import CompareOptions
from circuits.discovery.discover import discover
from circuits.options import DiscoverOptions
from circuits.uncertainty.bootstrap import Bootstrap
from circuits.uncertainty.signs import consistent_first
from sae.errors import UserError
from sae.model.sites import Site

NAMES = ("attrib", "gim")


@pytest.fixture(scope="module")
def few_saes(tiny_saes):
    return {site: tiny_saes[site] for site in map(Site.parse, ("embed", "attn_0", "resid_1"))}


@pytest.fixture(scope="module")
def circuits(tiny_model, few_saes, tiny_prompts):
    """The circuit of each method, and of both together."""
    options = {"edge_nodes": 20, "aggregation": "sum", "progress": False}
    return [
        discover(tiny_model, few_saes, tiny_prompts, method=method, **options)
        for method in (*NAMES, "ensemble:attrib,gim")
    ]


def test_an_ensemble_is_the_mean_of_normalised_effects(circuits):
    effects = [dict(ranked(circuit.nodes)) for circuit in circuits]
    norms = [sum(map(abs, of_method.values())) for of_method in effects[:2]]
    for name in {*effects[0], *effects[1]}:
        scores = [of_method.get(name, 0.0) / norm for of_method, norm in zip(effects, norms, strict=False)]
        assert effects[2].get(name, 0.0) == pytest.approx(sum(scores) / 2 * sum(norms) / 2, abs=1e-6)


def test_edges_of_an_ensemble_go_with_its_effects(circuits):
    """What the last site does to the metric directly is all that it does."""
    circuit = circuits[2]
    last = list(circuit.effects)[-1]
    assert circuit.edges[last, None][0] == pytest.approx(circuit.edge_nodes[last].effect, abs=1e-5)


@pytest.mark.slow
def test_ensembles_are_compared_and_take_the_time_of_their_methods(circuits, tiny_model, few_saes, tiny_prompts):
    methods = "attrib,gim,ensemble:attrib+gim,signs:ensemble:attrib+gim"
    options = CompareOptions(methods=methods, neurons="", sizes="10", sample=0, resamples=20)
    rows = compare_methods(tiny_model, few_saes, tiny_prompts, tiny_prompts, options, progress=False).rows
    assert [row.method for row in rows] == methods.split(",")
    assert rows[2].seconds == pytest.approx(rows[0].seconds + rows[1].seconds)
    assert rows[3].seconds > rows[2].seconds and rows[2].residual is not None and rows[3].residual is None
    assert rows[2].curve.n_nodes == len(ranked(circuits[2].nodes))


def test_consistent_nodes_come_first(circuits, monkeypatch):
    circuit, bootstrap = circuits[0], Bootstrap(resamples=40)
    groups = torch.arange(circuit.metadata["n_examples"])
    found = consistent_first(circuit.effects, circuit.nodes, groups=groups, bootstrap=bootstrap)
    values = {}
    for site, effects in circuit.effects.items():
        rows = zip(effects.example.tolist(), effects.feature.tolist(), effects.value.tolist(), strict=True)
        for example, feature, value in rows:
            name = f"{site}/{'error' if feature == effects.n_features else feature}"
            values.setdefault(name, torch.zeros(len(groups)))[example] += value
    counts = bootstrap.counts(len(groups))
    keeps = {
        name: ((counts @ value).sign() == value.sum().sign()).float().mean() >= 0.95 for name, value in values.items()
    }
    expected = sorted(dict(ranked(circuit.nodes)), key=lambda name: (not keeps[name], -abs(values[name].sum().item())))
    assert [name for name, _ in ranked(found)][:30] == expected[:30]
    assert 0 < sum(map(bool, keeps.values())) < len(keeps)
    by_effect = [name for name, _ in ranked(circuit.nodes)]
    monkeypatch.setattr("circuits.uncertainty.intervals.CANDIDATES", 12)
    found = [name for name, _ in ranked(consistent_first(circuit.effects, circuit.nodes, groups=groups))]
    assert set(found[:12]) == set(by_effect[:12]) and found[12:] == by_effect[12:]


@pytest.mark.parametrize(
    ("method", "hint"),
    [("ensemble:ig", "two or more methods"), ("ensemble:ig,ig", "two or more methods"), ("ensemble:ig,gimm", "'gim'"),
     ("ensemble:", "unknown method")],
)  # fmt: skip
def test_wrong_ensembles_are_told(method, hint):
    with pytest.raises(UserError, match=hint):
        DiscoverOptions(method=method)
    with pytest.raises(UserError, match=r"no effects|unknown method"):
        CompareOptions(methods="signs:mask")

"""The comparison of methods: its numbers against the functions they come from, its statistics against scipy."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from circuits.attribution.activation_patching import exact_effects
from circuits.attribution.activations import Setting, capture_activations
from circuits.attribution.node_effects import CHECKS
from circuits.attribution.nodes import SiteNodes, select_nodes
from circuits.comparison import compare
from circuits.comparison.compare import compare_methods, nodes_for, size_grid
from circuits.comparison.options import CompareOptions, split
from circuits.comparison.results import MEAN, NOISING
from circuits.comparison.study import Study, Truth, agreement, correlation
from circuits.discovery.discover import discover
from circuits.faithfulness.learned_mask import MaskOptions, learn_node_mask
from circuits.faithfulness.nodes import FaithfulnessOptions, measure_faithfulness
from circuits.metrics.metrics import logit_difference
from circuits.options import DiscoverOptions
from sae._peak_memory import peak_memory
from sae.errors import UserError
from sae.model.language_model import LanguageModel
from sae.model.sites import Site

CPU = torch.device("cpu")
OPTIONS = CompareOptions(
    methods="ig,attrib,exact,mask,activation-difference,random",
    neurons="attrib",
    sizes="5,20",
    sample=30,
    mask_start="attrib",
    mask_steps=4,
    steps=3,
)


@pytest.fixture(scope="module")
def comparison(tiny_model, tiny_saes, tiny_prompts):
    few = {site: tiny_saes[site] for site in map(Site.parse, ("embed", "attn_0", "resid_1"))}
    return compare_methods(tiny_model, few, tiny_prompts, tiny_prompts, OPTIONS, progress=False)


def test_hidden_neurons_of_the_mlps_are_a_basis_of_their_own(tiny_model, tiny_saes, tiny_prompts):
    """All sites but the MLPs are whole; with all neurons kept nothing is ablated, and there is no error."""
    options = CompareOptions(methods="", neurons="", mlp_neurons="attrib", sizes="5", sample=0, resamples=0)
    compared = compare_methods(tiny_model, tiny_saes, tiny_prompts, tiny_prompts, options, progress=False)
    (row,) = compared.rows
    assert row.name == "attrib (mlp-neurons)" and row.curve.start_site == "mlp_0"
    assert row.curve.faithfulness[-1] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.slow
def test_rows_are_the_circuits_that_discovery_finds(comparison, tiny_model, tiny_saes, tiny_prompts):
    """Same nodes, residuals and faithfulness as `discover` and `measure_faithfulness` give."""
    assert [(row.method, row.dictionary) for row in comparison.rows] == [
        *((method, "saes") for method in OPTIONS.methods.split(",")),
        ("attrib", "neurons"),
    ]
    few = {site: tiny_saes[site] for site in map(Site.parse, ("embed", "attn_0", "resid_1"))}
    for row in comparison.rows[:2]:
        circuit = discover(
            tiny_model, few, tiny_prompts, DiscoverOptions(method=row.method, edge_nodes=0, steps=3), progress=False
        )
        assert row.residual == pytest.approx(circuit.metadata["completeness"]["mean_residual"], abs=1e-6)
        curve = measure_faithfulness(
            Setting.of(tiny_model, few),
            circuit.nodes,
            tiny_prompts,
            FaithfulnessOptions(random=0, resamples=0),
            sizes=(5, 20),
            progress=False,
        )
        at = [row.curve.sizes.index(size) for size in curve.sizes]
        assert [row.curve.faithfulness[i] for i in at] == pytest.approx(curve.faithfulness, abs=1e-5)
        assert [row.curve.completeness[i] for i in at] == pytest.approx(curve.completeness, abs=1e-5)
        assert row.curve.sizes[-1] == row.curve.n_nodes
        assert row.curve.faithfulness[-1] == pytest.approx(1, abs=1e-4)


def test_methods_that_do_not_know_the_model_are_left_out(tiny_model, tiny_saes, tiny_prompts, monkeypatch, caplog):
    """One of the default methods refuses the model: the others are compared; asked for by name, it says why before any
    is.
    """
    few, scored = {Site("resid", 1): tiny_saes[Site("resid", 1)]}, []
    options = replace(OPTIONS, methods=CompareOptions.methods, neurons="", sample=0)

    def check(model):
        raise UserError("gim does not know the attention modules")

    def score(study, truth, test, method, name):
        scored.append(method)
        return SimpleNamespace(method=method, curve=SimpleNamespace(n_prompts=1))

    monkeypatch.setattr(compare, "_score", score)
    monkeypatch.setitem(CHECKS, "gim", check)
    arguments = (tiny_model, few, tiny_prompts, tiny_prompts)
    compare_methods(*arguments, options, progress=False)
    assert scored == [name for name in split(options.methods) if name != "gim"]
    assert "gim is left out: gim does not know the attention modules" in caplog.text
    scored.clear()
    for asked in ({"methods": "attrib,gim"}, {"methods": "attrib,ensemble:ig+gim"}, {"methods": "attrib,signs:gim"},
                  {"methods": "attrib,mask", "mask_start": "gim"}):  # fmt: skip
        with pytest.raises(UserError, match="attention modules"):
            compare_methods(*arguments, replace(options, **asked), progress=False)
    assert not scored


@pytest.mark.slow
def test_the_row_of_masks_is_what_masks_score(comparison, tiny_model, tiny_saes, tiny_prompts):
    """Learned on the training prompts from the effects named; time and memory are at least those of these effects."""
    rows = {row.method: row for row in comparison.rows if row.dictionary == "saes"}
    few = {site: tiny_saes[site] for site in map(Site.parse, ("embed", "attn_0", "resid_1"))}
    effects = discover(tiny_model, few, tiny_prompts, DiscoverOptions(method="attrib", edge_nodes=0), progress=False)
    mask = learn_node_mask(
        Setting.of(tiny_model, few), effects.nodes, tiny_prompts, MaskOptions(steps=4), progress=False
    )
    curve = measure_faithfulness(
        Setting.of(tiny_model, few),
        mask.nodes,
        tiny_prompts,
        FaithfulnessOptions(random=0, resamples=0),
        sizes=(5, 20),
        progress=False,
    )
    row = rows["mask"]
    at = [row.curve.sizes.index(size) for size in curve.sizes]
    assert [row.curve.faithfulness[i] for i in at] == pytest.approx(curve.faithfulness, abs=1e-5)
    assert row.residual is None and row.agreement == {} and row.estimates is None
    assert row.seconds > rows["attrib"].seconds and row.peak_bytes >= rows["attrib"].peak_bytes


@pytest.mark.slow
def test_masks_from_nothing_and_on_edges(tiny_model, tiny_saes, tiny_prompts):
    """Both rank every node; the nodes that edges join to the metric stand before all others."""
    options = CompareOptions(
        methods="attrib,mask-equal,edge-mask", neurons="", sizes="5", sample=0, resamples=0, mask_start="attrib",
        mask_steps=1, mask_edge_nodes=8,
    )  # fmt: skip
    few = {site: tiny_saes[site] for site in map(Site.parse, ("embed", "attn_0", "resid_1"))}
    compared = compare_methods(tiny_model, few, tiny_prompts, tiny_prompts, options, progress=False)
    rows = {row.method: row for row in compared.rows}
    assert list(rows) == ["attrib", "mask-equal", "edge-mask"]
    assert len({row.curve.n_nodes for row in rows.values()}) == 1
    assert all(row.residual is None and row.agreement == {} for name, row in rows.items() if name != "attrib")
    study = Study(Setting.of(tiny_model, few), tiny_prompts, options)
    first, nodes = select_nodes(study.ranking("attrib").nodes, top=8), study.ranking("edge-mask").nodes
    names = {name for site, here in first.items() for name in here.ids(site)}
    assert {name for site, here in select_nodes(nodes, top=3).items() for name in here.ids(site)} <= names


def test_exact_patching_agrees_with_itself(comparison):
    by_method = {row.method: row for row in comparison.rows if row.dictionary == "saes"}
    exact = by_method["exact"].agreement
    assert exact[NOISING].pearson == pytest.approx(1, abs=1e-6)
    assert exact[NOISING].spearman == pytest.approx(1, abs=1e-6)
    assert exact[NOISING].errors == pytest.approx(1, abs=1e-6)
    assert exact[MEAN].pearson < 1 - 1e-6
    assert by_method["attrib"].agreement[NOISING].pearson > 0.8
    assert abs(by_method["random"].agreement[NOISING].pearson) < 0.5
    assert comparison.sampled == {"saes": 30, "neurons": 30}
    assert comparison.rows[-1].agreement[NOISING].errors is None  # neurons have none


def test_denoising_restores_one_node_in_the_patch_run(tiny_model, tiny_saes, tiny_prompts):
    site = Site.parse("attn_1")
    sae = tiny_saes[site]
    states = capture_activations(Setting(tiny_model, tiny_saes, logit_difference), tiny_prompts, sites=tiny_model.sites)
    back = exact_effects(states.reversed(), site=site, positions=None)
    delta = sae.encode(states.clean[site]) - sae.encode(states.patch[site])
    rows = list(zip(back.example.tolist(), back.feature.tolist(), back.value.tolist(), strict=True))
    assert len(rows) > 20
    for b, i, value in rows[::5]:
        if i == back.n_features:
            continue
        change = delta[b, :, i, None] * sae.W_dec[i] * states.mask[b, :, None]
        x = (states.patch[site][b] + change)[None]
        run = tiny_model.run(tiny_prompts.patch[[b]], edits={site: lambda _, x=x: x}, last_only=True)
        m = logit_difference(run.logits[:, -1], tiny_prompts[[b]])[0]
        assert value == pytest.approx((m - states.m_patch[b]).item(), abs=2e-5)


def test_one_way_prompts_have_no_denoising(tiny_model, tiny_saes, tiny_prompts):
    prompts = replace(tiny_prompts, patch=None, patch_answers=None)
    saes = {Site.parse("mlp_1"): tiny_saes[Site.parse("mlp_1")]}
    found = compare_methods(
        tiny_model, saes, prompts, prompts,
        CompareOptions(methods="attrib", neurons="", sizes="3", sample=10, ablation="zero"), progress=False,
    )  # fmt: skip
    assert set(found.rows[0].agreement) == {NOISING}
    states = capture_activations(Setting(tiny_model, saes, logit_difference), prompts, sites=list(saes))
    with pytest.raises(UserError, match="patch"):
        states.reversed()


def test_what_does_not_vary_correlates_with_nothing():
    x = np.arange(4.0)
    assert correlation(spearmanr, x, -x) == pytest.approx(-1)
    assert correlation(pearsonr, np.ones(4), x) == correlation(spearmanr, x, np.ones(4)) == 0


def test_a_skip_connection_is_no_feature_whose_estimate_is_judged():
    """Features 0 to 3 of mlp_1 are estimated exactly; its error (4) and its skip connection (5) are far off."""
    site, feature = Site.parse("mlp_1"), torch.arange(6)
    exact = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
    nodes = SiteNodes(4, feature, torch.full_like(feature, -1), torch.tensor([1.0, 2.0, 3.0, 4.0, -5.0, -90.0]))
    truth = Truth({site: 1.0}, 1.0, {site: nodes}, {NOISING: exact})
    judged = agreement({site: nodes}, truth, unsigned=False)[NOISING]
    assert judged.pearson == pytest.approx(1) and judged.spearman == pytest.approx(1)
    assert judged.errors is None  # one error varies with nothing


def test_nodes_for_a_level():
    assert nodes_for([10, 100], [0.9, 1.0], 0.8) == 10
    assert nodes_for([10, 100, 1000], [0.0, 0.5, 1.0], 0.75) == pytest.approx(100 * 10**0.5)
    assert nodes_for([10, 100, 1000], [0.0, 0.9, 0.7], 0.8) == pytest.approx(10 * 10 ** (8 / 9))
    assert nodes_for([10, 100], [0.1, 0.2], 0.8) is None


def test_size_grid_holds_what_was_asked_for_and_has_no_gaps():
    grid = size_grid([10, 20, 50, 500], 3000)
    assert {10, 20, 50, 500, 3000} <= set(grid)
    assert all(b / a < 1.7 for a, b in pairwise(grid))
    assert size_grid([10, 20], 7) == [7]
    assert size_grid([10, 20], 15) == [10, 15]


@pytest.mark.slow
def test_tables_and_plot(comparison, tmp_path):
    text = comparison.text()
    assert "attrib (neurons)" in text
    frame = comparison.to_frame()
    assert frame["cpr"].tolist() == [row.curve.cpr for row in comparison.rows] and "<table" in comparison._repr_html_()
    header = next(line for line in text.splitlines() if "n(0.8)" in line)
    ig = next(line for line in text.splitlines() if line.startswith("ig "))
    assert len(header) == len(ig) and ig.endswith(str(comparison.rows[0].curve.n_nodes))
    low, high = comparison.to_dict()["rows"][0]["intervals"]["cpr"]
    assert low <= comparison.rows[0].curve.cpr <= high
    assert json.loads(json.dumps(comparison.to_dict()))["rows"][0]["nodes_for"].keys() == {"0.8", "0.95"}
    svg = comparison.plot(tmp_path / "comparison.svg").read_text()
    assert svg.count("<path") > 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": "ig,relpp"}, "relp"),
        ({"methods": "", "neurons": ""}, "methods"),
        ({"sizes": "10,x"}, "sizes"),
        ({"rule": "midpont"}, "midpoint"),
        ({"sample": -1}, "sample"),
        ({"mask_start": "mask"}, "mask-start"),
        ({"mask_steps": 0}, "mask-steps"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(UserError, match=message):
        CompareOptions(**options)


# ---- memory


def test_peak_memory_counts_what_lives_at_once():
    def chain():
        x = torch.zeros(1000)
        y = x + 1
        del x
        z = y * 2
        view = z.view(10, 100)
        del z
        return view.sum()

    assert peak_memory(chain, CPU) == 8004
    assert peak_memory(lambda: [torch.zeros(1000).sum() for _ in range(5)], CPU) == 4000 + 5 * 4


def test_peak_memory_sees_what_the_backward_pass_keeps(make_tiny_model):
    x = torch.ones(1000, requires_grad=True)

    def deep(n):
        y = x
        for _ in range(n):
            y = y.exp()
        torch.autograd.grad(y.sum(), x)

    assert peak_memory(lambda: deep(20), CPU) - peak_memory(lambda: deep(10), CPU) == 10 * 4000
    model: LanguageModel = make_tiny_model("gpt_neox")
    tokens = model.tokenize(["the man sees"])
    with_graph, without = (peak_memory(lambda g=g: model.run(tokens, grad=g), CPU) for g in (True, False))
    assert with_graph > 2 * without

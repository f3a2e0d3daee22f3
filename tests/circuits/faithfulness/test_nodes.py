"""Faithfulness against its definition, spelt out with dense features, and its limits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid

from circuits.attribution.activations import Setting
from circuits.attribution.nodes import SiteNodes, count, select_nodes
from circuits.discovery.discover import discover
from circuits.faithfulness.ablation import AblationValues, NodeTable, SiteValues, ablation_edits
from circuits.faithfulness.nodes import FaithfulnessOptions, from_start_site, measure_faithfulness, random_nodes
from circuits.faithfulness.results import area, cmd, cpr
from circuits.metrics.metrics import logit_difference
from circuits.options import DiscoverOptions
from sae.errors import UserError
from sae.model.sites import Site
from tests.circuits.uncertainty.test_bootstrap import interval_by_hand


@pytest.fixture(scope="module")
def nodes(tiny_model, tiny_saes, tiny_prompts):
    return discover(
        tiny_model, tiny_saes, tiny_prompts, DiscoverOptions(method="attrib", edge_nodes=0), progress=False
    ).nodes


def mean_m(model, prompts, edits=None) -> float:
    return logit_difference(model.run(prompts.clean, edits=edits, last_only=True).logits[:, -1], prompts).mean().item()


def dense_means(model, saes, prompts, site):
    """Mean x and f over clean and patch prompts with the same template, [B, S, ...] for every prompt."""
    runs = [model.run(tokens, capture=[site]).activations[site] for tokens in (prompts.clean, prompts.patch)]
    rows = {t: [i for i, other in enumerate(prompts.templates) if other == t] for t in set(prompts.templates)}
    x = torch.stack([torch.cat([run[rows[t]] for run in runs]).mean(0) for t in prompts.templates])
    f = torch.stack([torch.cat([saes[site].encode(run[rows[t]]) for run in runs]).mean(0) for t in prompts.templates])
    return x, f


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("size", [5, 40])
def test_mean_ablation_by_its_definition(tiny_model, tiny_saes, tiny_prompts, nodes, keep, size):
    """x' = f' W_dec + b_dec + e', each feature and the error either as it is or at its mean."""
    chosen = select_nodes(nodes, top=size)
    table = NodeTable(tiny_saes, [chosen], sites=list(nodes))
    values = AblationValues(Setting(tiny_model, tiny_saes, logit_difference), table, "mean", reference=tiny_prompts)(
        tiny_prompts
    )
    ours = ablation_edits(tiny_saes, table, chosen, values, tiny_prompts, keep=keep)

    def definition(site):
        sae = tiny_saes[site]
        mean_x, mean_f = dense_means(tiny_model, tiny_saes, tiny_prompts, site)
        mean_e = mean_x - sae.decode(mean_f)
        left = torch.zeros(sae.config.n_features + 1, dtype=torch.bool)
        left[chosen[site].feature] = True
        left = left if keep else ~left

        def edit(x):
            f = sae.encode(x)
            e = x - sae.decode(f)
            return sae.decode(torch.where(left[:-1], f, mean_f)) + (e if left[-1] else mean_e)

        return edit

    theirs = {site: definition(site) for site in nodes}
    assert any(chosen[site].is_error.any() for site in nodes)
    assert mean_m(tiny_model, tiny_prompts, ours) == pytest.approx(mean_m(tiny_model, tiny_prompts, theirs), abs=1e-4)


def test_the_pooled_mean_by_its_definition(tiny_model, tiny_saes, tiny_prompts, nodes):
    """One mean over all real tokens of clean and patch prompts, whatever their template and position."""
    table = NodeTable(tiny_saes, [nodes], sites=list(nodes))
    values = AblationValues(
        Setting(tiny_model, tiny_saes, logit_difference), table, "mean-pooled", reference=tiny_prompts, batch_size=3
    )
    at = values(tiny_prompts[[0, 1]])
    real = tiny_prompts.clean.attention_mask.bool()
    for site, index in table.index.items():
        sides = (tiny_prompts.clean, tiny_prompts.patch)
        x = torch.cat([tiny_model.run(tokens, capture=[site]).activations[site][real] for tokens in sides])
        f = tiny_saes[site].encode(x)
        torch.testing.assert_close(at[site].x[:, -1], x.mean(0).expand(2, -1), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(at[site].features[1, 0], f[:, index].mean(0), atol=1e-5, rtol=1e-4)
        error = (x - tiny_saes[site].decode(f)).mean(0)
        torch.testing.assert_close(at[site].error[1, 3], error, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ablation", ["mean", "counterfactual", "resample", "zero", "mean-pooled"])
def test_all_nodes_explain_everything_and_none_nothing(tiny_model, tiny_saes, tiny_prompts, ablation):
    """f(all nodes) = 1 and completeness(all) = 0 by construction; here all nodes means every feature and error there
    is.
    """
    whole = {}
    for site, sae in tiny_saes.items():
        n = sae.config.n_features
        feature = torch.arange(n + 1)
        whole[site] = SiteNodes(n, feature, torch.full_like(feature, -1), torch.rand(n + 1) + 0.1)
    result = measure_faithfulness(
        Setting.of(tiny_model, tiny_saes),
        whole,
        tiny_prompts,
        FaithfulnessOptions(ablation=ablation, random=0, batch_size=5),
        sizes=[10, 10_000],
        progress=False,
    )
    assert result.sizes == [10, count(whole)]
    assert result.faithfulness[-1] == pytest.approx(1, abs=1e-3)
    assert result.completeness[-1] == pytest.approx(0, abs=1e-3)
    assert result.m_model == pytest.approx(mean_m(tiny_model, tiny_prompts), abs=1e-5)


def test_counterfactual_values_of_everything_give_the_patch_run(tiny_model, tiny_saes, tiny_prompts, nodes):
    result = measure_faithfulness(
        Setting.of(tiny_model, tiny_saes),
        nodes,
        tiny_prompts,
        FaithfulnessOptions(ablation="counterfactual", random=0),
        sizes=[10],
        progress=False,
    )
    patch = tiny_model.run(tiny_prompts.patch, last_only=True).logits[:, -1]
    assert result.m_empty == pytest.approx(logit_difference(patch, tiny_prompts).mean().item(), abs=1e-4)


def test_start_site_leaves_earlier_sites_alone(tiny_model, tiny_saes, tiny_prompts, nodes):
    later = from_start_site(nodes, "attn_1")
    assert [site.name for site in later] == ["attn_1", "mlp_1", "resid_1"]
    result = measure_faithfulness(
        Setting.of(tiny_model, tiny_saes),
        nodes,
        tiny_prompts,
        FaithfulnessOptions(start_site="attn_1", random=2),
        sizes=[5, 10],
        progress=False,
    )
    assert result.start_site == "attn_1" and result.n_nodes == count(later)
    assert len(result.random) == 2 and all(len(curve) == 3 for curve in result.random)
    with pytest.raises(UserError, match="attn_1"):
        from_start_site(nodes, "attn_9")
    silent = {site: site_nodes[:0] for site, site_nodes in nodes.items()}
    with pytest.raises(UserError, match="no node has an effect"):
        measure_faithfulness(Setting.of(tiny_model, tiny_saes), silent, tiny_prompts, progress=False)


def test_random_nodes_have_the_size_asked_for(nodes):
    drawn = random_nodes(nodes, 17, generator=torch.Generator().manual_seed(1))
    assert count(drawn) == 17


def test_padding_does_not_matter(tiny_model, tiny_saes, tiny_prompts, nodes):
    """The ratio over ragged prompts is that of the two lengths' summed metrics, measured apart."""
    options = FaithfulnessOptions(random=0)
    both, short, long = (
        measure_faithfulness(Setting.of(tiny_model, tiny_saes), nodes, part, options, sizes=[20], progress=False)
        for part in (tiny_prompts, tiny_prompts[0::2], tiny_prompts[1::2])
    )
    for name in ("m_model", "m_empty"):
        assert getattr(both, name) == pytest.approx((getattr(short, name) + getattr(long, name)) / 2, abs=1e-4)

    def m_circuit(result):
        return result.m_empty + result.faithfulness[0] * (result.m_model - result.m_empty)

    assert m_circuit(both) == pytest.approx((m_circuit(short) + m_circuit(long)) / 2, abs=1e-4)


def test_prompts_unlike_the_reference(tiny_model, tiny_saes, tiny_prompts, nodes):
    """Templates without a reference are counted; when none has one, the sentence says what to do."""
    options = FaithfulnessOptions(random=0)
    with pytest.raises(UserError, match="counterfactual"):
        measure_faithfulness(
            Setting.of(tiny_model, tiny_saes),
            nodes,
            tiny_prompts[0::2],
            options,
            reference=tiny_prompts[1::2],
            sizes=[5],
            progress=False,
        )
    result = measure_faithfulness(
        Setting.of(tiny_model, tiny_saes),
        nodes,
        tiny_prompts,
        options,
        reference=tiny_prompts[1::2],
        sizes=[5],
        progress=False,
    )
    assert result.n_prompts == 4 and result.n_uncovered == 4


def test_areas():
    """CPR and CMD of a straight line from 0 to 1: a half each; of a perfect circuit from the first node on: 1 and 0."""
    assert cpr([0.5, 1], [50, 100], 100) == pytest.approx(0.5)
    assert cmd([0.5, 1], [50, 100], 100) == pytest.approx(0.5)
    assert area([0, 0], [0, 100], 100) == 0
    assert cpr([0.3], [10], 10) == pytest.approx(0.15)
    with pytest.raises(ValueError, match="all 20 nodes"):
        cpr([0.3], [10], 20)


@pytest.mark.parametrize("errors", ["nodes", "ablate"])
def test_areas_are_those_under_the_points_measured(tiny_model, tiny_saes, tiny_prompts, nodes, errors):
    """Held-out prompts, where all nodes do not give the whole model back."""
    result = measure_faithfulness(
        Setting.of(tiny_model, tiny_saes),
        nodes,
        tiny_prompts[::2],
        FaithfulnessOptions(random=0, ablation="zero", errors=errors),
        sizes=[5, 20],
        progress=False,
    )
    assert result.sizes == [5, 20, result.n_nodes]
    if errors == "ablate":
        assert abs(result.faithfulness[-1] - 1) > 0.05
    assert result.to_frame()[["nodes", "faithfulness"]].values.tolist() == [
        *map(list, zip(result.sizes, result.faithfulness, strict=True))
    ]
    rows = [line.split() for line in result.table().splitlines()[1:]]
    printed = [(0, 0.0), *((int(row[0]), float(row[1])) for row in rows)]
    x, f = np.array(printed).T
    assert result.cpr == pytest.approx(trapezoid(f, x / result.n_nodes), abs=1e-3)
    assert result.cmd == pytest.approx(trapezoid(np.abs(1 - f), x / result.n_nodes), abs=1e-3)


@pytest.mark.parametrize("errors", ["keep", "ablate"])
@pytest.mark.parametrize("aggregation", ["sum", "position"])
def test_errors_by_their_definition(tiny_model, tiny_saes, tiny_prompts, aggregation, errors):
    """Zero ablation of the 20 strongest features alone, and of all others, with e left or set to 0 everywhere."""
    prompts = tiny_prompts[1::2]
    options = DiscoverOptions(method="attrib", aggregation=aggregation, edge_nodes=0)
    nodes = discover(tiny_model, tiny_saes, prompts, options, progress=False).nodes
    result = measure_faithfulness(
        Setting.of(tiny_model, tiny_saes),
        nodes,
        prompts,
        FaithfulnessOptions("zero", errors=errors, random=1),
        sizes=[20],
        progress=False,
    )
    features = {site: site_nodes[~site_nodes.is_error] for site, site_nodes in nodes.items()}
    chosen = select_nodes(features, top=20)
    assert result.n_nodes == count(features) and result.errors == errors

    def m(kept_of) -> float:
        def edit_of(site):
            sae = tiny_saes[site]
            left = kept_of(site)  # [1 or S, F]

            def edit(x):
                f = sae.encode(x)
                return sae.decode(f * left) + (x - sae.decode(f) if errors == "keep" else 0)

            return edit

        return mean_m(tiny_model, prompts, {site: edit_of(site) for site in nodes})

    def circuit(site):
        left = torch.zeros(1 if aggregation == "sum" else 7, tiny_saes[site].config.n_features)
        left[chosen[site].position.clamp(min=0), chosen[site].feature] = 1
        return left

    empty, whole = m(lambda site: torch.zeros(1)), mean_m(tiny_model, prompts)
    assert result.m_empty == pytest.approx(empty, abs=1e-5) and result.m_model == pytest.approx(whole, abs=1e-5)
    assert result.faithfulness[0] == pytest.approx((m(circuit) - empty) / (whole - empty), abs=1e-3)
    assert result.completeness[0] == pytest.approx(
        (m(lambda site: 1 - circuit(site)) - empty) / (whole - empty), abs=1e-3
    )
    with pytest.raises(UserError, match="keep"):
        FaithfulnessOptions(errors="kept")


@pytest.mark.slow
def test_intervals_against_loops(tiny_model, tiny_saes, tiny_prompts, nodes):
    """Ratios of resampled sums, from the metric of every prompt measured alone."""
    options = FaithfulnessOptions(random=0, resamples=50, seed=5)
    sizes = [10, 40]

    def measure(prompts):
        return measure_faithfulness(
            Setting.of(tiny_model, tiny_saes),
            nodes,
            prompts,
            options,
            reference=tiny_prompts,
            sizes=sizes,
            progress=False,
        )

    alone = [measure(tiny_prompts[[row]]) for row in range(8)]
    result = measure(tiny_prompts)
    draws = torch.randint(8, (50, 8), generator=torch.Generator().manual_seed(5)).tolist()
    whole = [one.m_model - one.m_empty for one in alone]
    curves = {name: [[getattr(one, name)[k] * y for one, y in zip(alone, whole, strict=True)] for k in range(3)]
              for name in ("faithfulness", "completeness")}  # fmt: skip
    share = np.array([0, *result.sizes]) / result.n_nodes
    areas = [(share[k + 1] - share[k - 1]) / 2 for k in (1, 2)] + [(1 - share[2]) / 2]
    x = np.array(curves["faithfulness"])  # [sizes, B]
    below = np.sign(1 - np.array(result.faithfulness) + 1e-12)[:, None] * (np.array(whole) - x)
    expected = {
        "cpr": [np.array(areas) @ x],
        "cmd": [np.array(areas) @ below + share[1] / 2 * np.array(whole)],
    } | curves
    for name, rows in expected.items():
        known = getattr(result.intervals, name)
        for bounds, row in zip([known] if name in ("cpr", "cmd") else known, rows, strict=True):
            if np.ptp(np.array(row) / np.array(whole)) > 1e-6:
                low, high = interval_by_hand(list(row), whole, draws, 0.95)
                low = max(low, 0.0) if name == "cmd" else low
                assert bounds == pytest.approx((low, high), rel=2e-2, abs=5e-3)
    known = result.intervals
    for bounds, f in zip(known.faithfulness, result.faithfulness, strict=True):
        assert bounds[0] <= f <= bounds[1]
    assert f"[{known.cpr[0]:.3f}, {known.cpr[1]:.3f}]" in result.areas()


@pytest.mark.slow
def test_plot_and_table(tiny_model, tiny_saes, tiny_prompts, nodes, tmp_path):
    result = measure_faithfulness(
        Setting.of(tiny_model, tiny_saes),
        nodes,
        tiny_prompts,
        FaithfulnessOptions(random=1),
        sizes=[5, 10],
        progress=False,
    )
    assert result.plot(tmp_path / "f.svg").read_text().lstrip().startswith("<?xml")
    assert len(result.table().splitlines()) == 4
    none_told = replace(result.intervals, completeness=[[float("nan")] * 2] * 3)
    assert replace(result, intervals=none_told).table().splitlines()[1].endswith("  -")
    assert result.to_dict()["sizes"] == [5, 10, result.n_nodes]
    assert Site.parse(result.start_site) == Site("embed")


def test_values_of_16_bit_activations_are_kept_in_float32(tiny_saes):
    """Their means are sums over all reference prompts."""
    sae = next(iter(tiny_saes.values()))
    x = torch.randn(3, 4, sae.config.d_model, generator=torch.Generator().manual_seed(0)).bfloat16()
    values = SiteValues.of(sae, x, torch.tensor([0, 3]))
    assert {part.dtype for part in (values.x, values.error, values.features)} == {torch.float32}
    torch.testing.assert_close(values.error, x.float() - sae(x.float()))

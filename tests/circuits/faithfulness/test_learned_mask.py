"""Learned masks: exact at both ends, gradients against finite differences, and true nodes found without any hint."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from circuits.attribution.activations import Setting
from circuits.attribution.nodes import SiteNodes, count, select_nodes
from circuits.discovery.discover import discover
from circuits.faithfulness.ablation import AblationValues, ablation_edits
from circuits.faithfulness.learned_mask import MaskOptions, learn_node_mask, starting_scores
from circuits.faithfulness.mask_descent import budget_range, draw_budgets, measure_behaviour
from circuits.faithfulness.mask_gates import Gates, budget_gates, mask_loss, masked_logits
from circuits.faithfulness.nodes import from_start_site
from circuits.metrics.metrics import logit_difference
from circuits.options import DiscoverOptions
from sae.errors import UserError
from sae.model.sites import Site
from tests.circuits.ground_truth import induction, recovery

QUICK = MaskOptions(steps=2, batch_size=4, smallest=5)


def every_node(saes):
    """All features and errors of all sites, with random effects."""
    nodes = {}
    for site, sae in saes.items():
        n = len(sae.W_dec)
        feature = torch.arange(n + 1)
        nodes[site] = SiteNodes(n, feature, torch.full_like(feature, -1), torch.rand(n + 1) + 0.1)
    return nodes


@pytest.fixture(scope="module")
def nodes(tiny_model, tiny_saes, tiny_prompts):
    options = DiscoverOptions(method="attrib", edge_nodes=0)
    return discover(tiny_model, tiny_saes, tiny_prompts, options, progress=False).nodes


@pytest.fixture(scope="module")
def gates(tiny_saes, tiny_prompts, nodes):
    return Gates(tiny_saes, nodes)


@pytest.fixture(scope="module")
def values(tiny_model, tiny_saes, tiny_prompts, gates):
    return AblationValues(
        Setting(tiny_model, tiny_saes, logit_difference), gates.table, "mean", reference=tiny_prompts
    )(tiny_prompts)


def metrics(model, prompts, edits=None):
    return logit_difference(model.run(prompts.clean, edits=edits, last_only=True).logits[:, -1], prompts)


def test_all_gates_open_leave_the_model_unchanged(tiny_model, tiny_saes, tiny_prompts):
    whole = every_node(tiny_saes)
    gates = Gates(tiny_saes, whole)
    values = AblationValues(
        Setting(tiny_model, tiny_saes, logit_difference), gates.table, "mean", reference=tiny_prompts
    )(tiny_prompts)
    plain = metrics(tiny_model, tiny_prompts)
    opened = metrics(tiny_model, tiny_prompts, gates.edits(torch.ones(1, gates.n), values, tiny_prompts))
    closed = metrics(tiny_model, tiny_prompts, gates.edits(torch.zeros(1, gates.n), values, tiny_prompts))
    torch.testing.assert_close(opened, plain, atol=1e-4, rtol=0)
    assert (closed - plain).abs().max() > 1e-2


def test_hard_gates_are_the_circuit_whose_faithfulness_is_measured(tiny_model, tiny_saes, tiny_prompts, nodes):
    """Every prompt with its own budget, against `ablation_edits` of the same strongest nodes."""
    gates = Gates(tiny_saes, nodes)
    values = AblationValues(
        Setting(tiny_model, tiny_saes, logit_difference), gates.table, "mean", reference=tiny_prompts
    )(tiny_prompts)
    budgets = torch.tensor([1, 5, 20, 60, 5, 20, 60, gates.n])
    at = budget_gates(starting_scores(nodes, "effects"), budgets, temperature=1e-5)
    assert at.sum(1).round().long().tolist() == budgets.tolist()
    ours = metrics(tiny_model, tiny_prompts, gates.edits(at, values, tiny_prompts))
    for row, budget in enumerate(budgets.tolist()):
        edits = ablation_edits(tiny_saes, gates.table, select_nodes(nodes, top=budget), values, tiny_prompts, keep=True)
        assert ours[row].item() == pytest.approx(metrics(tiny_model, tiny_prompts, edits)[row].item(), abs=1e-4)


def test_nodes_by_position_have_gates_by_position(tiny_model, tiny_saes, tiny_prompts):
    prompts = tiny_prompts[[0, 2, 4, 6]]
    length = int(prompts.clean.lengths.max())
    assert int(prompts.clean.lengths.min()) == length
    options = DiscoverOptions(method="attrib", edge_nodes=0, aggregation="position")
    nodes = discover(tiny_model, tiny_saes, prompts, options, progress=False).nodes
    gates = Gates(tiny_saes, nodes)
    values = AblationValues(Setting(tiny_model, tiny_saes, logit_difference), gates.table, "mean", reference=prompts)(
        prompts
    )
    at = budget_gates(starting_scores(nodes, "effects"), torch.tensor([40]), temperature=1e-5)
    edits = ablation_edits(tiny_saes, gates.table, select_nodes(nodes, top=40), values, prompts, keep=True)
    ours = metrics(tiny_model, prompts, gates.edits(at, values, prompts))
    torch.testing.assert_close(ours, metrics(tiny_model, prompts, edits), atol=1e-4, rtol=0)
    assert count(
        learn_node_mask(Setting.of(tiny_model, tiny_saes), nodes, prompts, QUICK, progress=False).nodes
    ) == count(nodes)


def test_gradient_against_finite_differences(tiny_model, tiny_saes, tiny_prompts, nodes, gates, values):
    """d loss / d score through sigmoid gates, along the gradient and along a random direction."""
    target = metrics(tiny_model, tiny_prompts)
    scores = starting_scores(nodes, "effects")

    def loss(at):
        gate = ((at + 4.0) / 2.0).sigmoid()[None]
        m = logit_difference(masked_logits(tiny_model, gates, gate, tiny_prompts, values), tiny_prompts)
        return mask_loss(m - target, torch.zeros(8), tiny_prompts.cases, match="cases")

    leaf = scores.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    random = torch.randn(len(scores), generator=torch.Generator().manual_seed(0))
    for direction, tolerance in ((gradient / gradient.norm(), 0.03), (random / random.norm(), 0.1)):
        step = 0.05
        with torch.no_grad():
            slope = (loss(scores + step * direction) - loss(scores - step * direction)).item() / (2 * step)
        expected = (gradient @ direction).item()
        assert slope == pytest.approx(expected, rel=tolerance, abs=0.02 * gradient.norm().item())


def test_gates_of_a_budget():
    """Half open at the threshold between the k-th score and the next; cold gates keep exactly the k highest."""
    scores = torch.tensor([0.0, 3.0, 1.0, 2.0, -2.0])
    budgets = torch.tensor([1, 3, 5])
    cold = budget_gates(scores, budgets, temperature=1e-3)
    assert cold.round(decimals=3).tolist() == [[0, 1, 0, 0, 0], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    warm = budget_gates(scores, budgets, temperature=0.5)
    torch.testing.assert_close(warm[1], torch.sigmoid((scores - 0.5) / 0.5))


@pytest.mark.parametrize(
    ("n", "options", "expected"),
    [
        (3000, {}, (60, 1000)),
        (3000, {"smallest": 10}, (10, 1000)),
        (3000, {"smallest": 2000}, (2000, 2000)),
        (3000, {"largest": 30}, (30, 30)),
        (20, {"smallest": 50, "largest": 100}, (20, 20)),
        (2, {}, (1, 1)),
    ],
)
def test_range_of_budgets(n, options, expected):
    assert budget_range(n, MaskOptions(**options)) == expected


def test_budgets_are_spread_log_uniformly():
    budgets = draw_budgets(64, smallest=10, largest=1000, generator=torch.Generator().manual_seed(0))
    assert budgets.min() >= 10 and budgets.max() <= 1000
    assert 28 <= (budgets < 100).sum() <= 36


def test_loss_of_cases_by_a_loop():
    """Off by +1 and -1 within a case costs nothing next to each other in budget, and is not paid for by other cases."""
    off = torch.tensor([1.0, -1.0, 2.0, 2.0])
    same = mask_loss(off, torch.tensor([5, 5, 5, 5]), ["a", "a", "b", "b"], match="cases")
    assert same.item() == pytest.approx((0 * 2 + 4 * 2) / 4)
    assert mask_loss(off, torch.zeros(4), ["a"] * 4, match="prompts").item() == pytest.approx(10 / 4)
    draw = torch.Generator().manual_seed(0)
    off, budgets = torch.randn(40, generator=draw), torch.randint(1, 500, (40,), generator=draw)
    cases = ["a" if row % 5 else "b" for row in range(40)]
    expected = 0.0
    for case, sizes in (("a", (16, 16)), ("b", (8,))):
        rows = sorted((row for row in range(40) if cases[row] == case), key=lambda row: int(budgets[row]))
        for size in sizes:
            group, rows = rows[:size], rows[size:]
            expected += sum(off[row].item() for row in group) ** 2 / size
    assert mask_loss(off, budgets, cases, match="cases").item() == pytest.approx(expected / 40, rel=1e-5)


@pytest.mark.slow
def test_the_true_nodes_are_found_without_attribution():
    """Induction model set by hand, scores alike at the start: what is kept longest are the nodes of its circuit."""
    truth = induction()
    options = MaskOptions(start="equal", steps=25, batch_size=16, smallest=5, largest=100)
    mask = learn_node_mask(
        Setting.of(truth.model, truth.saes), every_node(truth.saes), truth.prompts, options, progress=False
    )
    scores = {
        name: effect
        for site, here in mask.nodes.items()
        for name, effect in zip(here.ids(site), here.effect.tolist(), strict=True)
    }
    assert recovery(scores, truth.nodes, truth.all_nodes()).auroc > 0.9


def test_nothing_before_the_start_site_is_masked(tiny_model, tiny_saes, tiny_prompts, nodes):
    options = MaskOptions(steps=2, batch_size=4, smallest=5, start_site="attn_1")
    mask = learn_node_mask(Setting.of(tiny_model, tiny_saes), nodes, tiny_prompts, options, progress=False)
    assert min(mask.nodes) == Site("attn", 1)


@pytest.mark.parametrize("first", ["attn_0", "attn_1", "mlp_1", "resid_1"])
def test_starting_at_the_first_masked_site_changes_nothing(tiny_model, tiny_saes, tiny_prompts, nodes, first):
    """The metric with everything before taken from the clean run, against that of a whole run."""
    later = from_start_site(nodes, first)
    gates = Gates(tiny_saes, later)
    reference = AblationValues(
        Setting(tiny_model, tiny_saes, logit_difference), gates.table, "mean", reference=tiny_prompts
    )
    before = measure_behaviour(gates, reference, tiny_prompts, batch_size=1).clean
    at = budget_gates(starting_scores(later, "effects"), torch.tensor([10]), temperature=1.0)
    skip = tiny_model.resume_from(Site.parse(first), before)
    assert skip
    metric = [
        logit_difference(
            masked_logits(tiny_model, gates, at, tiny_prompts, reference(tiny_prompts), skip=start), tiny_prompts
        )
        for start in (skip, None)
    ]
    torch.testing.assert_close(metric[0], metric[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("errors", ["keep", "ablate"])
def test_errors_that_are_no_nodes(tiny_model, tiny_saes, tiny_prompts, nodes, errors):
    options = MaskOptions(steps=2, batch_size=4, smallest=5, errors=errors)
    mask = learn_node_mask(Setting.of(tiny_model, tiny_saes), nodes, tiny_prompts, options, progress=False)
    assert not any(here.is_error.any() for here in mask.nodes.values())
    features = {site: here[~here.is_error] for site, here in nodes.items()}
    gates = Gates(tiny_saes, features, errors=errors)
    _, error, _ = gates.of(Site("resid", 0), torch.zeros(1, gates.n), tiny_prompts)
    assert error.unique().tolist() == [1.0 if errors == "keep" else 0.0]


@pytest.mark.slow
def test_the_ranking_is_a_permutation_of_the_nodes_and_repeats_by_seed(tiny_model, tiny_saes, tiny_prompts, nodes):
    first, again, other = (
        learn_node_mask(Setting.of(tiny_model, tiny_saes), nodes, tiny_prompts, options, progress=False)
        for options in (QUICK, QUICK, replace(QUICK, seed=1))
    )
    assert first.losses == again.losses != other.losses
    assert len(first.losses) == 2
    for site, here in first.nodes.items():
        assert torch.equal(here.feature, again.nodes[site].feature)
        assert here.feature.sort().values.tolist() == nodes[site].feature.sort().values.tolist()
        assert (here.effect.diff() < 0).all() and (first.scores[site].diff() <= 0).all()
    effects = torch.cat([here.effect for here in first.nodes.values()])
    assert effects.unique().numel() == count(nodes) and effects.max() == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [MaskOptions(steps=2), MaskOptions(steps=2, ablation="resample"), MaskOptions(steps=2, ablation="optimal"),
     MaskOptions(steps=2, match="prompts")],
)  # fmt: skip
def test_a_mask_does_not_depend_on_how_many_prompts_run_at_once(tiny_model, tiny_saes, tiny_prompts, nodes, options):
    few, all_of_them = (
        learn_node_mask(
            Setting.of(tiny_model, tiny_saes), nodes, tiny_prompts, replace(options, batch_size=size), progress=False
        )
        for size in (3, 64)
    )
    assert few.losses == pytest.approx(all_of_them.losses, rel=1e-3)


def test_no_mask_is_learned_on_no_nodes(tiny_model, tiny_saes, tiny_prompts, nodes):
    none = {site: site_nodes[:0] for site, site_nodes in nodes.items()}
    with pytest.raises(UserError, match="no node has an effect from mlp_1 on"):
        learn_node_mask(
            Setting.of(tiny_model, tiny_saes), none, tiny_prompts, MaskOptions(start_site="mlp_1"), progress=False
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {"errors": "kept"},
        {"start": "zero"},
        {"match": "all"},
        {"steps": 0},
        {"smallest": 50, "largest": 20},
        {"temperature": 0.0},
    ],
)
def test_wrong_options_are_told(wrong):
    with pytest.raises(UserError):
        MaskOptions(**wrong)

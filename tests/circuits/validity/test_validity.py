"""Verdicts of the validity report on transformers whose circuit was planted, and its numbers by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from circuits.attribution.activations import Setting
from circuits.attribution.nodes import SiteNodes, ranked, select_nodes
from circuits.discovery.discover import discover
from circuits.faithfulness.nodes import faithfulness, metrics_of_sets, set_up
from circuits.faithfulness.optimal_ablation import ablation_values
from circuits.options import DiscoverOptions, FaithfulnessOptions, ValidityOptions
from circuits.uncertainty.bootstrap import Bootstrap
from circuits.uncertainty.verification import Verification
from circuits.validity import checks
from circuits.validity.backups import _run_both, effects_without, grown, next_strongest
from circuits.validity.families import _half, _transfer, cluster_prompts
from circuits.validity.overlap import NodeValues, jaccard, overlap_between, resample_overlap
from circuits.validity.results import Backups, judge
from circuits.validity.validate import validate
from sae.autoencoder import SparseAutoencoder
from sae.errors import UserError
from sae.model.sites import Site
from tests.circuits.conftest import MIXED, with_spans
from tests.circuits.ground_truth import GroundTruth, Head, Layer, Neuron, Plan, _prompts, agreement, build

NUMBERS = ("sg", "pl")
NOUNS = ("boy", "girl", "dog", "cat")
VERB = {"sg": "runs", "pl": "run"}
EMBED = {"bos": {}, "then": {}, "runs": {}, "run": {}, "first?": {"first?": 1.0}, "second?": {"second?": 1.0}} | {
    f"{noun}_{number}": {noun: 1.0, number: 1.0} for noun in NOUNS for number in NUMBERS
}
PLACES = [f"p{n}" for n in range(6)]
TINY = ValidityOptions(nodes=10, removed=10, verify=10, resamples=200)


def pairs(model, asked: list[str], rows: int):
    """`bos NOUN NOUN first?`: the verb agrees with the noun asked for, and the pair flips that noun's number."""
    random = np.random.default_rng(0)
    prompts = []
    for row in range(rows):
        question, (one, other) = asked[row % len(asked)], random.permutation(NUMBERS)
        nouns, noise = random.choice(NOUNS, 2), random.choice(NUMBERS, 2)
        clean, patch = ([f"{noun}_{number}" for noun, number in zip(nouns, noise, strict=True)] for _ in range(2))
        at = 0 if question == "first?" else 1
        clean[at], patch[at] = f"{nouns[at]}_{one}", f"{nouns[at]}_{other}"
        end = ["first?"] if at == 0 else ["then", "second?"]  # of another length, and so of another template
        prompts.append((["bos", *clean, *end], ["bos", *patch, *end], VERB[one], VERB[other]))
    return _prompts(model, prompts)


def two_mechanisms() -> GroundTruth:
    """Two heads, each asked by its own last word, look at a noun each and write the number in features of their own."""
    heads = [
        Head([(own, place, 16.0), (other, "p0", 16.0)], {number: f"{own}_{number}" for number in NUMBERS})
        for own, other, place in (("first?", "second?", "p1"), ("second?", "first?", "p2"))
    ]
    unembed = {VERB[number]: {f"{asked}_{number}": 2.0 for asked in ("first?", "second?")} for number in NUMBERS}
    model, saes, features = build(Plan(EMBED, [{place: 1.0} for place in PLACES], [Layer(heads)], unembed))
    return GroundTruth(model, saes, pairs(model, ["first?", "second?"], 40), features)


def with_backup() -> GroundTruth:
    """Two heads carry the number; what the second carries is read only where the first one's reader is silent."""
    heads = [
        Head([("first?", "p1", 16.0)], {number: f"{route}_{number}" for number in NUMBERS})
        for route in ("main", "spare")
    ]
    readers = [Neuron({f"main_{number}": 1.0}, 0.0, {f"verb_{number}": 1.0}) for number in NUMBERS]
    spare = [
        Neuron({f"spare_{number}": 1.0, f"verb_{number}": -1.0}, -0.1, {f"again_{number}": 2.0}) for number in NUMBERS
    ]
    plan = Plan(
        EMBED, [{place: 1.0} for place in PLACES], [Layer(heads), Layer([], readers), Layer([], spare)],
        {VERB[number]: {f"verb_{number}": 2.0, f"again_{number}": 2.0} for number in NUMBERS},
    )  # fmt: skip
    model, saes, features = build(plan)
    return GroundTruth(model, saes, pairs(model, ["first?"], 32), features)


@pytest.fixture(scope="module")
def planted():
    """One mechanism, by position."""
    truth = agreement(repeats=8)
    return discover(truth.model, truth.saes, truth.prompts, aggregation="position", edge_nodes=0, progress=False)


@pytest.fixture(scope="module")
def report(planted):
    return validate(planted, options=TINY, progress=False)


@pytest.mark.slow
def test_a_planted_circuit_holds(report):
    verdicts = {check.name: check.verdict for check in report.checks}
    assert set(verdicts) == {"faithfulness", "prompts", "resamples", "families", "backups", "sums", "exact"}
    assert set(verdicts.values()) == {"holds"}, report.text()
    assert report.families.sizes == [16] and not report.backups.names
    assert all(check.name in report.text() and check.words for check in report.checks)
    assert report.to_frame()["value"].notna().all()


@pytest.mark.slow
def test_numbers_are_those_of_their_own_commands(planted, report):
    curve = faithfulness(planted, options=FaithfulnessOptions(random=0, resamples=200), sizes=[10], progress=False)
    check = report.check("faithfulness")
    assert check.value == pytest.approx(curve.faithfulness[0])
    assert check.interval == pytest.approx(curve.intervals.faithfulness[0])
    assert report.backups.left == pytest.approx(curve.completeness[0], abs=1e-6)
    assert report.check("sums").value == planted.metadata["completeness"]["mean_residual"]


@pytest.mark.slow
def test_two_planted_mechanisms_are_told_apart():
    truth = two_mechanisms()
    circuit = discover(truth.model, truth.saes, truth.prompts, edge_nodes=0, progress=False)
    report = validate(circuit, options=replace(TINY, nodes=6, verify=0), progress=False)
    asked = [text.split()[-1] for text in truth.prompts.texts]
    assert adjusted_rand_score(asked, report.families.labels) >= 0.95
    check = report.check("families")
    assert check.verdict == "fails" and "2 mechanisms" in check.words
    matrix = np.array(report.families.faithfulness)
    assert matrix.diagonal().min() > 0.9 and abs(matrix[~np.eye(2, dtype=bool)]).max() < 0.1
    questions = [asked[report.families.labels.index(n)] for n in (0, 1)]
    for question, names in zip(questions, report.families.names, strict=True):
        assert {truth.node(site, f"{question}_{n}") for site in ("attn_0", "resid_0") for n in NUMBERS} <= set(names)
    assert "on" in report.text() and "family 2, 20 prompts" in report.text()


@pytest.mark.slow
def test_a_planted_backup_is_found():
    truth = with_backup()
    circuit = discover(truth.model, truth.saes, truth.prompts, edge_nodes=0, progress=False)
    report = validate(circuit, options=replace(TINY, start_site="attn_0", verify=0), progress=False)
    check, found = report.check("backups"), report.backups
    spare = {
        truth.node(site, f"{name}_{number}")
        for number in NUMBERS
        for name, sites in (("spare", ("attn_0", "resid_0", "resid_1")), ("again", ("mlp_2", "resid_2")))
        for site in sites
    }
    assert check.verdict == "fails" and "take over" in check.words
    assert spare <= set(found.names)
    assert found.left > 0.5 and abs(found.left_without_backups) < 0.1 and found.left_without_next > 0.5


# ------------------------------------------------------------------------------------------ elsewhere


@pytest.mark.slow
def test_the_same_dictionaries_in_another_order_are_the_same_circuit(planted):
    def shuffled(sae):
        order = torch.randperm(sae.config.n_features, generator=torch.Generator().manual_seed(0))
        tensors = {name: x[order] if len(x) == len(order) else x for name, x in sae.state_dict().items()}
        return SparseAutoencoder(sae.config, tensors)

    others = {site: shuffled(sae) for site, sae in planted.saes.items()}
    report = validate(
        planted, options=replace(TINY, verify=0), other_saes=others, paraphrases=planted.prompts, progress=False
    )
    check = report.check("other-saes")
    assert check.verdict == "holds" and check.value == 1.0 and check.interval == (1.0, 1.0)
    assert check.words.startswith("100 % of its features")
    check = report.check("paraphrases")
    assert check.verdict == "holds" and check.words.endswith("1.00")


def test_other_dictionaries_that_lack_the_start_site_are_told_before_any_work(planted, monkeypatch):
    def nothing_is_measured(*_, **__):
        raise AssertionError("measured before the options were checked")

    monkeypatch.setattr("circuits.validity.validate.metrics_of_sets", nothing_is_measured)
    first, *later = planted.saes
    others = {site: planted.saes[site] for site in later}
    with pytest.raises(UserError, match=rf"start site {first}: give autoencoders at the same sites"):
        validate(planted, options=replace(TINY, start_site=first.name), other_saes=others, progress=False)


# ------------------------------------------------------------------------------------------ by hand


def test_overlap_of_resamples_by_hand():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(12, 30, generator=generator) + torch.linspace(0, 2, 30)
    groups = torch.arange(12) // 2
    nodes = NodeValues([str(n) for n in range(30)], values, groups)
    bootstrap = Bootstrap(resamples=50)
    sets = []
    for counts in bootstrap.counts(6).int().tolist():
        rows = [row for group, n in enumerate(counts) for row in [2 * group, 2 * group + 1] * n]
        sets.append(set(values[rows].mean(0).abs().topk(5).indices.tolist()))
    pairs = [len(a & b) / len(a | b) for a, b in zip(sets, [sets[-1], *sets[:-1]], strict=True)]
    found = resample_overlap(nodes, 5, bootstrap)
    assert found.value == pytest.approx(np.mean(pairs))
    assert found.interval == pytest.approx(tuple(np.quantile(pairs, [0.025, 0.975])))
    assert found.core == sum(sum(n in one for one in sets) >= 0.95 * 50 for n in range(30))
    few = replace(nodes, groups=groups // 2)
    assert resample_overlap(few, 5, bootstrap).interval is None is overlap_between(nodes, few, 5, bootstrap).interval
    other = replace(nodes, names=[str(n + 3) for n in range(30)])
    assert overlap_between(nodes, nodes, 5, bootstrap).interval == (1.0, 1.0) != found.interval  # of the same draws
    best = set(values.mean(0).abs().topk(5).indices.tolist())
    moved = {n + 3 for n in best}
    assert overlap_between(nodes, other, 5, bootstrap).value == pytest.approx(len(best & moved) / len(best | moved))
    assert jaccard(torch.tensor([[True, True, False]]), torch.tensor([[True, False, False]])).tolist() == [0.5]


def test_worst_prompts_and_their_shares(planted, report):
    """The share of the prompt listed first, from runs of it alone with the ablation values of all."""
    worst = report.prompts.worst[0]
    row = planted.prompts.texts.index(worst.text)
    nodes, one, reference, _ = set_up(planted.setting(), planted.nodes, planted.prompts[[row]], planted.prompts, TINY)
    m = metrics_of_sets(
        planted.setting(), [(select_nodes(nodes, top=10), True)], one, TINY, nodes=nodes, reference=reference,
        progress=False,
    )[:, 0]  # fmt: skip
    assert worst.faithfulness == pytest.approx(float((m[2] - m[1]) / (m[0] - m[1])), abs=1e-4)
    shares = [prompt.faithfulness for prompt in report.prompts.worst]
    assert shares == sorted(shares) and shares[0] <= report.prompts.quartiles[0]


@pytest.mark.parametrize(
    ("value", "interval", "at_most", "verdict"),
    [(0.9, (0.85, 0.95), False, "holds"), (0.9, (0.7, 0.95), False, "doubtful"), (0.5, (0.4, 0.6), False, "fails"),
     (0.5, None, False, "fails"), (0.1, (0.0, 0.2), True, "holds"), (0.9, (0.8, 1.0), True, "doubtful"),
     (0.9, (0.85, 1.0), True, "fails"), (float("nan"), None, False, "untold")],
)  # fmt: skip
def test_verdicts(value, interval, at_most, verdict):
    assert judge(value, 0.8, interval, at_most=at_most) == verdict


def test_families_are_far_apart_and_large_enough():
    """Two groups of directions: .05 apart they are one family, at a right angle two, with three prompts in one none."""
    noise = 0.01 * torch.randn(16, 8, generator=torch.Generator().manual_seed(0))

    def grouped(n: int, cosine: float) -> torch.Tensor:
        values = noise.clone()
        values[:, 0] += 1
        values[:n, :2] += torch.tensor([cosine - 1, (1 - cosine**2) ** 0.5])
        return values

    assert set(cluster_prompts(grouped(8, 0.95), 3).labels) == {0}
    split = cluster_prompts(grouped(7, 0.0), 3)
    assert split.labels == [1] * 7 + [0] * 9 and split.silhouette > 0.9
    three = grouped(8, 0.0)  # two groups .15 apart, and one at a right angle: two families, not three
    three[12:, 0], three[12:, 2] = 0.85 + noise[12:, 0], (1 - 0.85**2) ** 0.5 + noise[12:, 2]
    assert cluster_prompts(three, 3).labels == [0] * 8 + [1] * 8
    assert set(cluster_prompts(grouped(3, 0.0), 3).labels) == {0}
    assert cluster_prompts(grouped(3, 0.0)[:11], 3).likeness is None


def test_halves_go_by_template_where_there_are_several():
    inside = torch.tensor([True] * 6 + [False] * 2)
    groups = torch.tensor([5, 5, 5, 7, 7, 9, 5, 7])
    assert _half(inside, groups, 0).tolist() == [0, 1, 2, 5] and _half(inside, groups, 1).tolist() == [3, 4]
    same = torch.zeros(8, dtype=torch.long)
    assert _half(inside, same, 0).tolist() == [0, 2, 4] and _half(inside, same, 1).tolist() == [1, 3, 5]


def test_transfer_by_hand():
    """m of the whole model, of no node, and of the circuits of three families, on two prompts of each."""
    family = torch.tensor([0, 0, 1, 1, 2, 2])
    m = torch.full((5, 6), 2.0)
    m[0], m[1] = 10.0, 2.0
    for number, own in enumerate((6.0, 10.0, 4.0)):
        m[2 + number, family == number] = own  # restores 4, 8 and 2
    m[2, family == 1] = 8.0  # the first circuit restores 6 of the second family's 8
    value, interval = _transfer(m, family, torch.zeros(6), ValidityOptions())
    assert value == pytest.approx((2 * 6 / 2) / (2 * (4 + 8 + 2))) and interval is None
    _, interval = _transfer(m.repeat(1, 3), family.repeat(3), torch.arange(18), ValidityOptions(resamples=200))
    assert interval is not None and interval[0] < value < interval[1]


def test_what_may_be_left_and_missed_is_held_against_a_bar_from_above():
    def backups(left: float, beside: float, alone: float) -> checks.Check:
        return checks.backups(Backups(20, ["a/1"], [0.1], [0.5], left, beside, alone), None)

    assert backups(0.1, 0.0, 0.0).verdict == "holds" and "nothing takes over" in backups(0.1, 0.0, 0.0).words
    assert backups(0.5, 0.1, 0.4).verdict == "fails" and "take over" in backups(0.5, 0.1, 0.4).words
    assert "the rest is spread" in backups(0.5, 0.4, 0.1).words
    sums = {"completeness": {"mean_residual": 0.01, "worst_residual": 0.5, "worst_site": "embed"}}
    assert checks.sum_check(sums, adds_up=True, bar=0.05).verdict == "holds"
    assert checks.sum_check(sums, adds_up=True, bar=0.005).verdict == "fails"
    shared = {"names": ["a", "b", "c", "d"], "estimated": [1.0, 1.0, 1.0, 1.0], "exact": [5.0, 1.0, 1.0, -1.0]}
    assert checks.exact(Verification(**shared, shared=True)).value == 0.75  # shares are compared by their sign alone
    assert checks.exact(Verification(**shared, shared=False)).value == 0.5


def test_removed_nodes_have_the_same_values_in_both_runs(tiny_model, tiny_saes, tiny_prompts):
    """With counterfactual ablation those of the patch prompt; x of both runs of a batch, by hand."""
    site, prompts = Site("embed"), tiny_prompts[1::2]
    sae, setting = tiny_saes[site], Setting.of(tiny_model, {site: tiny_saes[site]})
    clean, patch = (
        tiny_model.run(tokens, capture=[site]).activations[site] for tokens in (prompts.clean, prompts.patch)
    )
    change = sae.encode(patch) - sae.encode(clean)
    feature = int(change.abs().sum((0, 1)).argmax())
    removed = {site: SiteNodes(48, torch.tensor([feature]), torch.tensor([-1]), torch.ones(1))}
    values = ablation_values(
        setting, "counterfactual", [(removed, False)], nodes=removed, named=[removed], reference=prompts, seed=0,
        batch_size=8, progress=False,
    )  # fmt: skip
    states, _ = _run_both(setting, prompts, [site], values, removed)
    moved = change[..., feature, None] * sae.W_dec[feature]
    assert moved.abs().max() > 0.01
    torch.testing.assert_close(states.clean[site], clean + moved, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(states.patch[site], patch, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ablation", ["mean", "zero", "counterfactual", "resample"])
def test_nothing_is_left_to_carry_where_all_before_is_removed(tiny_model, tiny_saes, tiny_prompts, ablation):
    """Every feature and error up to the first block at the same values in both runs: those behind are the same too."""
    setting = Setting.of(tiny_model, tiny_saes)
    every = {}
    for site, sae in tiny_saes.items():
        feature = torch.arange(sae.config.n_features + 1)
        every[site] = SiteNodes(len(feature) - 1, feature, torch.full_like(feature, -1), torch.ones(len(feature)))
    removed = {site: nodes if site <= Site("resid", 0) else nodes[:0] for site, nodes in every.items()}
    how = replace(TINY, ablation=ablation, batch_size=3)
    before, after = effects_without(setting, removed, every, tiny_prompts, tiny_prompts, how, "sum")
    later = [site for site in every if site > Site("resid", 0)]
    assert max(float(before[site].effect.abs().sum()) for site in later) > 0.01
    assert max(float(after[site].effect.abs().sum()) for site in later) < 1e-4


@pytest.mark.parametrize(("aggregation", "one_way"), [("sum", False), ("spans", False), ("sum", True)])
def test_effects_with_nothing_removed_are_the_circuits(tiny_model, tiny_saes, tiny_prompts, aggregation, one_way):
    """In several batches; with the strongest gone they are others."""
    prompts = with_spans(tiny_prompts, MIXED) if aggregation == "spans" else tiny_prompts
    prompts = replace(prompts, patch=None, patch_answers=None) if one_way else prompts
    options = DiscoverOptions(method="attrib", aggregation=aggregation, edge_nodes=0, sites="resid")
    circuit = discover(tiny_model, tiny_saes, prompts, options, progress=False)
    removed, how = select_nodes(circuit.nodes, top=3), replace(TINY, batch_size=3)
    before, after = effects_without(circuit.setting(), removed, circuit.nodes, prompts, prompts, how, aggregation)
    assert dict(ranked(before)) == pytest.approx(dict(ranked(circuit.nodes)), abs=1e-5)
    assert dict(ranked(after)) != pytest.approx(dict(ranked(circuit.nodes)), abs=1e-3)


def test_backups_are_what_grows_towards_the_behaviour():
    site = Site.parse("mlp_0")

    def nodes(*effects: float) -> dict[Site, SiteNodes]:
        feature = torch.arange(len(effects))
        return {site: SiteNodes(8, feature, torch.full_like(feature, -1), torch.tensor(effects))}

    before, after = nodes(-1.0, -0.2, 0.3, 0.0, -0.1), nodes(-3.0, -0.6, -0.4, 0.5, -0.105)
    removed = {site: before[site][:1]}
    rows = grown(before, after, removed, scale=-1.0, most=9)
    assert [(name, round(old, 3), round(new, 3)) for name, old, new in rows] == [
        ("mlp_0/1", -0.2, -0.6), ("mlp_0/2", 0.3, -0.4),
    ]  # fmt: skip
    assert [name for name, _, _ in grown(before, after, removed, scale=1.0, most=9)] == ["mlp_0/3"]
    assert next_strongest(before, removed, 2)[site].feature.tolist() == [1, 2]

"""Edits against decoding the changed features and adding the error back, written out in full."""

from __future__ import annotations

import json

import pytest
import torch

from circuits.discovery.discover import discover
from circuits.editing import edit as editing
from circuits.editing.applied import feature_means, with_references
from circuits.editing.random_features import active_features, random_features
from circuits.editing.records import Behaviour, Score
from circuits.editing.results import EditReport
from circuits.editing.site_edit import make_edits
from circuits.editing.targets import feature_names, needs_spans, parse_features, split_by_span
from circuits.metrics import metrics as behaviour
from circuits.options import DiscoverOptions
from sae.data.predictions import cross_entropy
from sae.errors import UserError
from sae.model.sites import Site
from tests.circuits.conftest import MIXED, with_spans
from tests.near import assert_near

OPERATIONS = [("zero", None), ("mean", None), ("set", 0.7), ("scale", 2.5), ("steer", 0.3)]


def changed(f: torch.Tensor, index: list[int], operation: str, value: float | None, mean: torch.Tensor) -> torch.Tensor:
    """f [..., F] with the features of `index` changed."""
    f = f.clone()
    for column, i in enumerate(index):
        if operation == "zero":
            f[..., i] = 0
        elif operation == "mean":
            f[..., i] = mean[column]
        elif operation == "set":
            f[..., i] = value
        elif operation == "scale":
            f[..., i] *= value
        elif operation == "steer":
            f[..., i] += value
    return f


@pytest.mark.parametrize("architecture", ["topk", "relu", "jumprelu"])
@pytest.mark.parametrize(("operation", "value"), OPERATIONS)
def test_an_edit_is_decoding_changed_features_plus_the_error(
    tiny_model, tiny_prompts, make_saes, architecture, operation, value
):
    saes = make_saes(tiny_model, architecture=architecture)
    site = Site("resid", 0)
    sae, index, mean = saes[site], [3, 7, 20], torch.tensor([0.1, 0.2, 0.3])
    x = tiny_model.run(tiny_prompts.clean, capture=[site]).activations[site]

    f = sae.encode(x)
    error = x - sae.decode(f)
    spliced = sae.decode(changed(f, index, operation, value, mean)) + error

    features, means = {site: torch.tensor(index)}, {site: mean}
    edits = make_edits(saes, features, operation=operation, value=value, means=means)
    assert not torch.allclose(spliced, x, atol=1e-4)
    assert_near(edits[site](x), spliced)

    run = tiny_model.run(tiny_prompts.clean, edits=edits)
    expected = tiny_model.run(tiny_prompts.clean, edits={site: lambda _: spliced})
    assert_near(run.logits, expected.logits)


def test_edits_at_several_sites_read_what_earlier_edits_left(tiny_model, tiny_prompts, tiny_saes):
    first, last = Site("resid", 0), Site("resid", 1)
    chosen = {site: torch.arange(48) for site in (first, last)}
    run = tiny_model.run(tiny_prompts.clean, capture=[last], edits=make_edits(tiny_saes, chosen))
    before = tiny_model.run(tiny_prompts.clean, capture=[last], edits=make_edits(tiny_saes, {first: chosen[first]}))
    x = before.activations[last]
    features = tiny_saes[last].encode(x)
    assert_near(run.activations[last], x - features @ tiny_saes[last].W_dec)


def test_features_are_found_by_name(tiny_saes):
    chosen = parse_features("resid_1/5, mlp_0/7,resid.1/2,resid_1/5", tiny_saes)
    assert feature_names(chosen) == ["mlp_0/7", "resid_1/2", "resid_1/5"]
    assert feature_names(parse_features(["mlp_0/7"], tiny_saes)) == ["mlp_0/7"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("resd_1/5", "unknown site 'resd_1'.*did you mean 'resid_1'"),
        ("resid_1/48", "resid_1 has features 0 to 47; did you mean 'resid_1/47'"),
        ("resid_1/-1", "resid_1 has features 0 to 47"),
        ("resid_1/error", "is the error of its site"),
        ("resid_1", "is not a feature: write site/index"),
        ("", "is not a feature"),
        ([], "no features to edit"),
    ],
)
def test_unknown_features(tiny_saes, names, message):
    with pytest.raises(UserError, match=message):
        parse_features(names, tiny_saes)


@pytest.mark.parametrize(
    ("operation", "value", "message"),
    [
        ("zap", None, "unknown operation 'zap'"),
        ("set", None, "'set' needs a value"),
        ("zero", 1.0, "'zero' takes no value"),
        ("mean", None, "needs the means"),
    ],
)
def test_wrong_operations(tiny_saes, operation, value, message):
    with pytest.raises(UserError, match=message):
        make_edits(tiny_saes, {}, operation=operation, value=value)


def test_active_features_and_means(tiny_model, tiny_prompts, tiny_saes):
    active = active_features(tiny_model, tiny_saes, tiny_prompts, batch_size=3)
    real = tiny_prompts.clean.attention_mask.bool()
    run = tiny_model.run(tiny_prompts.clean, capture=list(tiny_saes))
    for site, sae in tiny_saes.items():
        f = sae.encode(run.activations[site])[real]
        assert active[site].tolist() == (f != 0).any(0).nonzero().flatten().tolist()
        index = torch.tensor([1, 6])
        means = feature_means(tiny_model, tiny_saes, {site: index}, [batch.clean for batch in tiny_prompts.batches(3)])
        assert_near(means[site], f[:, index].mean(0))


@pytest.mark.parametrize("same_sites", [True, False])
def test_random_features_are_active_others(same_sites):
    a, b, c = Site("embed"), Site("mlp", 0), Site("resid", 0)
    active = {a: torch.arange(20), b: torch.arange(50, 60), c: torch.arange(5)}
    like = {a: torch.tensor([2, 3, 4]), b: torch.tensor([55])}
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(60):
        drawn = random_features(active, like, generator=generator, same_sites=same_sites)
        assert sum(map(len, drawn.values())) == 4
        assert all(torch.isin(index, active[site]).all() for site, index in drawn.items())
        assert not set(feature_names(drawn)) & set(feature_names(like))
        if same_sites:
            assert {site: len(index) for site, index in drawn.items()} == {a: 3, b: 1}
        seen |= set(feature_names(drawn))
    assert len(seen) == (17 + 9 if same_sites else 17 + 9 + 5)


def test_cross_entropy_against_single_texts(tiny_model, tiny_prompts):
    batch = tiny_prompts.clean
    total, count = 0.0, 0
    for row in range(len(batch)):
        ids = batch.input_ids[row][batch.attention_mask[row].bool()]
        alone = tiny_prompts[row].clean
        log_p = tiny_model.run(alone).logits[0].log_softmax(-1)
        for position in range(len(ids) - 1):
            total -= log_p[position, ids[position + 1]].item()
            count += 1
    assert cross_entropy(tiny_model, [batch]) == pytest.approx(total / count, abs=1e-5)


@pytest.fixture(scope="module")
def report(tiny_model, tiny_prompts, tiny_saes) -> EditReport:
    chosen = active_features(tiny_model, tiny_saes, tiny_prompts)
    names = feature_names(chosen)[::7]
    texts = [tiny_model.tokenizer.decode(row) for row in tiny_prompts.clean.input_ids[1::2].tolist()]
    return editing.measure_edit(
        tiny_model,
        tiny_saes,
        editing.Edit(names),
        tiny_prompts,
        editing.EditOptions(texts=texts, generate=3, new_tokens=4, n_random=3),
    )


@pytest.mark.slow
def test_report_agrees_with_a_run_by_hand(report, tiny_model, tiny_prompts, tiny_saes):
    edits = make_edits(tiny_saes, parse_features(report.features, tiny_saes))
    rows = torch.arange(len(tiny_prompts))
    for scores, run in [
        (report.before, tiny_model.run(tiny_prompts.clean)),
        (report.after, tiny_model.run(tiny_prompts.clean, edits=edits)),
    ]:
        last = run.logits[:, -1]
        difference = last[rows, tiny_prompts.clean_answers] - last[rows, tiny_prompts.patch_answers]
        assert scores.overall.metric == pytest.approx(difference.mean().item(), abs=1e-5)
        assert scores.overall.accuracy == pytest.approx((difference > 0).float().mean().item())
        assert scores.by_case["b_a"].metric == pytest.approx(difference[4:].mean().item(), abs=1e-5)
        assert scores.by_case["a_b"].n == 4
    assert report.after.overall.metric != pytest.approx(report.before.overall.metric, abs=1e-4)
    assert report.ce_increase == pytest.approx(report.after.ce - report.before.ce)
    assert len(report.random) == len(report.random_features) == 3


@pytest.mark.slow
def test_continuations_alternate_cases_and_are_the_models_own(report, tiny_model, tiny_prompts):
    assert [sample.prompt for sample in report.continuations] == ["prompt 0", "prompt 4", "prompt 1"]
    ids = tiny_prompts[0].clean
    for _ in range(4):
        best = tiny_model.run(ids).logits[:, -1].argmax(-1, keepdim=True)
        ids = type(ids)(torch.cat([ids.input_ids, best], 1), torch.ones(1, ids.n_positions + 1, dtype=torch.long))
    expected = tiny_model.tokenizer.decode(ids.input_ids[0, -4:].tolist(), skip_special_tokens=True)
    assert report.continuations[0].before == expected


def test_report_survives_json_and_is_readable(report, tmp_path):
    report.save(tmp_path / "edit.json")
    data = json.loads((tmp_path / "edit.json").read_text())
    assert data["schema_version"] == 1
    assert data["features"] == report.features
    assert data["after"]["by_case"]["a_b"]["metric"] == report.after.by_case["a_b"].metric
    before, after = (report.before.by_case[case].metric for case in ("a_b", "b_a")), report.after.by_case
    by_case = {case: after[case].metric / m for case, m in zip(("a_b", "b_a"), before, strict=True)}
    assert data["remaining_by_case"] == pytest.approx(by_case)
    table = report.text()
    assert "set to zero on 8 prompts" in table
    frame = report.to_frame().set_index(["quantity", "case"])
    assert frame.loc[(report.metric, "a_b"), "left"] == report.remaining_by_case["a_b"]
    assert "random features (3 draws)" in table
    assert "CE on 4 texts" in table
    assert max(map(len, table.splitlines())) <= 120


def edit_report(before: dict, after: dict, **options) -> EditReport:
    """An edit of one feature that changes the metric of every case from `before` to `after`."""

    def behaviour(values: dict) -> Behaviour:
        scores = {case: Score(4, m, 1.0) for case, m in values.items()}
        return Behaviour(Score(8, sum(values.values()) / len(values), 1.0), scores if len(scores) > 1 else {})

    fixed = {"features": ["embed/0"], "operation": "zero", "value": None, "metric": "m", "n_prompts": 8, "n_texts": 0}
    runs = {"before": behaviour(before), "after": behaviour(after), "random": [], "random_features": []}
    return EditReport(**fixed | runs | options)


def test_a_reversed_case_does_not_make_up_for_another():
    report = edit_report({"one": 2.0, "two": 3.0}, {"one": -9.98, "two": 17.8})
    assert report.remaining_by_case == pytest.approx({"one": -4.99, "two": 17.8 / 3})
    assert report.remaining == pytest.approx((9.98 + 17.8) / 5)
    assert report.reversed_cases == ["one"] and "reversed: one" in report.text()
    assert edit_report({"": 2.0}, {"": -1.0}).remaining == pytest.approx(-0.5)


def test_nothing_is_left_of_nothing():
    report = edit_report({"one": 0.0, "two": 4.0}, {"one": 1.0, "two": 1.0})
    assert report.remaining_by_case == {"one": None, "two": 0.25}
    nothing = edit_report({"one": 0.0, "two": 0.0}, {"one": 1.0, "two": 1.0}).to_dict()
    assert nothing["remaining"] is None and "NaN" not in json.dumps(nothing)
    assert edit_report({"": 0.0}, {"": 1.0}).remaining is None


def test_fewer_random_features_than_edited_ones_are_told(tiny_model, tiny_prompts, tiny_saes):
    active = active_features(tiny_model, tiny_saes, tiny_prompts)
    site, index = next(iter(active.items()))
    names = feature_names({site: index})
    most = editing.measure_edit(
        tiny_model, tiny_saes, editing.Edit(names[:-2]), tiny_prompts, editing.EditOptions(n_random=2)
    )
    assert [len(draw) for draw in most.random_features] == [2, 2] and most.random_left == 2
    assert f"(2 draws of 2, not {len(index) - 2})" in most.text()
    every = editing.measure_edit(
        tiny_model, tiny_saes, editing.Edit(names), tiny_prompts, editing.EditOptions(n_random=2)
    )
    assert every.random == [] and "no random features to compare with" in every.text()


@pytest.mark.parametrize("metric", ["kl", "log_probability"])
def test_an_edit_is_measured_by_the_metric_it_is_given(tiny_model, tiny_prompts, tiny_saes, metric):
    report = editing.measure_edit(
        tiny_model, tiny_saes, editing.Edit(["resid_1/3"]), tiny_prompts, editing.EditOptions(n_random=0), metric=metric
    )
    prompts = behaviour.prepare(tiny_prompts, tiny_model, metric)
    by_hand = behaviour.metric_values(tiny_model, prompts, behaviour.get_metric(metric)).mean().item()
    assert report.before.overall.metric == pytest.approx(by_hand, abs=1e-6)
    assert "logit difference" not in report.text() and report.remaining is None


@pytest.mark.slow
def test_the_same_seed_draws_the_same_features(report, tiny_model, tiny_prompts, tiny_saes):
    again = editing.measure_edit(
        tiny_model, tiny_saes, editing.Edit(report.features), tiny_prompts, editing.EditOptions(n_random=3)
    )
    other = editing.measure_edit(
        tiny_model, tiny_saes, editing.Edit(report.features), tiny_prompts, editing.EditOptions(n_random=3, seed=1)
    )
    assert again.random_features == report.random_features != other.random_features
    assert again.before.ce is None and "CE" not in again.text()


# ---- edits at spans and positions


def test_edits_at_a_span_change_its_tokens_alone(tiny_model, tiny_prompts, tiny_saes):
    prompts = with_spans(tiny_prompts, MIXED)
    site = Site.parse("mlp_0")
    sae = tiny_saes[site]
    x = tiny_model.run(prompts.clean, capture=[site]).activations[site]
    inside = prompts.span_numbers == prompts.spans.index("b")
    active = sae.encode(x)[inside].sum(0).topk(2).indices.tolist()
    names = [f"{site}/{active[0]}@b", f"{site}/{active[1]}"]
    assert needs_spans(names) and split_by_span(names) == {"b": [names[0][:-2]], "": [names[1]]}
    report = editing.measure_edit(
        tiny_model, tiny_saes, editing.Edit(names), prompts, editing.EditOptions(n_random=2, generate=1, new_tokens=3)
    )
    assert report.features == names
    assert {name.partition("@")[2] for name in report.random_features[0]} == {"b", ""}
    f = sae.encode(x)
    expected = x - f[..., active[1], None] * sae.W_dec[active[1]]
    expected = expected - (f[..., active[0], None] * sae.W_dec[active[0]]) * inside[..., None]
    logits = tiny_model.run(prompts.clean, edits={site: lambda _: expected}, last_only=True).logits[:, -1]
    m = -behaviour.logit_difference(logits, prompts).mean().item()
    assert report.after.overall.metric == pytest.approx(m, abs=1e-4)
    positions = editing.measure_edit(
        tiny_model, tiny_saes, editing.Edit(f"{site}/{active[0]}@1"), prompts, editing.EditOptions(n_random=0)
    )
    first = (prompts.clean.position_ids == 1) & prompts.clean.attention_mask.bool()
    expected = x - (f[..., active[0], None] * sae.W_dec[active[0]]) * first[..., None]
    logits = tiny_model.run(prompts.clean, edits={site: lambda _: expected}, last_only=True).logits[:, -1]
    m = -behaviour.logit_difference(logits, prompts).mean().item()
    assert positions.after.overall.metric == pytest.approx(m, abs=1e-4)


def test_edits_of_generated_tokens_leave_the_prompts_alone(tiny_model, tiny_prompts, tiny_saes):
    report = editing.measure_edit(
        tiny_model, tiny_saes, editing.Edit("resid_1/3@generated", "steer", 60.0), tiny_prompts[:2],
        editing.EditOptions(n_random=1, generate=1, new_tokens=3),
    )  # fmt: skip
    assert report.after.overall == report.before.overall and report.features == ["resid_1/3@generated"]
    edit = make_edits(tiny_saes, {Site("resid", 1): torch.tensor([3])}, operation="steer", value=60.0)
    clean = tiny_prompts[0].clean
    ids = tiny_model.generate(clean, max_new_tokens=3, later_edits=edit)[0, clean.n_positions :].tolist()
    assert report.continuations[0].after == tiny_model.tokenizer.decode(ids, skip_special_tokens=True)
    assert report.continuations[0].after != report.continuations[0].before
    texts = [tiny_prompts.clean]
    names = ("resid_1/3@generated", "resid_1/3")  # the mean over text is of no place in it
    means = [
        with_references(tiny_model, tiny_saes, editing.Edit(name, "mean"), texts=texts).reference for name in names
    ]
    assert list(means[0].values()) == list(means[1].values()) and list(means[0]) == [names[0]]


def test_the_mean_of_a_span_is_that_of_its_tokens(tiny_model, tiny_prompts, tiny_saes):
    site = Site.parse("mlp_0")
    x = tiny_model.run(tiny_prompts.clean, capture=[site]).activations[site]
    inside = with_spans(tiny_prompts, MIXED).span_numbers == 1
    means = feature_means(tiny_model, tiny_saes, {site: torch.tensor([3, 5])}, [tiny_prompts.clean], where=[inside])
    expected = tiny_saes[site].encode(x)[inside][:, [3, 5]].mean(0)
    torch.testing.assert_close(means[site], expected)


@pytest.mark.parametrize(
    ("name", "message"), [("mlp_0/1@verb", "'verb'"), ("mlp_0/1@", "no place"), ("mlp_0/1@6", "position 6")]
)
def test_places_that_are_not_there(tiny_model, tiny_prompts, tiny_saes, name, message):
    with pytest.raises(UserError, match=message):
        editing.measure_edit(
            tiny_model, tiny_saes, editing.Edit(name), with_spans(tiny_prompts, MIXED), editing.EditOptions(n_random=0)
        )
    with pytest.raises(UserError, match="no spans"):
        editing.measure_edit(
            tiny_model, tiny_saes, editing.Edit("mlp_0/1@b"), tiny_prompts, editing.EditOptions(n_random=0)
        )
    with pytest.raises(UserError, match="no spans"):
        editing.measure_edit(
            tiny_model, tiny_saes, editing.Edit("mlp_0/1@b"), tiny_prompts, editing.EditOptions(texts=["the man"])
        )


def test_a_circuits_features_know_their_model(tiny_model, tiny_prompts, tiny_saes):
    """Through the front door: `ablate` and `steer` take the circuit's model, SAEs, metric and prompts."""
    options = DiscoverOptions(method="attrib", edge_nodes=0)
    circuit = discover(tiny_model, tiny_saes, tiny_prompts, options, progress=False)
    features, few = circuit.strongest_features(2), editing.EditOptions(n_random=0)
    report = editing.ablate(features, options=few)
    edit = editing.Edit(list(features), "mean", by_template=True)
    assert report == editing.measure_edit(tiny_model, tiny_saes, edit, tiny_prompts, few, metric=circuit.metric)
    steered = editing.steer(features[0], tiny_prompts, value=2.0, circuit=circuit, options=few)
    assert (steered.operation, steered.value, steered.features) == ("steer", 2.0, [features[0]])
    with pytest.raises(UserError, match="whose features"):
        editing.ablate("resid_0/3")

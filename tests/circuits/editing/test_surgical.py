"""What is measured of an edit beside the behaviour, and features that are chosen for it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from circuits.discovery.discover import discover
from circuits.editing import edit as editing
from circuits.editing import surgical, text_cost
from circuits.editing.applied import FeatureEdits, edited
from circuits.editing.controls import change_norm, random_directions
from circuits.editing.declaration import Edit, load_edits, save_edits
from circuits.editing.flipping import choose_flipping
from circuits.editing.measures import answer_sides, answers_of, fluency, repetition
from circuits.editing.records import Behaviour, Score
from circuits.editing.results import EditReport
from circuits.editing.surgical import choose_surgical, effect_by_feature
from circuits.editing.text_cost import OtherText
from circuits.metrics.metrics import kl, prepare, values_and_correct
from circuits.options import DiscoverOptions
from sae.data.batches import counted_predictions
from sae.errors import UserError
from tests.circuits.conftest import MIXED, with_spans
from tests.circuits.ground_truth import GroundTruth, Head, Layer, Neuron, Plan, _prompts, build


@pytest.fixture(scope="module")
def texts(tiny_model, tiny_prompts) -> list[str]:
    return [tiny_model.tokenizer.decode(row) for row in tiny_prompts.clean.input_ids[1::2].tolist()]


@pytest.fixture(scope="module")
def circuit(tiny_model, tiny_saes, tiny_prompts):
    options = DiscoverOptions(method="attrib", edge_nodes=0, sites="embed,resid_0")
    return discover(tiny_model, tiny_saes, tiny_prompts, options, progress=False)


@pytest.fixture(scope="module")
def report(circuit, tiny_model, tiny_prompts, tiny_saes, texts) -> EditReport:
    names = list(circuit.strongest_features(3))
    options = editing.EditOptions(texts=texts, n_random=2, scales=(0.0, 1.0), generate=2, new_tokens=4)
    return editing.measure_edit(tiny_model, tiny_saes, Edit(names, "steer", 2.0), tiny_prompts, options)


def test_cost_is_split_into_the_behaviours_tokens_and_others(tiny_model, tiny_prompts, tiny_saes, monkeypatch):
    answers = tiny_prompts.clean.input_ids[0, -2:].tolist()
    text = OtherText(tiny_model, [tiny_prompts.clean], answers)
    edit = FeatureEdits(tiny_model, tiny_saes, [Edit(["resid_0/1", "mlp_1/2"], "steer", 5.0)]).standing()
    plain = tiny_model.run(tiny_prompts.clean).logits[:, :-1].log_softmax(-1)
    with tiny_model.edited(edit):
        changed = tiny_model.run(tiny_prompts.clean).logits[:, :-1].log_softmax(-1)
    scored, targets = counted_predictions(tiny_model, tiny_prompts.clean), tiny_prompts.clean.input_ids[:, 1:]
    surprise = -changed.gather(-1, targets[..., None])[..., 0]
    own = torch.isin(targets, torch.tensor(answers))
    measured = text.measured(Behaviour(Score(1, 0.0, None)), edit)
    assert measured.ce == pytest.approx(surprise[scored].mean().item(), rel=1e-4)
    assert measured.ce_behaviour == pytest.approx(surprise[scored & own].mean().item(), rel=1e-4)
    assert measured.ce_elsewhere == pytest.approx(surprise[scored & ~own].mean().item(), rel=1e-4)
    kl = (plain.exp() * (plain - changed)).sum(-1)[scored].mean().item()
    assert measured.kl == pytest.approx(kl, rel=1e-3, abs=1e-6)
    monkeypatch.setattr(text_cost, "KEPT_BYTES", 0)  # a batch's predictions at a time
    unkept = OtherText(tiny_model, [tiny_prompts.clean[:4], tiny_prompts.clean[4:]], answers)
    assert unkept.measured(Behaviour(Score(1, 0.0, None)), edit).kl == pytest.approx(measured.kl, rel=1e-4)
    several = text.elsewhere([{}, edit])  # copies with edits of their own in one pass
    assert several[1].item() == pytest.approx(measured.ce_elsewhere, rel=1e-4)
    assert several[0].item() != pytest.approx(several[1].item(), rel=1e-3)


@pytest.mark.slow
def test_a_report_has_intervals_doses_controls_and_fluency(report, tmp_path):
    before, after = report.doses
    assert before.behaviour.overall.metric == pytest.approx(report.before.overall.metric, abs=1e-5)
    assert after.behaviour.overall.metric == pytest.approx(report.after.overall.metric, abs=1e-5)
    assert after.behaviour.ce_elsewhere == pytest.approx(report.after.ce_elsewhere, abs=1e-5)
    assert len(report.random_equal_norm) == len(report.random_directions) == 2
    assert len(report.fluency) == 2 and report.before.kl == pytest.approx(0, abs=1e-6)
    report.save(tmp_path / "edit.json")
    assert EditReport.load(tmp_path / "edit.json") == report
    text = report.text()
    assert "random directions at equal norm" in text and "perplexity" in text and "scale" in text


def test_random_directions_move_each_token_as_far(tiny_model, tiny_prompts, tiny_saes):
    edit = FeatureEdits(tiny_model, tiny_saes, [Edit(["resid_0/1", "resid_0/9"], "scale", 3.0)]).standing()
    elsewhere = random_directions(edit, tiny_model.widths, 0)
    norms = [change_norm(tiny_model, [tiny_prompts], lambda _, edits=edits: edits) for edits in (edit, elsewhere)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and norms[0] > 0


def test_the_norm_is_that_of_each_prompts_own_spans(tiny_model, tiny_prompts, tiny_saes):
    """Of two prompts with the same tokens, b is two tokens of the one and three of the other, in a batch or in two."""
    prompts = with_spans(tiny_prompts[[1, 1]], MIXED)
    numbers = prompts.span_numbers.clone()
    b, c = (prompts.spans.index(name) for name in "bc")
    numbers[1] = torch.where(numbers[0] == b, c, torch.where(numbers[0] == c, b, numbers[0]))
    prompts = replace(prompts, span_numbers=numbers)
    edits = FeatureEdits(tiny_model, tiny_saes, [Edit("resid_0/3@b", "steer", 4.0)], prompts=prompts)
    for size in (1, 2):
        norm = change_norm(tiny_model, prompts.batches(size), edits.standing)
        assert norm == pytest.approx(4 * 5**0.5, rel=1e-4)


def test_sides_of_answers_and_repetition(tiny_model, tiny_prompts):
    """Cases whose answers change places are two sides; prompts with answers of their own have none."""
    one, two = tiny_prompts.clean_answers[:1], tiny_prompts.patch_answers[:1]
    swapped = torch.tensor([4 * [one.item()] + 4 * [two.item()], 4 * [two.item()] + 4 * [one.item()]])
    prompts = replace(tiny_prompts, clean_answers=swapped[0], patch_answers=swapped[1])
    sides = answer_sides(prompts)
    assert sides is not None and sides["a_b"] == -sides["b_a"]
    assert answers_of(prompts) == sorted({one.item(), two.item()})
    assert repetition([[1, 2, 3, 1, 2, 3], [4, 5]]) == 0.25
    ids = tiny_model.generate(tiny_prompts.clean, max_new_tokens=3)[:, -3:]
    assert fluency(tiny_model, tiny_prompts, ids).perplexity > 1


@pytest.mark.slow
def test_what_is_said_of_chosen_features_is_so(circuit, tiny_model, tiny_prompts, tiny_saes, texts, monkeypatch):
    """On the prompts and texts they are chosen on."""
    edit, choice = choose_surgical(circuit, texts=texts, operation="zero", penalty=0.1)
    assert edit.names == choice.features and set(edit.names) <= set(effect_by_feature(circuit, 200))
    prompts = prepare(tiny_prompts, tiny_model, circuit.metric)
    text = OtherText(tiny_model, [tiny_model.tokenize(sorted(texts, key=len))], answers_of(prompts))
    sizes, costs = [], []
    for chosen in (None, edit):
        with edited(tiny_model, tiny_saes, chosen or []):
            values, _ = values_and_correct(tiny_model, prompts, circuit.metric)
        sizes.append([values[:4].mean().item(), values[4:].mean().item()])
        standing = FeatureEdits(tiny_model, tiny_saes, [chosen] if chosen else []).standing()
        costs.append(text.elsewhere([standing])[0].item())
    left = (sum(m * m for m in sizes[1]) / sum(m * m for m in sizes[0])) ** 0.5  # of an edit of nothing: 1
    assert choice.steps[-1].left == pytest.approx(left, rel=1e-3)
    assert choice.steps[-1].ce_elsewhere == pytest.approx(costs[1] - costs[0], abs=1e-4)
    assert choice.n_trials > choice.n_candidates and left < 1
    monkeypatch.setattr(surgical, "GAIN", 10.0)
    hardly, choice = choose_surgical(circuit, texts=texts, operation="zero")
    assert len(hardly.names) <= 2 and len(choice.steps) >= 1 and choice.cheap is None
    with pytest.raises(UserError, match="no such share"):
        choose_surgical(replace(circuit, source=replace(circuit.source, metric=kl)), texts=texts)


@pytest.mark.slow
def test_a_feature_that_is_dear_elsewhere_is_not_chosen(circuit, texts, monkeypatch):
    monkeypatch.setattr(surgical, "CANDIDATES", 200)  # all of them, whatever their side effect to first order
    best = choose_surgical(circuit, texts=texts, operation="zero", penalty=0.0)[0].names[0]
    tried = surgical._Search.tried

    def dear(search, sets):
        sets = tried(search, sets)
        search.trials |= {names: (left, 1.0) for names, (left, _) in search.trials.items() if best in names}
        return sets

    monkeypatch.setattr(surgical._Search, "tried", dear)
    assert best in choose_surgical(circuit, texts=texts, operation="zero", penalty=0.0)[0].names
    assert best not in choose_surgical(circuit, texts=texts, operation="zero", penalty=100.0)[0].names


LETTERS = "abcdef"


@pytest.fixture(scope="module")
def copying():
    """A circuit of copying the first letter, carried late by what every prediction of a letter needs.

    One head copies the letter into features, another copies it again where dictionaries see nothing, nor do they see
    how both find it; neurons make `say_x` of these, and of the letter before x.
    """
    places = [f"p{n}" for n in range(12)]
    heads = [Head([("copy", "p1", 16.0)], {x: f"{route}_{x}" for x in LETTERS}) for route in ("copied", "hidden")]
    says = [
        Neuron({f"copied_{x}": 1.0, f"hidden_{x}": 1.0, before: 1.0}, 0.0, {f"say_{x}": 1.0})
        for before, x in zip(LETTERS, LETTERS[1:] + LETTERS[:1], strict=True)
    ]
    plan = Plan(
        {"bos": {}, "copy": {"copy": 1.0}} | {x: {x: 1.0} for x in LETTERS}, [{place: 1.0} for place in places],
        [Layer(heads), Layer([], says)], {x: {f"say_{x}": 4.0} for x in LETTERS},
    )  # fmt: skip
    model, saes, features = build(plan)
    for site, names in features.items():
        seen = [n for n, name in enumerate(names) if name[0] not in "hp" and name != "copy"]
        saes[site] = saes[site].restrict(torch.tensor([*seen, *range(len(names), len(saes[site].W_dec))]))
        features[site] = [names[n] for n in seen]
    pairs = [("ab"[n % 2], "cdef"[n % 4], "ba"[n % 2]) for n in range(24)]
    rows = [(["bos", a, x, x, "copy"], ["bos", b, x, x, "copy"], a, b) for a, x, b in pairs]
    prompts = _prompts(model, rows)
    circuit = discover(model, saes, prompts, edge_nodes=0, method="attrib", progress=False)
    return GroundTruth(model, saes, prompts, features), circuit


def test_nothing_is_chosen_among_no_features(circuit, texts):
    bare = SimpleNamespace(
        nodes={}, model=circuit.model, saes=circuit.saes, metric=circuit.metric, prompts=circuit.prompts
    )
    with pytest.raises(UserError, match="nothing to edit"):
        choose_surgical(bare, texts=texts, progress=False)


@pytest.mark.slow
def test_late_features_are_not_surgical_and_earlier_ones_are_named(copying):
    truth, circuit = copying
    texts = ["bos " + " ".join((LETTERS * 3)[start : start + 10]) for start in range(6)]
    edit, choice = choose_surgical(circuit, texts=texts, penalty=1.0, progress=False)
    late = {truth.node(site, f"say_{x}") for site in ("mlp_1", "resid_1") for x in "ab"}
    assert late & set(edit.names) and choice.dearest in late
    strongest = Edit(list(circuit.strongest_features(10)), "zero")
    options = editing.EditOptions(texts=texts, n_random=0, resamples=0)
    trial = editing.prepare_trial(truth.model, truth.saes, edit, truth.prompts, options, metric=circuit.metric)
    report = trial.report(choice=choice, strongest=[strongest])
    assert report.is_surgical is False and report.answer_share == pytest.approx(1 / 3, abs=0.05)
    assert report.after.ce_behaviour is None and report.cost_elsewhere == pytest.approx(report.ce_increase)
    copied = {truth.node(site, f"copied_{x}") for site in ("attn_0", "resid_0") for x in "ab"}
    assert choice.cheap.left < 0.6 and choice.cheap.ce_elsewhere < 0.01
    assert copied & set(choice.cheap.added) and not late & set(choice.cheap.added)
    (sentence,) = [line for line in report.text().splitlines() if "not surgical" in line]
    assert f"costs {report.cost_elsewhere:+.4f} elsewhere" in sentence and "the bar is 15 % at" in sentence
    assert f"of the features before {choice.dearest}" in sentence and ", ".join(choice.cheap.added) in sentence
    assert "answers of the behaviour are 33 % of the text" in report.text()
    dear = choose_surgical(circuit, texts=texts, penalty=3.0, progress=False)[0]
    assert set(dear.names) & copied and not set(dear.names) & late


@pytest.mark.slow
def test_answers_are_turned_round_by_features_of_one_site(copying, tmp_path):
    truth, circuit = copying
    texts = ["bos " + " ".join((LETTERS * 3)[start : start + 10]) for start in range(6)]
    edit = choose_flipping(circuit, texts=texts)
    assert len({name.partition("/")[0] for name in edit.names}) == 1 and edit.strength > 1
    options = editing.EditOptions(n_random=0, resamples=0)
    trial = editing.prepare_trial(truth.model, truth.saes, edit, truth.prompts, options, metric=circuit.metric)
    report = trial.report()
    assert report.flipped == 1 and "flipped: the other answer is ahead on 100 %" in report.text()
    assert f"change times {edit.strength:g}, on 24 prompts" in report.title()
    plain = replace(trial, listed=[replace(edit, strength=1.0)])
    twice = plain.behaviour(plain.resolved, edit.strength)  # as if all changes were larger
    assert twice.overall.metric == pytest.approx(report.after.overall.metric, rel=1e-4)
    assert load_edits(save_edits(edit, tmp_path / "edit.json")) == [edit]
    with pytest.raises(UserError, match="both answers"):
        choose_flipping(circuit, replace(truth.prompts, patch_answers=None), texts=texts)


def test_an_edit_at_a_span_is_everywhere_on_other_text(tiny_model, tiny_prompts, tiny_saes, texts):
    few = editing.EditOptions(texts=texts, n_random=0)
    spread = editing.measure_edit(tiny_model, tiny_saes, Edit("resid_0/1@1", "steer", 4.0), tiny_prompts, few)
    everywhere = editing.measure_edit(tiny_model, tiny_saes, Edit("resid_0/1", "steer", 4.0), tiny_prompts, few)
    assert spread.spread_on_text and not everywhere.spread_on_text
    assert spread.after.ce == pytest.approx(everywhere.after.ce, abs=1e-5)
    assert spread.after.overall.metric != pytest.approx(everywhere.after.overall.metric, abs=1e-4)
    assert "at all tokens" in spread.text()

"""What is measured of an edit beside the behaviour, and features that are chosen for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from circuits.discovery.discover import discover
from circuits.editing import edit as editing
from circuits.editing import surgical
from circuits.editing.applied import FeatureEdits, edited
from circuits.editing.controls import change_norm, random_directions
from circuits.editing.declaration import Edit
from circuits.editing.measures import answer_sides, answers_of, fluency, repetition
from circuits.editing.records import Behaviour, Score
from circuits.editing.results import EditReport
from circuits.editing.surgical import choose_surgical, effect_by_feature
from circuits.editing.text_cost import OtherText
from circuits.metrics.metrics import kl, prepare, values_and_correct
from circuits.options import DiscoverOptions
from sae.data.batches import counted_predictions
from sae.errors import UserError


@pytest.fixture(scope="module")
def texts(tiny_model, tiny_prompts) -> list[str]:
    return [tiny_model.tokenizer.decode(row) for row in tiny_prompts.clean.input_ids[1::2].tolist()]


@pytest.fixture(scope="module")
def circuit(tiny_model, tiny_saes, tiny_prompts):
    options = DiscoverOptions(method="attrib", edge_nodes=0)
    return discover(tiny_model, tiny_saes, tiny_prompts, options, progress=False)


@pytest.fixture(scope="module")
def report(circuit, tiny_model, tiny_prompts, tiny_saes, texts) -> EditReport:
    names = list(circuit.strongest_features(3))
    options = editing.EditOptions(texts=texts, n_random=2, scales=(0.0, 1.0), generate=2, new_tokens=4)
    return editing.measure_edit(tiny_model, tiny_saes, Edit(names, "steer", 2.0), tiny_prompts, options)


def test_cost_is_split_into_the_behaviours_tokens_and_others(tiny_model, tiny_prompts, tiny_saes):
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
    several = text.elsewhere([{}, edit])  # copies with edits of their own in one pass
    assert several[1].item() == pytest.approx(measured.ce_elsewhere, rel=1e-4)
    assert several[0].item() != pytest.approx(several[1].item(), rel=1e-3)


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
    norms = [change_norm(tiny_model, [tiny_prompts], edits) for edits in (edit, elsewhere)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and norms[0] > 0


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
    left = (sum(m * m for m in sizes[1]) / 2) ** 0.5 / (sum(map(abs, sizes[0])) / 2)
    assert choice.steps[-1].left == pytest.approx(left, rel=1e-3)
    assert choice.steps[-1].ce_elsewhere == pytest.approx(costs[1] - costs[0], abs=1e-4)
    assert choice.n_trials > choice.n_candidates and left < 1
    monkeypatch.setattr(surgical, "GAIN", 10.0)
    hardly, choice = choose_surgical(circuit, texts=texts, operation="zero")
    assert len(hardly.names) <= 2 and len(choice.steps) >= 1 and choice.cheap is None
    with pytest.raises(UserError, match="no such share"):
        choose_surgical(replace(circuit, source=replace(circuit.source, metric=kl)), texts=texts)


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


def test_an_edit_at_a_span_is_everywhere_on_other_text(tiny_model, tiny_prompts, tiny_saes, texts):
    few = editing.EditOptions(texts=texts, n_random=0)
    spread = editing.measure_edit(tiny_model, tiny_saes, Edit("resid_0/1@1", "steer", 4.0), tiny_prompts, few)
    everywhere = editing.measure_edit(tiny_model, tiny_saes, Edit("resid_0/1", "steer", 4.0), tiny_prompts, few)
    assert spread.spread_on_text and not everywhere.spread_on_text
    assert spread.after.ce == pytest.approx(everywhere.after.ce, abs=1e-5)
    assert spread.after.overall.metric != pytest.approx(everywhere.after.overall.metric, abs=1e-4)
    assert "at all tokens" in spread.text()

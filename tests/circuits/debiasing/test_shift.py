"""SHIFT and targeted probes: against brute force, every judge, every form of the data, and what cannot be used."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from itertools import product

import pandas as pd
import pytest
import torch
from scipy.stats import binomtest

from circuits import ShiftOptions, shift, targeted_perturbation
from circuits.benchmark import spurious
from circuits.debiasing import results, targeted
from circuits.debiasing.data import Pairing, divided, equal_groups, held_out_rows, read_labelled, text_set
from circuits.debiasing.judges import by_program, correlation
from circuits.debiasing.plots import plot_shift
from circuits.debiasing.probing import interval
from circuits.debiasing.results import JudgedFeature, ShiftReport
from circuits.debiasing.shift import prepare
from circuits.debiasing.targeted import against_others, by_share
from circuits.editing.applied import edited
from circuits.editing.declaration import Edit
from circuits.metrics.fit_probe import fit_probe, read_site
from sae.errors import UserError
from sae.model.sites import Site

NOUNS = {"singular": ["man", "boy", "king", "dog"], "plural": ["men", "boys", "kings", "dogs"]}
ROWS = [
    {"text": f"the {a} near the {b} {adverb}", "intended": first, "spurious": second}
    for first, second in product(NOUNS, repeat=2)
    for a, b, adverb in product(NOUNS[first], NOUNS[second], ("old",))
]
ROWS = [ROWS[row] for row in torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(0))]
OPTIONS = ShiftOptions(
    site="resid_1", sites="resid", position="last", method="attrib", circuit_texts=16, features=12, random=2
)
SPURIOUS_ALONE = [{"text": row["text"], "spurious": row["spurious"]} for row in ROWS[:40]]


@pytest.fixture(scope="module")
def report(tiny_model, tiny_saes):
    return shift(tiny_model, tiny_saes, ROWS, options=OPTIONS, judge=lambda f: [i % 2 == 0 for i in range(len(f))],
                 progress=False)  # fmt: skip


@pytest.mark.slow
def test_scores_are_those_of_a_loop(report, tiny_model, tiny_saes):
    """The probe before and after, retrained, and by group, with nothing but a probe, an edit and a loop."""
    study = prepare(tiny_model, tiny_saes, ROWS, None, OPTIONS).study
    pairing = Pairing(("plural", "singular"), ("plural", "singular"))
    rows = read_labelled(ROWS, intended="intended", spurious="spurious")
    train, test = divided(rows, pairing, 0.25, 0)
    ambiguous = equal_groups([row for row in train if row.intended == row.spurious], pairing)
    assert [row.example.clean for row in ambiguous] == study.ambiguous.prompts.texts
    assert {pairing.group(row) for row in test} == set(report.scores[0].by_group) and len(test) == report.n_test
    a, b = (text_set(rows, tiny_model, "last", name="").prompts for rows in (ambiguous, test))
    probe = fit_probe(read_site(tiny_model, a.clean, study.site), [row.intended for row in ambiguous])
    dropped = [one.feature for one in report.features if one.dropped]
    assert len(report.features) == 12 and len(dropped) == 6
    edit = report.edits[0]
    with edited(tiny_model, tiny_saes, Edit(edit["features"], "mean", reference=edit["reference"]), prompts=b):
        after = read_site(tiny_model, b.clean, study.site)
    for score, x in ((report.scores[0], read_site(tiny_model, b.clean, study.site)), (report.scores[1], after)):
        answers = [probe.classes[int(output > 0)] for output in x @ probe.weight + probe.bias]
        of_group: dict[str, list[bool]] = {}
        for answer, row in zip(answers, test, strict=True):
            of_group.setdefault(pairing.group(row), []).append(answer == row.intended)
        shares = {group: sum(right) / len(right) for group, right in of_group.items()}
        assert score.by_group == pytest.approx(shares)
        assert score.intended == pytest.approx(sum(shares.values()) / 4)
        assert score.worst_group == pytest.approx(min(shares.values()))
        low, high = score.intended_interval
        assert 0 <= low <= score.intended <= high <= 1
        leaning = [shares[f"{s}_{p}"] if s == p else 1 - shares[f"{s}_{p}"] for s, p in product(NOUNS, repeat=2)]
        assert score.spurious == pytest.approx(sum(leaning) / 4)


@pytest.mark.slow
def test_everything_is_reported(report, tmp_path):
    names = [score.name for score in report.scores]
    assert set(names) == set(results.EXPLAINED)
    assert report.score(results.FEATURE_SKYLINE).n_features == report.score(results.SHIFT).n_features == 6
    assert report.score(results.BOTTLENECK).n_features == 6
    again = ShiftReport.load(report.save(tmp_path / "shift.json"))
    assert again.text() == report.text() and "original probe" in report.text() and "<table" in report._repr_html_()
    assert list(report.to_frame()["probe"]) == names and len(report.features_frame()) == 12
    feature = report.features[0]
    assert feature.contexts and "«" in feature.contexts[0] and set(feature.by_class) == set(NOUNS)
    assert plot_shift(report, tmp_path / "shift.svg").is_file()
    for wrong, message in (({"kind": "edit"}, "not a SHIFT"), ({**report.to_dict(), "scores": []}, "same groups")):
        with pytest.raises(UserError, match=message):
            ShiftReport.from_dict(wrong)


def test_effects_that_cancel_as_they_should_are_no_warning(tiny_model, tiny_saes, caplog):
    """A probe's output over texts of both classes."""
    study = prepare(tiny_model, tiny_saes, ROWS, None, OPTIONS).study
    warned = []
    for warn in (True, False):
        caplog.clear()
        study.circuit(replace(study.probe(), margin=False), study.test, warn=warn)
        warned.append([record.message for record in caplog.records if "cancel" in record.message])
    assert warned[0] and not warned[1]


@pytest.mark.slow
def test_judges(tiny_model, tiny_saes, report, tmp_path):
    """A list, keywords, correlation and a program choose what they say, and nobody is no judge."""
    names = [one.feature for one in report.features]
    listed = tmp_path / "drop.txt"
    listed.write_text(f"# noun features\n{names[1]}  # plural\n{names[3].partition('@')[0]}\n")
    script = tmp_path / "judge.py"
    script.write_text(f"import json, sys\nfor line in sys.stdin: print('drop' if json.loads(line)['feature'] == "
                      f"{names[0]!r} else 'keep')\n")  # fmt: skip
    program = f"{sys.executable} -S {script}"
    word = report.features[0].tokens[0]

    def judged(**judge):
        options = {"random": 0, **judge}
        return shift(tiny_model, tiny_saes, ROWS, options=OPTIONS, progress=False, **options)

    def of_list(one):
        return one.feature in (names[1], names[3]) or one.feature.partition("@")[0] == names[3].partition("@")[0]

    checks = {
        "list": (judged(drop=listed), of_list),
        "keywords": (judged(keywords=f"^nothing|{word.upper()}"), lambda one: word in " ".join(one.tokens)),
        "program": (judged(program=program), lambda one: one.feature == names[0]),
        "concept": (judged(concept=SPURIOUS_ALONE), lambda one: abs(float(one.reason[4:])) >= 0.3),
        "none": (judged(), lambda one: None),
    }
    for name, (result, is_dropped) in checks.items():
        assert result.judge == name
        assert [one.dropped for one in result.features] == [is_dropped(one) for one in result.features], name
        assert (result.score(results.SHIFT) is None) == (not result.dropped)
    assert "features to judge" in checks["none"][0].text() and names[0] in checks["none"][0].text()
    listed.write_text("resid_0/999\n")
    for wrong, message in (({"drop": listed}, "none of the 12 features"), ({"keywords": "("}, "regular expression"),
                           ({"keywords": "a", "program": "b"}, "two judges"), ({"classes": "a,b"}, "no text has"),
                           ({"pairs": "a=b"}, "it must be"), ({"intended": "kind"}, "no label 'kind'"),
                           ({"site": "resid_7"}, "unknown site"), ({"position": "verb"}, "'verb'")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            judged(**wrong)


def test_programs_that_do_not_answer():
    features = [JudgedFeature("resid_0/1", 0.5, "", ["cat"], ["the «cat»"], {"a": 0.0})]
    python = f"{sys.executable} -S -c "
    seen = f"{python} \"import json; print('DROP' if json.loads(input())['tokens'] == ['cat'] else 'keep')\""
    assert by_program(features, seen, 60) == [True]
    for command, timeout, message in (
        (f"{python} \"print('maybe')\"", 60, "answered 'maybe': expected keep or drop on 1 lines"),
        (f"{python} \"print('keep\\nkeep')\"", 60, "answered 2 lines"),
        (f"{python} \"raise SystemExit('no idea')\"", 60, "status 1: no idea"),
        (f'{python} "import time; time.sleep(30)"', 0.1, "within 0.1 seconds"),
        ("/no/such/program", 60, "cannot run the judge"),
        ("'", 60, "cannot run the judge"),
    ):
        with pytest.raises(UserError, match=message):
            by_program(features, command, timeout)


def test_intervals_are_those_of_scipy():
    right = torch.tensor([1.0] * 18 + [0.0] * 2)
    exact = binomtest(18, 20).proportion_ci(method="exact")
    assert interval(right, torch.ones(20)) == pytest.approx((exact.low, exact.high))
    assert interval(torch.ones(5), torch.tensor([1.0, 1, 2, 2, 1]))[1] == 1 > interval(torch.ones(5), torch.ones(5))[0]


def test_texts_that_are_repeated_are_no_new_evidence():
    right, which = torch.tensor([1.0] * 18 + [0.0] * 2), torch.arange(20)
    once, twice = interval(right, torch.ones(20)), (right.repeat(2), torch.ones(40), which.repeat(2))
    assert interval(*twice) == pytest.approx(once) and interval(*twice[:2]) != pytest.approx(once)
    assert interval(right[:4].repeat(2), torch.ones(8), which[4:8].repeat(2)) == interval(right[:4], torch.ones(4))
    lost = torch.rand(2, 2, 20, generator=torch.Generator().manual_seed(0)) < 0.3
    of_tpp = targeted._interval(lost.float(), [which, which], which, 0)
    rows = [torch.arange(40)] * 2
    assert targeted._interval(lost.repeat(1, 1, 2).float(), rows, which.repeat(2), 0) == pytest.approx(of_tpp)
    gained = lost[0, 0].float() - 0.1
    of_scr = spurious._interval(gained, torch.ones(20), which, 0)
    assert spurious._interval(gained.repeat(2), torch.ones(40), which.repeat(2), 0) == pytest.approx(of_scr)


def test_correlation_is_that_of_pandas():
    f = torch.randn(30, 3, generator=torch.Generator().manual_seed(1))
    f[:, 2] = 1.0
    label = (f[:, 0] + torch.randn(30, generator=torch.Generator().manual_seed(2)) > 0).float()
    expected = pd.DataFrame(f[:, :2].numpy()).corrwith(pd.Series(label.numpy()))
    assert correlation(f, label).tolist() == pytest.approx([*expected, 0.0], abs=1e-5)


@pytest.mark.slow
def test_bias_in_bios(tiny_model, tiny_saes, tmp_path, monkeypatch):
    """The columns of LabHC/bias_in_bios in a folder that `datasets` loads; a hub out of reach is one sentence."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sae._hub.hub_reachable", lambda: False)
    generator = torch.Generator().manual_seed(0)
    words = ["she knows the girl", "he knows the boy"]
    rows = []
    for number in range(96):
        profession, gender = (13, 21, 7)[number % 3], int(torch.rand(1, generator=generator) < 0.5)
        biased = profession // 20 if number % 4 else gender  # most nurses are women, most professors men
        does = "the teacher sings" if profession == 21 else "the queen walks"
        text = f"{words[1 - biased]} {does} {number % 7 * 'old '}"
        rows.append({"hard_text": text, "profession": profession, "gender": 1 - biased})
    folder = tmp_path / "bios"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ShiftOptions(
        intended="profession", spurious="gender", classes="21,13", concept_data="rest", sites="resid", method="attrib",
        steps=1, features=6, random=0, circuit_texts=8, site="resid_0",
    )  # fmt: skip
    report = shift(tiny_model, tiny_saes, folder, f"{folder}:test", options, progress=False)
    assert report.classes == ("13", "21") and report.pairs == ("1", "0") and report.position == "mean"
    assert report.judge == "concept" and report.n_balanced and all("@" not in one.feature for one in report.features)
    assert set(report.scores[0].by_group) == {"13_0", "13_1", "21_0", "21_1"}
    with pytest.raises(UserError, match="cannot read 'LabHC/bias_in_bios:train' from the hub"):
        shift(tiny_model, tiny_saes, "LabHC/bias_in_bios:train", options=options)


def test_targeted_probes_are_those_of_edited_runs(tiny_model, tiny_saes):
    """Losses of accuracy with the class's features set to zero in the running model."""
    rows = [
        {**row, "label": f"{row['text'].split()[1]}"} for row in ROWS if row["text"].split()[1] in ("man", "men", "dog")
    ]
    report = targeted_perturbation(
        tiny_model, tiny_saes, rows, rows, site="resid_1", position="mean", sizes="1,3", classes="man,men,dog"
    )
    assert report.classes == ["dog", "man", "men"] and len(report.features[0]) == 3
    texts = text_set(read_labelled(rows, intended="label", spurious=None), tiny_model, "mean", name="")
    inside = texts.prompts.span_numbers == texts.prompts.spans.index("text")
    x = read_site(tiny_model, texts.prompts.clean, Site.parse("resid_1"), inside)
    for number, one in enumerate(report.classes):
        chosen, labels = against_others(texts.intended, one, 0)
        probe = fit_probe(x[chosen], labels)
        for target in range(3):
            with edited(tiny_model, tiny_saes, Edit(report.features[target], "zero")):
                after = read_site(tiny_model, texts.prompts.clean, Site.parse("resid_1"), inside)
            answers = [probe.classes[int(output > 0)] for output in after[chosen] @ probe.weight + probe.bias]
            right = sum(a == b for a, b in zip(answers, labels, strict=True)) / len(labels)
            assert report.accuracy[number] - report.drops[1][target][number] == pytest.approx(right, abs=0.03)
    on, off = report.on_target(3), report.off_target(3)
    assert report.score(3) == pytest.approx(on - off) and "tpp" in report.text()
    with pytest.raises(UserError, match="three classes"):
        targeted_perturbation(tiny_model, tiny_saes, rows, rows, classes="man,men")
    without = [row for row in rows if row["label"] != "dog"]
    with pytest.raises(UserError, match="no text of class 'dog' to test on"):
        targeted_perturbation(tiny_model, tiny_saes, rows, without, site="resid_1")


def test_first_texts_are_as_many_of_each_group(tiny_model, tiny_saes):
    rows = [ROWS[n] for n in sorted(range(40), key=lambda n: ROWS[n]["intended"])]  # nearly all of a class come first
    texts = text_set(read_labelled(rows, intended="intended", spurious=None), tiny_model, "last", name="")
    n_first = texts.intended.index("singular")
    first = Counter(texts.first(n_first + 1).intended)
    assert abs(first["plural"] / first["singular"] - n_first / (40 - n_first)) < 0.2
    report = targeted_perturbation(
        tiny_model, tiny_saes, [{"text": row["text"], "label": row["text"].split()[1]} for row in ROWS], examples=4,
        site="resid_1", sizes="1", classes="man,men,dog",
    )  # fmt: skip
    assert report.n_train + report.n_test == 12


def test_no_text_is_learned_from_and_tested_on():
    rows = [
        {"text": text, "label": one} for one, texts in (("x", "aabbcd"), ("y", "aefg"), ("z", "h")) for text in texts
    ]
    texts = read_labelled(rows, intended="label", spurious=None)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        tested = held_out_rows(texts, [text.intended for text in texts], 0.5, generator, least=1)
        left = {row["text"] for number, row in enumerate(rows) if number not in tested}
        assert not left & {rows[number]["text"] for number in tested}
        assert {texts[number].intended for number in tested} == {"x", "y", "z"}


def test_features_of_a_probe_are_ranked_by_what_they_add_to_the_difference_it_sees():
    f = torch.tensor([[9.0, 1.0, 5.0], [9.0, 3.0, 5.0], [0.0, 0.0, 5.0]])  # differences 9, 2 and 0
    is_one = torch.tensor([True, True, False])
    assert by_share(f, is_one, torch.tensor([0.1, -1.0, 7.0])).tolist() == [1, 0, 2]

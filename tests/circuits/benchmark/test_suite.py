"""The tasks of SAEBench against brute force: every formula again, by a loop over texts or by edited runs."""

from __future__ import annotations

import json
from itertools import product

import pandas as pd
import pyarrow
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from circuits import SuiteOptions, evaluate_suite
from circuits.benchmark import absorption as absorption_module
from circuits.benchmark.absorption import Inapplicable, absorbed, absorption, first_letter_words, main_features
from circuits.benchmark.data import MASTER, read_data_sets
from circuits.benchmark.plots import _limits, plot_suite, suite_figure
from circuits.benchmark.sparse_probing import sparse_probing
from circuits.benchmark.spurious import spurious_removal
from circuits.debiasing.data import read_labelled, text_set
from circuits.debiasing.probing import Pooled, read_features
from circuits.debiasing.targeted import against_others, by_push
from circuits.editing.applied import edited
from circuits.editing.declaration import Edit
from circuits.metrics.fit_probe import read_site
from examples.agreement.make_labelled import LabelledConfig, write
from sae.errors import UserError
from sae.evaluation.stability import feature_stability
from sae.model.sites import Site
from sae.saes import SAEs

NOUNS = {"singular": ["man", "boy", "king", "dog"], "plural": ["men", "boys", "kings", "dogs"]}
ROWS = [
    {"text": f"the {a} near the {b} {adverb}", "intended": first, "spurious": second}
    for first, second in product(NOUNS, repeat=2)
    for a, b, adverb in product(NOUNS[first], NOUNS[second], ("old", "young"))
]
OTHERS = (*NOUNS["plural"], "a", "the", "old", "young", "who", "this")
KINDS = [{"text": f"{a} {b} {a}", "label": a} for a in ("man", "dog", "king") for b in OTHERS]
RESID = Site.parse("resid_1")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    for name, rows in (("nouns", ROWS), ("kinds_train", KINDS), ("kinds_test", KINDS), ("few", KINDS[:4])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def report(tiny_model, tiny_saes, folder):
    return evaluate_suite(tiny_model, tiny_saes, str(folder), suite_sites="resid_1,mlp_0", ablation_sizes="2,5,999",
                          probe_sizes="1,3")  # fmt: skip


@pytest.mark.slow
def test_every_task_is_done_where_the_data_allow_it(report, tmp_path):
    assert report.texts == {"kinds": (30, 30), "nouns": (104, 24)}
    assert {(e.data, e.site, e.k) for e in report.probing} == set(product(report.texts, ("mlp_0", "resid_1"), (1, 3)))
    assert {(e.data, e.site, e.n) for e in report.removal} == set(product(["nouns"], ("mlp_0", "resid_1"), (2, 5)))
    assert {(e.data, e.site, e.n) for e in report.perturbation} == set(product(["kinds"], ("mlp_0", "resid_1"), (2, 5)))
    assert "few" in report.left_out and "first letters: absorption needs 20 letters" in report.left_out["absorption"]
    assert "scr 2" in report.text() and "left out: few" in report.text()
    json.dumps(report.to_dict(), allow_nan=False)
    assert len(suite_figure(report).axes) == 3
    assert plot_suite(report, tmp_path / "suite.svg").stat().st_size > 10_000
    for entry in (*report.probing, *report.removal, *report.perturbation):
        score = entry.accuracy if hasattr(entry, "accuracy") else entry.score
        low, high = entry.interval
        assert low - 1e-6 <= score <= high + 1e-6 or (low != low and hasattr(entry, "score"))


def test_features_are_means_over_the_tokens_of_a_text(tiny_model, tiny_saes):
    """Also for a text cut after some tokens, one by one."""
    rows = read_labelled(ROWS[:3], intended="intended", spurious="spurious")
    texts = text_set(rows, tiny_model, "mean", name="", context=4)
    read = read_features(tiny_model, tiny_saes, texts, RESID, "mean")
    for number, row in enumerate(rows):
        ids = tiny_model.text_coder.prompt_ids([row.example.clean])[0][:4]
        seen = [i for i, token in enumerate(ids) if token not in tiny_model.special_ids]
        run = tiny_model.run(tiny_model.tokenize([row.example.clean]), capture=[RESID])
        x = run.activations[RESID][0][: len(ids)][seen]
        assert torch.allclose(read.x[number], x.mean(0), atol=1e-5)
        assert torch.allclose(read.f[number], tiny_saes[RESID].encode(x).mean(0), atol=1e-5)


def test_sparse_probing_is_that_of_a_loop():
    """Ranked, fitted and scored class by class with scikit-learn alone."""
    labels, test_labels = ["a", "b", "c"] * 20, ["c", "a", "b"] * 10
    train, test = (Pooled(draw(n, 6, seed=n), draw(n, 9, seed=n + 1).relu()) for n in (60, 30))
    for read, names in ((train, labels), (test, test_labels)):
        for row, label in enumerate(names):
            read.f[row, "abc".index(label)] += 1.5
    for k, result in zip((1, 4), sparse_probing("", "", train, labels, test, test_labels, sizes=(1, 4)), strict=True):
        accuracies, areas = [], []
        for one in "abc":
            (rows, y), (test_rows, test_y) = (against_others(names, one, 0) for names in (labels, test_labels))
            f, is_one = train.f[rows], torch.tensor([label == one for label in y])
            apart = [abs(f[is_one, i].mean() - f[~is_one, i].mean()).item() for i in range(9)]
            best = sorted(range(9), key=lambda i: -apart[i])[:k]
            probe = LogisticRegression(max_iter=1000).fit(f[:, best].numpy(), is_one.numpy())
            truth = [label == one for label in test_y]
            accuracies.append(probe.score(test.f[test_rows][:, best].numpy(), truth))
            areas.append(roc_auc_score(truth, probe.decision_function(test.f[test_rows][:, best].numpy())))
            assert result.features[one] == best and result.by_class[one] == pytest.approx(accuracies[-1])
        assert result.accuracy == pytest.approx(sum(accuracies) / 3) and result.auc == pytest.approx(sum(areas) / 3)
    binary = sparse_probing("", "", train, ["a", "b"] * 30, test, ["a", "b"] * 15, sizes=(1,))[0]
    assert list(binary.by_class) == ["b"]
    thrice = Pooled(test.x.repeat(3, 1), test.f.repeat(3, 1))
    texts = [str(number) for number in range(30)] * 3
    repeated = sparse_probing("", "", train, ["a", "b"] * 30, thrice, ["a", "b"] * 45, sizes=(1,), test_texts=texts)[0]
    assert repeated.accuracy == pytest.approx(binary.accuracy) and repeated.interval == pytest.approx(binary.interval)


def test_removal_is_that_of_edited_runs(tiny_model, tiny_saes):
    """SCR with the features set to zero in the running model, and accuracies counted one by one."""
    rows = read_labelled(ROWS, intended="intended", spurious="spurious")
    texts = text_set(rows, tiny_model, "mean", name="")
    read = read_features(tiny_model, tiny_saes, texts, RESID, "mean")
    W_dec = tiny_saes[RESID].W_dec
    result = spurious_removal("", "", read, texts.labelled, read, texts.labelled, W_dec, sizes=(3,))[0]
    inside = texts.prompts.span_numbers == texts.prompts.spans.index("text")

    def probe(chosen, label):
        is_one = [getattr(row, label) == "singular" for row in chosen]
        x = torch.stack([read.x[rows.index(row)] for row in chosen]).double()
        mean, scale = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
        fitted = LogisticRegression(max_iter=2000).fit(((x - mean) / scale).numpy(), is_one)
        return lambda x: fitted.decision_function(((x.double() - mean) / scale).numpy()) > 0, fitted.coef_[
            0
        ] / scale.numpy()

    def accuracy(answers, label):
        return sum(a == (getattr(row, label) == "singular") for a, row in zip(answers, rows, strict=True)) / len(rows)

    agreeing = [row for row in rows if row.intended == row.spurious]
    biased, _ = probe(agreeing, "intended")
    before = {label: accuracy(biased(read.x), label) for label in ("intended", "spurious")}
    kept = min(before, key=lambda label: before[label])
    other = {"intended": "spurious", "spurious": "intended"}[kept]
    own = accuracy(probe(rows, kept)[0](read.x), kept)
    weight = torch.from_numpy(probe(rows, other)[1]).float()
    is_one = torch.tensor([getattr(row, other) == "singular" for row in rows])
    rank = ((read.f[is_one].mean(0) - read.f[~is_one].mean(0)) * (W_dec @ weight)).abs().argsort(descending=True)
    assert result.features == rank[:3].tolist() and result.kept == kept
    with edited(tiny_model, tiny_saes, Edit([f"resid_1/{i}" for i in rank[:3].tolist()], "zero")):
        after = accuracy(biased(read_site(tiny_model, texts.prompts.clean, RESID, inside)), kept)
    assert (result.before, result.own) == pytest.approx((before[kept], own))
    assert result.after == pytest.approx(after, abs=0.02)
    gap = own - before[kept]
    assert result.score == pytest.approx((result.after - before[kept]) / gap if gap >= 0.001 else 0, abs=1e-5)


def test_saebench_takes_features_that_push_a_probe_up():
    f = torch.tensor([[9.0, 1.0, 5.0, 0.0], [9.0, 3.0, 5.0, 0.0], [0.0, 0.0, 5.0, 8.0]])  # differences 9, 2, 0 and -8
    is_one = torch.tensor([True, True, False])
    assert by_push(f, is_one, torch.tensor([0.1, 1.0, 7.0, -9.0])).tolist() == [1, 0]


def test_absorption_is_that_of_a_loop():
    """SAEBench's rules word by word: full absorption and the absorbed fraction."""
    f, x, W_dec, direction = draw(200, 8).relu(), draw(200, 5, seed=1), draw(8, 5, seed=2), draw(5, seed=3)
    W_dec[2] = direction + 0.2 * W_dec[2]
    W_dec[3] = direction + 0.5 * W_dec[3]
    x = f @ torch.nn.functional.normalize(W_dec, dim=-1) + 0.3 * x
    f[:90, 2] = 0
    unit, main = direction / direction.norm(), [2, 5]
    full, fraction = absorbed(f, x, direction, main, torch.nn.functional.normalize(W_dec, dim=-1))
    cosine = [torch.cosine_similarity(row, unit, dim=0).item() for row in W_dec]
    seen = set()
    for n in range(len(f)):
        total = (x[n] @ unit).item()
        part = [f[n, i].item() * cosine[i] for i in range(8)]
        of_main = sum(part[i] for i in main)
        others = sorted((part[i] for i in range(8) if i not in main and cosine[i] >= 0.1 and part[i] > 0), reverse=True)
        absorbers = sum(others[:3])
        if of_main >= total or absorbers / total < 0.4:
            expected = 0.0
        elif of_main <= 0:
            expected = 1.0
        else:
            taken = min(absorbers, total - of_main)
            expected = taken / (taken + of_main)
        top = max(range(8), key=lambda i: part[i])
        silent = all(f[n, i] < 1e-8 for i in main)
        is_full = silent and cosine[top] >= 0.025 and total >= 0 and part[top] / total >= 0.4
        assert fraction[n].item() == pytest.approx(expected, abs=1e-4) and bool(full[n]) == is_full
        seen |= {is_full, 0 < expected < 1, expected == 1}
    assert seen == {True, False} and full.any() and (fraction == 1).any()


def test_an_absorbed_feature_is_found(tiny_model, monkeypatch):
    """Some words of a letter have a feature of their own, which carries the letter too."""
    monkeypatch.setattr(absorption_module, "MIN_WORDS", 2)
    options = SuiteOptions(letters=2)
    words = first_letter_words(tiny_model, options)
    assert len(set(words.letters)) > 2 and words.test.any()
    strings = tiny_model.token_strings(words.tokens.input_ids[:, -1])
    assert [string.strip()[0] for string in strings] == words.letters
    with pytest.raises(Inapplicable, match="absorption needs 26"):
        first_letter_words(tiny_model, SuiteOptions(letters=26))
    letters = ["a", "b"] * 300
    test = torch.arange(600) % 3 == 0
    f, is_a = torch.zeros(600, 4), torch.tensor([one == "a" for one in letters])
    f[is_a, 0], f[~is_a, 1] = 1.0, 1.0
    own = torch.tensor([0, 6, 12, 18, 2, 8])  # words with a feature of their own, four of them tested on
    f[own, 0], f[own, 2] = 0.0, 1.2
    W_dec = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0.8, 0, 0.6], [0, 0, 1]])
    read = Pooled(f @ W_dec + 0.01 * draw(600, 3), f)
    assert main_features(f, is_a, test) == [0]
    result = absorption(RESID, absorption_module.Words(words.tokens, letters, test), read, W_dec, options)
    of_a, of_b = result.letters
    assert (
        of_a.full == pytest.approx(4 / of_a.words) and of_a.fraction == pytest.approx(4 / of_a.words) and of_b.full == 0
    )
    assert result.full == pytest.approx(of_a.full / 2) and result.main == 1
    with pytest.raises(Inapplicable, match="for 2 letters"):
        absorption(RESID, absorption_module.Words(words.tokens, letters, test), read, W_dec, SuiteOptions(letters=3))


def test_the_files_of_sae_probes(tmp_path):
    """Its folder, tables packed by zstd with commas, quotes and line ends in the texts, and the master table."""

    def write(path, text):
        path.parent.mkdir(exist_ok=True)
        with pyarrow.output_stream(str(path), compression="zstd") as stream:
            stream.write(text.encode())

    master = "Source,Dataset Tag,Dataset save name,Data type\n"
    master += ",age,cleaned_data/4_age.csv,Continuous Data\n,code_C,cleaned_data/158_code_C.csv,Binary Classification\n"
    write(tmp_path / MASTER, master + ",news,cleaned_data/9_news.csv,Multiclass Classification\n")
    write(tmp_path / "cleaned_data" / "4_age.csv.zst", "prompt,target\nx,1\n")
    table = "prompt,prompt_len,target\n" + "".join(f'"the ""man"",\nold {i}",4,{i % 2}\n' for i in range(40))
    write(tmp_path / "cleaned_data" / "158_code_C.csv.zst", table)
    write(tmp_path / "cleaned_data" / "9_news.csv.zst", "prompt,target\n" + "".join(f"n {i},{i}\n" for i in range(60)))
    sets = dict(read_data_sets(str(tmp_path), SuiteOptions(examples=30)))
    data = sets["158_code_C"]
    assert set(sets) == {"158_code_C", "9_news"} and "60 values of 'target' are no classes" in sets["9_news"]
    assert len(data.train) == 24 and len(data.test) == 6 and not data.has_spurious
    assert data.train[0].example.clean == 'the "man",\nold 0' and {one.intended for one in data.test} == {"0", "1"}
    assert [name for name, _ in read_data_sets(f"{tmp_path}:code_C", SuiteOptions())] == ["158_code_C"]
    with pytest.raises(UserError, match="unknown data set of sae-probes 'code_D'"):
        list(read_data_sets(f"{tmp_path}:code_D", SuiteOptions()))
    (tmp_path / "cleaned_data" / "158_code_C.csv.zst").write_bytes(b"no zstd")
    with pytest.raises(UserError, match="as zstd"):
        list(read_data_sets(str(tmp_path), SuiteOptions()))


def test_sources_that_hold_nothing(tiny_model, tiny_saes, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("circuits.benchmark.data.find_spec", lambda name: None)
    for source, message in (("sae-probes", "pip install --no-deps sae-probes"), (tmp_path, "no labelled texts"),
                            (folder / "few.jsonl", "fewer than two values of 'label'")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            evaluate_suite(tiny_model, tiny_saes, str(source))


def test_stability_is_that_of_a_loop(tiny_model, tiny_saes, make_saes):
    """Mean max cosine and mutual partners, feature by feature, among the features that fire."""
    one, other = tiny_saes[RESID], make_saes(tiny_model, n_features=32)[RESID]
    other.W_dec[:10] = torch.nn.functional.normalize(one.W_dec[5:15] + 0.05 * draw(10, one.config.d_model), dim=-1)
    text = ["the man near the dogs", "a king who sees girls", "boys walk and sing"]
    result = feature_stability(tiny_model, {RESID: one}, {"b": SAEs({RESID: other})}, text)[0]
    run = tiny_model.run(tiny_model.tokenize(text), capture=[RESID])
    ids = tiny_model.tokenize(text).input_ids
    counted = torch.tensor([[token not in tiny_model.special_ids for token in row] for row in ids.tolist()])
    rows = [sae.W_dec[(sae.encode(run.activations[RESID][counted]) != 0).any(0)] for sae in (one, other)]
    cosine = rows[0] @ rows[1].T
    mutual = [cosine[i].max() >= 0.7 and cosine[:, cosine[i].argmax()].argmax() == i for i in range(len(rows[0]))]
    assert result.firing == tuple(map(len, rows)) and 0.1 < result.chance < 0.9
    assert result.similarity == pytest.approx(cosine.max(1).values.mean().item())
    assert result.back == pytest.approx(cosine.max(0).values.mean().item())
    assert result.matched == pytest.approx(sum(mutual) / len(mutual)) and 0 < result.matched < 1
    with pytest.raises(UserError, match="none of the other"):
        feature_stability(tiny_model, {RESID: one}, {"b": SAEs({Site.parse("mlp_0"): other})}, text)


def test_texts_of_the_bundled_grammar(tmp_path):
    """Halves of a set belong together, and a second label is seen where it is."""
    config = LabelledConfig(out=tmp_path, train=60, concept=40, test=40)
    write(config)
    sets = dict(read_data_sets(str(tmp_path), SuiteOptions()))
    assert {name for name, data in sets.items() if not isinstance(data, str)} == {"attractor", "subject", "kind"}
    assert sets["attractor"].has_spurious and sets["subject"].has_spurious and not sets["kind"].has_spurious
    assert len({text.intended for text in sets["kind"].train}) == 3 and len(sets["kind"].test) == 40
    assert "give --label" in sets["attractor_concept"]


def test_an_interval_without_measure_does_not_flatten_the_picture():
    rows = pd.DataFrame({"score": [0.2, 0.4], "low": [0.1, 0.3], "high": [0.5, 4000.0]})
    low, high = _limits(rows)
    assert -0.1 < low <= 0
    assert 0.5 < high < 1

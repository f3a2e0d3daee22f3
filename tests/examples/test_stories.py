"""The stories run from end to end, in small, and leave their pictures."""

from __future__ import annotations

import json
from functools import cache

import pytest

from examples import attention, attractor, behaviours, mended_attractor, pronoun_gender, tinystories
from examples.agreement import MODEL, text
from sae import TrainConfig, load_model, train_saes

SMALL = TrainConfig(features=32, k=4, tokens=2000, context_length=32, checkpoints=0)


@pytest.fixture(autouse=True, scope="module")
def open_once():
    """Opens each of the two models once for all stories."""
    opened = cache(load_model)
    with pytest.MonkeyPatch.context() as patch:
        for story in (attention, attractor, behaviours, tinystories):
            patch.setattr(story, "load_model", opened)
        yield opened


@pytest.fixture(scope="module")
def agreement_saes(tmp_path_factory, open_once):
    run = tmp_path_factory.mktemp("agreement")
    train_saes(open_once(str(MODEL)), text("train"), config=SMALL, sites="resid_1,resid_2", out=run, progress=False)
    return run


@pytest.fixture(scope="module")
def tinystories_saes(tmp_path_factory, shared_dir, open_once):
    run = tmp_path_factory.mktemp("tinystories")
    model = open_once(str(tinystories.MODEL))
    train_saes(model, tinystories.TRAIN_TEXT, config=SMALL, sites="resid_2", out=run, progress=False)
    return run


@pytest.mark.slow
def test_attractor(agreement_saes, tmp_path, capsys):
    drawing = attractor.main(tmp_path, agreement_saes, examples=4)
    assert "attractor" in capsys.readouterr().out and "<svg" in drawing.read_text()


@pytest.mark.slow
def test_attention(agreement_saes, tmp_path, capsys):
    picture = attention.main(tmp_path, agreement_saes, examples=4)
    told = capsys.readouterr().out
    assert "rather than attractor: difference of scores" in told and told.count("as it is") == 2
    assert "before the softmax" in picture.read_text()


@pytest.mark.slow
def test_behaviours(agreement_saes, tmp_path, capsys):
    page = behaviours.main(tmp_path, agreement_saes, contexts=24, circuits=1)
    assert "adjusted mutual information" in capsys.readouterr().out
    assert "open its circuit" in page.read_text() and (tmp_path / "cluster_01" / "graph" / "circuit.html").is_file()


@pytest.mark.slow
def test_mended_attractor(tinystories_saes, tmp_path, monkeypatch):
    monkeypatch.setattr(mended_attractor, "SIZES", (3, 6))
    names = {split: pairs[:2] for split, pairs in mended_attractor.NAMES.items()}
    monkeypatch.setattr(mended_attractor, "NAMES", names)
    mended = mended_attractor.main(tmp_path, tinystories_saes)
    assert mended.before < 0.5 and (tmp_path / "attractor.svg").is_file()
    assert len(json.loads((tmp_path / "mended.json").read_text())["edits"][0]["features"]) in (3, 6)


@pytest.mark.slow
def test_pronoun_gender(tinystories_saes, tmp_path):
    assert pronoun_gender.main(tmp_path, tinystories_saes, examples=4).is_file()


def test_stories_without_their_model_say_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tinystories, "MODEL", tmp_path / "none")
    assert pronoun_gender.main(tmp_path) is mended_attractor.main(tmp_path) is None
    assert "not part of the repository" in capsys.readouterr().out

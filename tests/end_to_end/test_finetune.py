"""`sfc finetune` and `sfc train --finetune` on a tiny model, as a user types them."""

from __future__ import annotations

import json

import pytest
import torch

from sae.model.sites import Site
from sae.saes import load_saes
from sae.training.finetuning import Finetuner

SMALL = ["--tokens", 300, "--batch-size", 100, "--context-length", 16]


@pytest.mark.slow
def test_finetune_makes_a_run_of_its_own(sfc, run_folder, model_folder, text_file, tmp_path):
    words = ["finetune", "--model", model_folder, "--saes", run_folder, "--text", text_file, *SMALL]
    before = load_saes(run_folder)
    result = sfc(*words, "--out", tmp_path / "tuned")
    assert result.status == 0 and "all sites spliced: kl" in result.out
    for run, end in ((run_folder, "before"), (tmp_path / "tuned", "after")):
        words_of = ["evaluate", "--model", model_folder, "--saes", run, "--text", text_file, "--tokens", 300]
        measured = json.loads(sfc(*words_of, "--out", tmp_path / end, "--skip-errors", "--json").out)["spliced"]["all"]
        told = json.loads((tmp_path / "tuned" / "config.json").read_text())["finetune"][end]
        assert (told["kl"], told["ce"]) == pytest.approx((measured["kl"], measured["ce"]), rel=1e-4)
        assert f"{told['kl']:.3f}" in result.out
    after = load_saes(tmp_path / "tuned")
    assert list(after) == list(before)
    for site, sae in load_saes(run_folder).items():
        assert torch.equal(sae.W_dec, before[site].W_dec) and not torch.equal(sae.W_dec, after[site].W_dec)
    some = sfc(*words, "--out", tmp_path / "some", "--sites", "mlp", "--loss", "ce", "--json")
    data = json.loads(some.out)
    assert [line["site"] for line in data["last"]] == ["mlp_0", "mlp_1"] and data["last"][0]["ce"] > 0
    same = sfc(*words, "--out", run_folder, "--overwrite")
    assert same.status == 2 and "the trained stay" in same.err


@pytest.mark.slow
def test_training_with_fine_tuning_goes_on_where_it_was_interrupted(
    sfc, model_folder, text_file, tmp_path, monkeypatch
):
    words = ["train", "--model", model_folder, "--text", text_file, "--out", tmp_path / "run", "--sites", "resid"]
    words += ["--features", 32, "--k", 4, "--tokens", 3000, "--context-length", 16, "--finetune", "kl"]

    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Finetuner, "_one_step", interrupted)
        assert sfc(*words).status == 130
    trained = load_saes(tmp_path / "run" / "trained")
    result = sfc(*words, "--resume", "--json")
    assert result.status == 0 and json.loads(result.out)["finetuning"]["last"][0]["tokens"] >= 300
    tuned, site = load_saes(tmp_path / "run"), Site.parse("resid_1")
    assert tuned[site].config.extra["finetuning"]["loss"] == "kl"
    assert torch.equal(load_saes(tmp_path / "run" / "trained")[site].W_dec, trained[site].W_dec)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--finetune-tokens", 100], "without --finetune kl"),
        (["--finetune", "kl", "--finetune-tokens", 0], "finetune-tokens is 0"),
    ],
)
def test_mistakes_are_told_before_any_work(sfc, model_folder, text_file, tmp_path, options, sentence):
    result = sfc("train", "--model", model_folder, "--text", text_file, "--out", tmp_path / "run", *options)
    assert result.status == 2 and sentence in result.err and not (tmp_path / "run").exists()

"""`sfc match` and `sfc convert` on dictionaries whose relation is known."""

from __future__ import annotations

import json

import pytest
import torch

from sae.autoencoder import SparseAutoencoder
from sae.formats import load_sae
from sae.model import LanguageModel
from tests.sae.test_evaluation import random_sae

D, F = 32, 24
ORDER = torch.randperm(F, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def runs(tmp_path):
    """Two runs at three sites; the first ten features of each site in the first are in the second, elsewhere."""
    for seed, name in enumerate(("resid_0", "resid_1", "mlp_1")):
        one, new = random_sae(name, D, seed=seed), random_sae(name, D, seed=100 + seed)
        tensors = {key: value.clone() for key, value in new.named_buffers()}
        for key in ("W_enc", "b_enc", "W_dec"):
            tensors[key][ORDER[:10]] = one.get_buffer(key)[:10]
        tensors["b_dec"] = one.b_dec
        one.save(tmp_path / "one" / "saes" / name)
        SparseAutoencoder(one.config, tensors).save(tmp_path / "two" / "saes" / name)
    return tmp_path / "one", tmp_path / "two"


def test_features_are_found_again_in_another_run(sfc, runs, tmp_path):
    one, two = runs
    done = sfc("match", "--saes", one, "--other", two, "--threshold", "0.99", "--out", tmp_path / "match.json")
    lines = done.out.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [["resid_0"] * 2, ["mlp_1"] * 2, ["resid_1"] * 2]
    assert all(line.split()[6] == "10" for line in lines[1:4])
    for pair in json.loads((tmp_path / "match.json").read_text())["pairs"]:
        assert pair["partner"][:10] == ORDER[:10].tolist()
        assert pair["partner_similarity"][:10] == pytest.approx([1.0] * 10, abs=1e-5)
        assert pair["partner_mutual"][:10] == [True] * 10 and pair["same"] == 10 and pair["split"] == {}


def test_features_are_found_again_by_their_activations(sfc, runs, model_folder, text_file):
    one, two = runs
    options = ("--model", model_folder, "--text", text_file, "--tokens", 300, "--sites", "resid_1", "--json")
    (pair,) = json.loads(sfc("match", "--saes", one, "--other", two, "--by", "activation", *options).out)["pairs"]
    model, sae = LanguageModel.load(model_folder), load_sae(one, site="resid_1")
    tokens = model.tokenize(text_file.read_text().splitlines()[:20])
    x = model.run(tokens, capture=list(model.sites)).activations
    f = sae.encode(next(value for site, value in x.items() if site.name == "resid_1")).flatten(0, 1)
    alive = [i for i in range(10) if f[:, i].std() > 0]
    assert len(alive) > 3 and pair["split"] is None
    assert [pair["partner"][i] for i in alive] == [int(ORDER[i]) for i in alive]


def test_one_run_is_compared_from_layer_to_layer(sfc, runs):
    (pair,) = json.loads(sfc("match", "--saes", runs[0], "--json").out)["pairs"]
    assert (pair["feature_of"], pair["partner_in"]) == ("resid_0", "resid_1")
    assert pair["similarity"] < 0.7 and pair["same"] == sum(
        value >= 0.7 and mutual
        for value, mutual in zip(pair["partner_similarity"], pair["partner_mutual"], strict=True)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--by", "activation"), "give --model and --text"),
        (("--sites", "mlp"), "give --other"),
        (("--sites", "mlp_2"), "did you mean"),
        (("--other", "nowhere/at-all"), "nowhere/at-all"),
    ],
)
def test_what_cannot_be_matched_is_one_sentence(sfc, runs, options, message):
    done = sfc("match", "--saes", runs[0], *options)
    assert done.status == 2 and done.out == "" and message in done.err


@pytest.mark.parametrize("file_format", ["saelens", "dictionary_learning", "ours"])
def test_converted_autoencoders_give_the_same(sfc, runs, tmp_path, file_format):
    done = sfc("convert", "--saes", runs[0], "--format", file_format, "--out", tmp_path / "new")
    assert done.status == 0 and "resid_0, mlp_1, resid_1" in done.out
    again = sfc("convert", "--saes", runs[0], "--format", file_format, "--out", tmp_path / "new")
    assert again.status == 2 and "not empty" in again.err
    x = torch.randn(5, D)
    for site in ("resid_0", "mlp_1", "resid_1"):
        new, old = load_sae(tmp_path / "new" / site), load_sae(runs[0], site=site)
        assert new.config.site == site
        torch.testing.assert_close(new(x), old(x), atol=1e-5, rtol=1e-5)

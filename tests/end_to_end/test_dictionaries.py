"""`sfc match` and `sfc convert` on dictionaries whose relation is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from sae.autoencoder import SparseAutoencoder
from sae.formats import load_sae, save_sae
from sae.formats.releases import releases
from sae.model.load import load_model
from sae.model.sites import Site
from sae.saes import load_saes
from tests.sae.evaluation.test_evaluate import random_sae
from tests.sae.test_transcoders import transcoder

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
    model, sae = load_model(model_folder), load_sae(one, site="resid_1")
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


def test_a_site_is_given_where_the_files_name_none(sfc, runs, tmp_path):
    save_sae(load_sae(runs[0], site="resid_1"), tmp_path / "named", file_format="saelens")
    config = json.loads((tmp_path / "named" / "cfg.json").read_text())
    config["metadata"] |= {"hook_name": ""}
    (tmp_path / "named" / "cfg.json").write_text(json.dumps(config))
    words = ("convert", "--saes", tmp_path / "named", "--format", "ours", "--out", tmp_path / "new")
    assert "nothing at" in sfc(*words).err
    assert sfc(*words, "--site", "resid_1").status == 0
    assert load_sae(tmp_path / "new").config.site == "resid_1"
    config["metadata"] |= {"hook_name": "blocks.1.hook_out"}  # as TransformerLens 3 calls it
    (tmp_path / "named" / "cfg.json").write_text(json.dumps(config))
    assert "resid_1" in sfc(*words, "--overwrite").out and sfc(*words, "--overwrite", "--site", "resid_1").status == 0
    assert "belongs to site resid_1, not to mlp_1" in sfc(*words, "--overwrite", "--site", "mlp_1").err


@pytest.mark.slow
def test_token_normalised_autoencoders_are_kept_or_refused(sfc, tmp_path, model_folder, text_file, prompts_file):
    sae = random_sae("resid_1", D, seed=0)
    save_sae(sae, tmp_path / "norm", file_format="saelens")
    path = tmp_path / "norm" / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalize_activations": "layer_norm"}))
    for file_format in ("ours", "dictionary_learning"):
        done = sfc("convert", "--saes", tmp_path / "norm", "--format", file_format, "--out", tmp_path / file_format)
        assert done.status == 2 and "normalises each token (layer_norm)" in done.err
        assert not list((tmp_path / file_format).glob("*"))
    done = sfc("convert", "--saes", tmp_path / "norm", "--format", "saelens", "--out", tmp_path / "again")
    assert done.status == 0
    x = torch.randn(5, D) + 2
    torch.testing.assert_close(load_sae(tmp_path / "again")(x), load_sae(tmp_path / "norm")(x), atol=1e-5, rtol=1e-5)
    common = ("--model", model_folder, "--saes", tmp_path / "norm", "--out", tmp_path / "run")
    done = sfc("finetune", *common, "--text", text_file, "--tokens", "500")
    assert done.status == 2 and "normalises each token" in done.err and "fine-tuning has no such step" in done.err
    done = sfc("discover", *common, "--prompts", prompts_file)
    assert done.status == 2 and "--edge-nodes 0" in done.err and "estimated" not in done.err
    assert sfc("discover", *common, "--prompts", prompts_file, "--edge-nodes", "0").status == 0


@pytest.mark.slow
def test_converted_files_say_how_text_was_read(sfc, run_folder, tmp_path):
    """What SAELens asks for before it makes activations, and what our embed is called there."""
    assert sfc("convert", "--saes", run_folder, "--format", "saelens", "--out", tmp_path / "theirs").status == 0
    metadata = json.loads((tmp_path / "theirs" / "embed" / "cfg.json").read_text())["metadata"]
    assert metadata["hook_name"] == "blocks.0.hook_resid_pre"
    assert (metadata["context_size"], metadata["prepend_bos"], metadata["exclude_special_tokens"]) == (16, False, True)
    assert sfc("convert", "--saes", tmp_path / "theirs", "--format", "ours", "--out", tmp_path / "back").status == 0
    assert load_sae(tmp_path / "back" / "embed").config.extra["context_length"] == 16


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("gpt2-small-res-jb", "give jbloom/GPT2-Small-SAEs-Reformatted and the folder"),
        ("gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonical", "google/gemma-scope-2b-pt-res/layer_12/width"),
        ("llama_scope_lxr_8x", "fnlp/Llama3_1-8B-Base-LXR-8x"),
        ("./nowhere", "there is no such path"),
    ],
)
def test_a_name_of_saelens_is_answered_before_the_model_is_loaded(sfc, name, answer, text_file):
    done = sfc("evaluate", "--model", "no/such-model", "--saes", name, "--text", text_file)
    assert done.status == 2 and answer in done.err


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


def test_sfc_lists_releases(sfc):
    everything = json.loads(sfc("saes", "--json").out)["releases"]
    assert {row["name"] for row in everything} == {*releases()}
    some = sfc("saes", "--model", "gemma-3-1b")
    assert some.status == 0 and "google/gemma-scope-2-1b-pt" in some.out and "Qwen" not in some.out
    assert sfc("saes", "--model", "gema-3").status == 2


@pytest.mark.slow
def test_a_whole_set_is_chosen_by_width_and_l0(sfc, model_folder, prompts_file, text_file, tmp_path):
    """The circuit remembers the choice."""
    root = tmp_path / "gemma-scope-2-1b-pt"
    for layer in range(2):
        for width in ("16k", "65k"):
            sae = random_sae(f"resid_{layer}", D, seed=layer)
            state = {"w_enc": sae.W_enc.T.contiguous(), "w_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
            state["threshold"] = torch.zeros(sae.config.n_features)
            folder = root / "resid_post_all" / f"layer_{layer}_width_{width}_l0_small"
            folder.mkdir(parents=True)
            save_file(state, folder / "params.safetensors")
    common = ["--model", model_folder, "--saes", root]
    refused = sfc("evaluate", *common, "--text", text_file, "--out", tmp_path / "e")
    assert refused.status == 2 and "choose one: --width 16k, 65k" in refused.err
    words = ["--prompts", prompts_file, "--method", "attrib", "--edge-nodes", 5, "--nodes", 5]
    found = sfc("discover", *common, "--width", "16k", "--l0", "small", *words, "--out", tmp_path / "run", "--json")
    assert found.status == 0 and json.loads(found.out)["sites"] == ["resid_0", "resid_1"]
    assert json.loads(found.out)["saes"] == f"{root}?width=16k&l0=small"
    assert sfc("faithfulness", "--circuit", tmp_path / "run", "--sizes", 3).status == 0


def test_transcoders_become_a_set_of_circuit_tracer(sfc, tmp_path):
    """A file a layer, and a config.yaml that names them; written again it replaces what it wrote."""
    for layer in (0, 1):
        transcoder("mlp_norm", site=Site("mlp", layer), skip=True).save(tmp_path / "ours" / f"mlp_{layer}")
    words = ("convert", "--saes", tmp_path / "ours", "--format", "circuit_tracer", "--out", tmp_path / "set")
    assert sfc(*words).status == 0 and sfc(*words, "--overwrite").status == 0
    config = yaml.safe_load((tmp_path / "set" / "config.yaml").read_text())
    assert config["feature_input_hook"] == "ln2.hook_normalized" and len(config["transcoders"]) == 2
    assert all(Path(path).is_file() for path in config["transcoders"])
    layer_1 = load_sae(config["transcoders"][1])
    assert (layer_1.config.site, layer_1.config.read, layer_1.has_skip) == ("mlp_1", "mlp_norm", True)
    words = ("convert", "--saes", tmp_path / "ours", "--format", "ours", "--read", "mlp_in")
    done = sfc(*words, "--out", tmp_path / "moved")
    assert done.status == 0 and load_saes(tmp_path / "moved").config(Site("mlp", 0)).read == "mlp_in"

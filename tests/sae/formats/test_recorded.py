"""Foreign files give what their owners' code gave: features and reconstructions recorded by `tests/sae/recorded`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.errors import UserError
from sae.formats import load_sae, save_sae
from sae.model.sites import Site
from sae.saes import load_saes

RECORDED = Path(__file__).resolve().parents[1] / "recorded"
DICTIONARY_LEARNING = {
    "AutoEncoder": "relu",
    "AutoEncoderNew": "relu",
    "GatedAutoEncoder": "gated",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "BatchTopKSAE_unset": "batchtopk",
    "MatryoshkaBatchTopKSAE": "matryoshka",
    "JumpReluAutoEncoder": "jumprelu",
}
SAELENS = {
    "standard": "relu",
    "standard_uncentred": "relu",
    "topk": "topk",
    "topk_rescaled": "topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "standard_old": "relu",
    "topk_old": "topk",
    "batchtopk": "jumprelu",
    "batchtopk_training": "batchtopk",
    "batchtopk_rescaled": "jumprelu",
    "batchtopk_rescaled_training": "batchtopk",
}
SPARSIFY = {"layers.3": "topk", "layers.3.mlp": "topk"}
FOLDERS = {
    **{f"dictionary_learning/{name}": architecture for name, architecture in DICTIONARY_LEARNING.items()},
    **{f"saelens/{name}": architecture for name, architecture in SAELENS.items()},
    **{f"sparsify/{name}": architecture for name, architecture in SPARSIFY.items()},
}


def agrees(sae, expected):
    """Features times the owners' decoder norms, and reconstructions, to 1e-5."""
    f = expected["f"] * expected["norms"]
    assert torch.allclose(sae.encode(expected["x"]), f, atol=1e-5)
    assert torch.allclose(sae(expected["x"]), expected["x_hat"], atol=1e-5)
    token, feature, value = sae.encode_sparse(expected["x"])
    assert torch.allclose(torch.zeros_like(f).index_put((token, feature), value), f, atol=1e-5)
    assert int((f != 0).sum()) > len(f)  # the record is not of dead features


@pytest.mark.parametrize("folder", FOLDERS)
def test_features_and_reconstructions_are_the_owners(folder):
    sae = load_sae(RECORDED / folder)
    assert sae.config.architecture == FOLDERS[folder]
    assert torch.allclose(sae.W_dec.norm(dim=-1), torch.ones(48), atol=1e-6)
    agrees(sae, load_file(RECORDED / folder / "expected.safetensors"))


@pytest.mark.parametrize("folder", ["saelens/standard_layer_norm", "saelens/topk_constant_norm"])
def test_token_wise_normalisation_is_the_owners(folder):
    sae, expected = load_sae(RECORDED / folder), load_file(RECORDED / folder / "expected.safetensors")
    x = expected["x"]
    scale = x.std(-1, keepdim=True) if "layer_norm" in folder else x.norm(dim=-1, keepdim=True) / 4.0  # √16
    f = sae.encode(x)
    assert torch.allclose(f[:, :48], expected["f"] * expected["norms"] * scale, atol=1e-5)
    assert torch.allclose(sae(x), expected["x_hat"], atol=1e-5)
    assert torch.allclose(f @ sae.W_dec, expected["x_hat"], atol=1e-5)  # nothing but features writes
    assert torch.allclose(sae.W_dec.norm(dim=-1), torch.ones(len(sae.W_dec)), atol=1e-6)
    token, feature, value = sae.encode_sparse(x)
    assert torch.equal(torch.zeros_like(f).index_put((token, feature), value), f)
    with pytest.raises(UserError, match=r"compute nodes only"):
        sae.encoder_rows(torch.tensor([0]))
    with pytest.raises(UserError, match=r"cannot be saved"):
        sae.save("anywhere")


@pytest.mark.parametrize("says", ["cfg.json", "only the skip connection", "the run's config.json"])
def test_sparsifys_transcoders_are_the_owners(says, tmp_path):
    """Those of before February 2025 say it elsewhere, or nowhere."""
    folder = tmp_path / "layers.4.mlp"
    shutil.copytree(RECORDED / "sparsify/layers.4.transcoder", folder)
    config = json.loads((folder / "cfg.json").read_text())
    if says != "cfg.json":
        (folder / "cfg.json").write_text(
            json.dumps({key: value for key, value in config.items() if key != "transcode"})
        )
    if says == "the run's config.json":
        (tmp_path / "config.json").write_text('{"transcode": true}')
    sae, expected = load_sae(folder), load_file(folder / "expected.safetensors")
    agrees(sae, expected)
    assert (sae.config.site, sae.config.read) == ("mlp_4", "mlp_in")
    with pytest.raises(UserError, match=r"only those of an MLP"):
        load_sae(folder.rename(tmp_path / "layers.4"))


@pytest.mark.parametrize(
    "architecture", ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"]
)
def test_saelens_transcoders(architecture, tmp_path):
    """Against SAELens' formula, with the weights that it wrote."""
    folder = tmp_path / "sae"
    shutil.copytree(RECORDED / "saelens/transcoder", folder)
    with pytest.raises(UserError, match=r"hook_name_out ''"):
        load_sae(folder)
    config, state = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    config["metadata"] |= {"hook_name": "blocks.3.ln2.hook_normalized", "hook_name_out": "blocks.3.hook_mlp_out"}
    (folder / "cfg.json").write_text(json.dumps(config | {"architecture": architecture}))
    generator = torch.Generator().manual_seed(0)
    x, skip = torch.randn(24, 16, generator=generator), torch.zeros(16, 16)
    z = x @ state["W_enc"] + state["b_enc"]
    f = z.relu()
    if "jumprelu" in architecture:
        state["threshold"] = torch.rand(48, generator=generator)
        f = z.relu() * (z > state["threshold"])
    if "skip" in architecture:
        state["W_skip"] = skip = torch.randn(16, 16, generator=generator)
    save_file(state, folder / "sae_weights.safetensors")
    sae = load_sae(folder)
    assert (sae.config.site, sae.config.read) == ("mlp_3", "mlp_norm")
    assert torch.allclose(sae(x), f @ state["W_dec"] + state["b_dec"] + x @ skip.T, atol=1e-5)
    (folder / "cfg.json").write_text(json.dumps(config | {"architecture": architecture, "apply_b_dec_to_input": True}))
    with pytest.raises(UserError, match=r"apply_b_dec_to_input"):
        load_sae(folder)


def test_saelens_abstopk_keeps_the_largest_of_either_sign(tmp_path):
    folder = tmp_path / "sae"
    shutil.copytree(RECORDED / "saelens/topk", folder)
    config, state = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config | {"architecture": "abstopk"}))
    sae, x = load_sae(folder), torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    z = (x - (state["b_dec"] if config["apply_b_dec_to_input"] else 0)) @ state["W_enc"] + state["b_enc"]
    score = z.abs() * (state["W_dec"].norm(dim=-1) if config.get("rescale_acts_by_decoder_norm") else 1)
    chosen = score.topk(config["k"]).indices
    f = torch.zeros_like(z).scatter(1, chosen, z.gather(1, chosen))
    assert torch.allclose(sae(x), f @ state["W_dec"] + state["b_dec"], atol=1e-5)
    g = sae.encode(x) / torch.cat([state["W_dec"].norm(dim=-1)] * 2)
    assert torch.allclose(g[:, :48] - g[:, 48:], f, atol=1e-5) and bool((g >= 0).all())


def test_what_the_files_say_is_kept():
    sae = load_sae(RECORDED / "dictionary_learning/AutoEncoderTopK")
    assert (sae.config.site, sae.config.model, sae.config.k) == (
        "resid_3",
        "EleutherAI/pythia-70m-deduped",
        5,
    )
    assert sae.config.extra["dict_class"] == "AutoEncoderTopK"
    assert load_sae(RECORDED / "saelens/standard").config.site == "resid_3"
    assert load_sae(RECORDED / "saelens/standard_old").config.site == "resid_2"  # hook_resid_pre of block 3
    assert load_sae(RECORDED / "sparsify/layers.3.mlp").config.site == "mlp_3"


@pytest.mark.parametrize("file_format", ["ours", "saelens", "dictionary_learning"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_written_files_read_back_the_same(folder, file_format, tmp_path):
    sae, expected = load_sae(RECORDED / folder), load_file(RECORDED / folder / "expected.safetensors")
    save_sae(sae, tmp_path, file_format=file_format)
    again = load_sae(tmp_path)
    agrees(again, expected)
    assert (again.config.site, again.config.model) == (sae.config.site, sae.config.model)
    assert again.config.k == sae.config.k or again.nonlinearity.name != "topk"
    assert again.nonlinearity.name == sae.nonlinearity.name


def test_a_run_of_several_modules_loads_by_site(tmp_path):
    for name in SPARSIFY:
        shutil.copytree(RECORDED / "sparsify" / name, tmp_path / name)
    assert list(load_saes(RECORDED / "sparsify/layers.3")) == [Site("resid", 3)]
    assert list(load_saes(tmp_path)) == [Site("mlp", 3), Site("resid", 3)]
    assert list(load_saes(tmp_path, sites=["resid_3"])) == [Site("resid", 3)]
    assert load_sae(tmp_path, site="mlp_3").config.site == "mlp_3"
    with pytest.raises(UserError, match=r"no autoencoder for resid_4"):
        load_saes(tmp_path, sites=["resid_4"])
    with pytest.raises(UserError, match=r"holds 2 autoencoders, name one: layers.3, layers.3.mlp"):
        load_sae(tmp_path)
    with pytest.raises(UserError, match=r"no autoencoder for attn_1: it has mlp_3, resid_3"):
        load_sae(tmp_path, site="attn_1")


def test_a_run_of_ours_loads_whatever_else_lies_in_it(tmp_path):
    sae = load_sae(RECORDED / "sparsify/layers.3")
    sae.save(tmp_path / "run" / "saes" / "resid_3")
    sae.save(tmp_path / "run" / "checkpoints" / "resid_3")
    assert list(load_saes(tmp_path / "run")) == [Site("resid", 3)]
    assert load_sae(tmp_path / "run").config == sae.config
    assert load_sae(tmp_path / "run", site="resid_3").config == sae.config
    with pytest.raises(UserError, match=r"no autoencoder for mlp_3"):
        load_saes(tmp_path / "run", sites=["mlp_3"])


def test_versions_are_recorded():
    for peer in ("dictionary_learning", "saelens", "sparsify"):
        assert "torch" in json.loads((RECORDED / peer / "versions.json").read_text())

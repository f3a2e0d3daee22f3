"""Every known trap of the packages' files, and of telling what a file is."""

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.autoencoder import SAEConfig, SparseAutoencoder
from sae.errors import UserError
from sae.formats import load_sae, save_sae
from tests.sae.formats.test_recorded import RECORDED

D, F, K, N = 16, 48, 5, 24


def copied(folder, target, *, drop=(), tensors=(), **entries):
    """A recorded folder with config entries changed, tensors dropped or added."""
    target.mkdir(parents=True, exist_ok=True)
    weights, config = RECORDED / folder / "sae_weights.safetensors", RECORDED / folder / "cfg.json"
    state = {name: tensor for name, tensor in load_file(weights).items() if name not in drop}
    save_file(state | dict(tensors), target / weights.name)
    (target / config.name).write_text(json.dumps(json.loads(config.read_text()) | entries))
    return target


# Traps of dictionary_learning


def dictionary_learning(target, name, *, drop=(), rename=(), config=True, **changes):
    target.mkdir()
    source = RECORDED / "dictionary_learning" / name
    state = torch.load(source / "ae.pt", weights_only=True)
    state = {dict(rename).get(key, key): value for key, value in state.items() if key not in drop} | changes
    torch.save(state, target / "ae.pt")
    if config:
        (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return target


def test_batchtopk_is_not_read_as_topk_or_relu(tmp_path):
    x = torch.randn(N, D)
    sae = load_sae(RECORDED / "dictionary_learning/BatchTopKSAE")
    counts = (sae.encode(x) != 0).sum(-1)
    assert len(counts.unique()) > 1  # not k of each token
    assert not torch.equal(sae.encode(x), (sae._linear(x) + sae.b_enc).relu())  # and not all positive ones
    with pytest.raises(UserError, match=r"AutoEncoderTopK or a BatchTopKSAE, which encode differently"):
        load_sae(dictionary_learning(tmp_path / "no_config", "BatchTopKSAE", config=False))


def test_an_unset_threshold_is_warned_of(caplog):
    load_sae(RECORDED / "dictionary_learning/BatchTopKSAE_unset")
    assert "never set in training" in caplog.text


@pytest.mark.parametrize(
    "name", ["AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"]
)
def test_files_without_a_config_are_told_apart_by_their_tensors(name, tmp_path):
    with_config = load_sae(RECORDED / "dictionary_learning" / name)
    without = load_sae(dictionary_learning(tmp_path / "dictionary", name, config=False))
    x = torch.randn(N, D)
    assert without.config.architecture == with_config.config.architecture
    assert torch.equal(without(x), with_config(x))


def test_the_layout_of_feature_circuits_dictionaries(tmp_path):
    source = RECORDED / "dictionary_learning/AutoEncoder/ae.pt"
    for name, site in (("attn_out_layer3", "attn_3"), ("resid_out_layer0", "resid_0"), ("embed", "embed")):
        folder = tmp_path / "pythia-70m-deduped" / name / "10_32768"
        folder.mkdir(parents=True)
        (folder / "ae.pt").write_bytes(source.read_bytes())
        assert load_sae(folder).config.site == site
    assert load_sae(tmp_path, site="attn_3").config.extra["source"].endswith("attn_out_layer3/10_32768")


@pytest.mark.parametrize("name", ["AutoEncoder", "BatchTopKSAE"])
def test_a_snapshot_of_training_has_its_config_in_the_folder_around(name, tmp_path):
    folder = dictionary_learning(tmp_path / "trainer_0", name)
    snapshot = folder / "checkpoints" / "ae_5000.pt"
    snapshot.parent.mkdir()
    (folder / "ae.pt").rename(snapshot)
    sae, whole, x = load_sae(snapshot), load_sae(RECORDED / "dictionary_learning" / name), torch.randn(N, D)
    assert sae.config.architecture == whole.config.architecture
    assert sae.config.extra["source"] == str(snapshot)
    assert torch.equal(sae(x), whole(x))


def test_missing_and_unknown_tensors_are_named(tmp_path):
    with pytest.raises(UserError, match=r"looked for the tensors of .*AutoEncoder: .*bias; found .*; missing bias"):
        load_sae(dictionary_learning(tmp_path / "a", "AutoEncoder", drop=["bias"]))
    with pytest.raises(UserError, match=r"no use known for W_skip"):
        load_sae(dictionary_learning(tmp_path / "b", "AutoEncoder", W_skip=torch.zeros(2)))
    with pytest.raises(UserError, match=r"W_enc read as .* has shape .*transposed"):
        flipped = torch.zeros(D, F)
        load_sae(dictionary_learning(tmp_path / "c", "AutoEncoder", **{"encoder.weight": flipped}))
    with pytest.raises(UserError, match=r"has k = 9, its config.json has 5"):
        load_sae(dictionary_learning(tmp_path / "d", "AutoEncoderTopK", k=torch.tensor(9)))
    folder = dictionary_learning(tmp_path / "e", "AutoEncoder")
    (folder / "config.json").write_text('{"trainer": {"dict_class": "AutoEncodr"}}')
    with pytest.raises(UserError, match=r"unknown dict_class .* 'AutoEncodr'.* did you mean 'AutoEncoder'"):
        load_sae(folder)


class Evil:
    def __reduce__(self):
        return (open, ("evil_was_here", "w"))


def test_a_pickle_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sae").mkdir()
    for content in (pickle.dumps({"bias": Evil()}, protocol=2), b"nonsense"):
        (tmp_path / "sae" / "ae.pt").write_bytes(content)
        with pytest.raises(UserError, match=r"ae\.pt"):
            load_sae(tmp_path / "sae")
    torch.save({"bias": Evil()}, tmp_path / "sae" / "ae.pt")
    with pytest.raises(UserError, match=r"could run any code"):
        load_sae(tmp_path / "sae")
    torch.save(torch.zeros(3), tmp_path / "sae" / "ae.pt")
    with pytest.raises(UserError, match=r"looked for a dictionary of tensors, found a Tensor"):
        load_sae(tmp_path / "sae")
    assert not (tmp_path / "evil_was_here").exists()


def test_an_npz_with_objects_is_refused(tmp_path):
    np.savez(tmp_path / "params.npz", W_enc=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match=r"plain arrays"):
        load_sae(tmp_path)


# Traps of SAELens


def test_a_scale_that_was_not_folded_is_folded_or_refused(tmp_path):
    plain, x, s = load_sae(RECORDED / "saelens/jumprelu"), torch.randn(N, D), 2.5
    folder = copied("saelens/jumprelu", tmp_path / "sae", normalize_activations="expected_average_only_in")
    with pytest.raises(UserError, match=r"the factor is in no file"):
        load_sae(folder)
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": s}))
    sae = load_sae(folder)
    assert torch.allclose(sae(x), plain(s * x) / s, atol=1e-5)
    assert torch.allclose(sae.encode(x), plain.encode(s * x) / s, atol=1e-5)


def test_finetuning_scales_are_part_of_the_decoder(tmp_path, random):
    plain, x = load_sae(RECORDED / "saelens/standard_old"), torch.randn(N, D)
    ones = {"scaling_factor": torch.ones(F)}
    assert torch.equal(load_sae(copied("saelens/standard_old", tmp_path / "a", tensors=ones))(x), plain(x))
    scale = {"scaling_factor": 1.0 + random(F).abs()}
    with pytest.raises(UserError, match=r"scaling_factor"):
        load_sae(copied("saelens/standard_old", tmp_path / "b", tensors=scale))
    folder = copied("saelens/standard_old", tmp_path / "c", tensors=scale, finetuning_scaling_factor=True)
    f = plain.encode(x) * scale["scaling_factor"]
    assert torch.allclose(load_sae(folder)(x), f @ plain.W_dec + plain.b_dec, atol=1e-5)


def test_log_threshold_of_training_files(tmp_path):
    threshold = load_file(RECORDED / "saelens/jumprelu/sae_weights.safetensors")["threshold"]
    changed = {"log_threshold": threshold.log()}
    folder = copied("saelens/jumprelu", tmp_path / "sae", drop=["threshold"], tensors=changed)
    plain, sae = load_sae(RECORDED / "saelens/jumprelu"), load_sae(folder)
    assert torch.allclose(sae.threshold, plain.threshold, atol=1e-6)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"architecture": "temporal"}, "holds a temporal autoencoder, whose features depend on earlier tokens"),
        ({"architecture": "matching_pursuit"}, "holds a matching pursuit autoencoder"),
        ({"architecture": "crosscoder"}, "holds a crosscoder"),
        ({"architecture": "jumprelv"}, "unknown architecture .*did you mean 'jumprelu'"),
        ({"architecture": "skip_transcoder"}, "apply_b_dec_to_input: no transcoder"),
        ({"activation_fn": "tanh-relu"}, "autoencoder with tanh-relu"),
        ({"normalize_activations": "covariance_whitening"}, "unknown normalize_activations"),
        ({"normalize_activations": "expected_average_only_in"}, "activation_scaler.json"),
        ({"normalize_activations": True}, "activation_scaler.json"),  # as before version 6
        ({"d_in": 17}, "says d_in = 17"),
        ({"metadata": {"hook_head_index": 3}}, "single attention head"),
    ],
)
def test_saelens_files_that_cannot_be_read_rightly(entries, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_sae(copied("saelens/standard", tmp_path / "sae", **entries))


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ("gpt2-small", "transformer.h.3.attn.c_proj:input"),
        ("EleutherAI/pythia-70m-deduped", "gpt_neox.layers.3.attention.dense:input"),
        ("gemma-2b", "model.layers.3.self_attn.o_proj:input"),
    ],
)
def test_heads_before_the_output_projection_say_where_they_are(model, path, tmp_path):
    metadata = {"hook_name": "blocks.3.attn.hook_z", "model_name": model}
    folder = copied("saelens/standard", tmp_path / "sae", metadata=metadata, reshape_activations="hook_z")
    config = load_sae(folder).config
    assert (config.site, config.extra["site_path"]) == ("attn_3", path)


@pytest.mark.parametrize("hook", ["blocks.3.hook_resid_mid", "blocks.3.mlp.hook_post"])
def test_a_hook_that_is_no_site_cannot_be_called_one(hook, tmp_path):
    folder = copied("saelens/standard", tmp_path / "sae", metadata={"hook_name": hook})
    assert load_sae(folder).config.site == ""
    with pytest.raises(UserError, match=f"belongs to {hook}, which is no site"):
        load_sae(folder, site="mlp_3")


def test_centred_activations_of_transformer_lens_are_warned_of(tmp_path, caplog):
    load_sae(RECORDED / "saelens/standard")
    assert not caplog.text
    metadata = {"hook_name": "blocks.3.hook_resid_post"}
    metadata |= {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    load_sae(copied("saelens/standard", tmp_path / "sae", metadata=metadata))
    assert "center_writing_weights" in caplog.text


# Traps of sparsify


def test_sparsify_has_32_latents_a_dimension_unless_it_says_otherwise(tmp_path, random):
    state = {"encoder.weight": random(512, D), "encoder.bias": random(512), "W_dec": random(512, D)}
    (tmp_path / "layers.0").mkdir()
    save_file(state | {"b_dec": random(D)}, tmp_path / "layers.0" / "sae.safetensors")
    (tmp_path / "layers.0" / "cfg.json").write_text(json.dumps({"d_in": D, "k": K}))
    assert load_sae(tmp_path).config.n_features == 512


def test_sparsify_decoder_is_not_transposed_when_square(tmp_path, random):
    state = {"encoder.weight": random(D, D), "encoder.bias": random(D), "W_dec": random(D, D), "b_dec": random(D)}
    (tmp_path / "layers.0").mkdir()
    save_file(state, tmp_path / "layers.0" / "sae.safetensors")
    (tmp_path / "layers.0" / "cfg.json").write_text(json.dumps({"d_in": D, "expansion_factor": 1, "k": K}))
    x = random(N, D)
    z = (x - state["b_dec"]) @ state["encoder.weight"].T + state["encoder.bias"]
    f = torch.zeros_like(z).scatter(1, (top := z.relu().topk(K)).indices, top.values)
    assert torch.allclose(load_sae(tmp_path)(x), f @ state["W_dec"] + state["b_dec"], atol=1e-5)
    (tmp_path / "layers.0" / "cfg.json").write_text(json.dumps({"d_in": D, "num_latents": 99, "k": K}))
    with pytest.raises(UserError, match=r"says 99 latents"):
        load_sae(tmp_path)
    (tmp_path / "layers.0" / "cfg.json").write_text(json.dumps({"d_in": D, "num_latents": D, "activation": "groupmax"}))
    with pytest.raises(UserError, match=r"autoencoder with groupmax"):
        load_sae(tmp_path)
    for entry, message in (("skip_connection", "missing W_skip"), ("transcode", "holds a transcoder of layers.0")):
        (tmp_path / "layers.0" / "cfg.json").write_text(json.dumps({"d_in": D, "num_latents": D, "k": K, entry: True}))
        with pytest.raises(UserError, match=message):
            load_sae(tmp_path)
    (tmp_path / "layers.0" / "cfg.json").write_text(json.dumps({"d_in": D, "num_latents": D, "k": K}))
    (tmp_path / "config.json").write_text(json.dumps({"transcode": True}))  # where it stood before February 2025
    with pytest.raises(UserError, match=r"holds a transcoder"):
        load_sae(tmp_path)


# Sites and sources


def test_a_site_given_must_not_contradict_the_files():
    folder = RECORDED / "saelens/standard"
    assert load_sae(folder, site="resid_3").config.site == "resid_3"
    with pytest.raises(UserError, match=r"belongs to site resid_3, not to mlp_3"):
        load_sae(folder, site="mlp_3")
    with pytest.raises(UserError, match=r"did you mean 'resid_3'"):
        load_sae(folder, site="resd_3")


def test_files_stand_for_their_folders():
    for file in ("dictionary_learning/AutoEncoder/ae.pt", "saelens/gated/sae_weights.safetensors"):
        assert load_sae(RECORDED / file).config.d_model == D


def test_what_is_no_autoencoder_is_told_with_what_was_found(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(UserError, match=r"looked for .*ae.pt.*cfg.json.*; found notes.txt"):
        load_sae(tmp_path)
    with pytest.raises(UserError, match=r"no such path; did you mean '.*notes.txt'"):
        load_sae(tmp_path / "note.txt")
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "cfg.json").write_text("{}")
    (tmp_path / "sae" / "sae.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"is not a safetensors file"):
        load_sae(tmp_path)


def test_formats_without_a_class_for_it_refuse_to_write(tmp_path):
    eye = torch.eye(D)
    tensors = {"W_enc": eye, "W_dec": eye, "b_enc": torch.zeros(D), "b_dec": torch.zeros(D)}
    sae = SparseAutoencoder(SAEConfig("identity", D, D), tensors)
    for file_format in ("saelens", "dictionary_learning"):
        with pytest.raises(UserError, match=r"no class for a 'identity' autoencoder"):
            save_sae(sae, tmp_path / "sae", file_format=file_format)
    with pytest.raises(UserError, match=r"unknown format to write 'sealens'.*did you mean 'saelens'"):
        save_sae(sae, tmp_path / "sae", file_format="sealens")


@pytest.mark.parametrize("architecture", ["relu", "topk", "jumprelu", "gated"])
@pytest.mark.parametrize("subtract_b_dec", [True, False])
@pytest.mark.parametrize("file_format", ["saelens", "dictionary_learning"])
def test_a_format_that_centres_otherwise_gives_the_same(architecture, subtract_b_dec, file_format, random, tmp_path):
    tensors = {"W_enc": random(F, D), "b_enc": random(F), "b_dec": random(D)}
    tensors["W_dec"] = torch.nn.functional.normalize(random(F, D), dim=-1)
    if architecture == "jumprelu":
        tensors["threshold"] = random(F).abs()
    if architecture == "gated":
        tensors |= {"gate_bias": random(F), "magnitude": random(F).exp()}
    config = SAEConfig(architecture, D, F, subtract_b_dec=subtract_b_dec, k=K if architecture == "topk" else None)
    sae, x = SparseAutoencoder(config, tensors), random(N, D)
    again = load_sae(save_sae(sae, tmp_path / "sae", file_format=file_format))
    assert torch.allclose(again.encode(x), sae.encode(x), atol=1e-5)
    assert torch.allclose(again(x), sae(x), atol=1e-5)

"""Formats whose owners are no package to record, against their forward pass as published, and every known trap."""

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.autoencoder import SAEConfig, SparseAutoencoder
from sae.errors import UserError
from sae.evaluation import evaluate
from sae.features import top_contexts
from sae.formats import load_sae, save_sae
from sae.formats.normalised import NormalisedAutoencoder
from sae.sites import Site
from tests.sae.formats.test_recorded import RECORDED
from tests.sae.test_evaluation import random_sae

D, F, K, N = 16, 48, 5, 24


@pytest.fixture
def random():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: 0.5 * torch.randn(*shape, generator=generator)


def copied(folder, target, *, drop=(), tensors=(), **entries):
    """A recorded folder with config entries changed, tensors dropped or added."""
    target.mkdir(parents=True, exist_ok=True)
    weights, config = RECORDED / folder / "sae_weights.safetensors", RECORDED / folder / "cfg.json"
    state = {name: tensor for name, tensor in load_file(weights).items() if name not in drop}
    save_file(state | dict(tensors), target / weights.name)
    (target / config.name).write_text(json.dumps(json.loads(config.read_text()) | entries))
    return target


# Gemma Scope


def gemma_scope(folder, random, *, prefix="W_", safetensors=False):
    arrays = {f"{prefix}enc": random(D, F), f"{prefix}dec": random(F, D), "b_enc": random(F), "b_dec": random(D)}
    arrays["threshold"] = random(F).abs()
    folder.mkdir(parents=True)
    if safetensors:
        save_file(arrays, folder / "params.safetensors")
    else:
        np.savez(folder / "params.npz", **{name: array.numpy() for name, array in arrays.items()})
    return arrays["b_enc"], arrays["b_dec"], arrays["threshold"], arrays[f"{prefix}enc"], arrays[f"{prefix}dec"]


@pytest.mark.parametrize(
    ("release", "folder", "site", "model"),
    [
        ("gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82", "resid_12", "google/gemma-2-2b"),
        ("gemma-scope-9b-it-mlp", "layer_3/width_131k/average_l0_9", "mlp_3", "google/gemma-2-9b-it"),
        ("gemma-scope-2b-pt-att", "layer_0/width_16k/average_l0_104", "attn_0", "google/gemma-2-2b"),
        ("gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6", "embed", "google/gemma-2-2b"),
        ("gemma-scope-2-1b-it", "resid_post/layer_7_width_16k_l0_medium", "resid_7", "google/gemma-3-1b-it"),
        ("somewhere", "else", "", ""),
    ],
)
@pytest.mark.parametrize("prefix", ["W_", "w_"])
def test_gemma_scope(release, folder, site, model, prefix, random, tmp_path):
    path = tmp_path / "snapshots" / release / folder
    b_enc, b_dec, threshold, W_enc, W_dec = gemma_scope(path, random, prefix=prefix, safetensors="scope-2-" in release)
    sae = load_sae(path)
    assert (sae.config.site, sae.config.model) == (site, model)
    scale = D**0.5 if site == "embed" else 1.0  # Gemma multiplies embeddings by √d before the model reads them
    u = random(N, D)
    z = u @ W_enc + b_enc
    f = z.relu() * (z > threshold)
    assert torch.allclose(sae(scale * u), scale * (f @ W_dec + b_dec), atol=1e-5)
    assert torch.allclose(sae.encode(scale * u), scale * f * W_dec.norm(dim=-1), atol=1e-5)
    assert not sae.config.subtract_b_dec
    assert ("site_path" in sae.config.extra) == site.startswith("attn")


def test_gemma_scope_takes_the_l0_closest_to_100(random, tmp_path):
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_5" / "width_16k"
    for l0 in (12, 82, 143, 309):
        gemma_scope(folder / f"average_l0_{l0}", random)
    assert load_sae(folder).config.extra["source"].endswith("average_l0_82")
    gemma_scope(tmp_path / "gemma-scope-2b-pt-res" / "layer_5" / "width_65k" / "average_l0_99", random)
    with pytest.raises(UserError, match=r"holds 5 autoencoders"):
        load_sae(tmp_path / "gemma-scope-2b-pt-res")


def test_gemma_scope_transcoders_are_refused(random, tmp_path):
    folder = tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_5" / "width_16k" / "average_l0_20"
    gemma_scope(folder, random)
    with pytest.raises(UserError, match=r"transcoder"):
        load_sae(folder)


# Llama Scope


@pytest.mark.parametrize("unit_norm", [True, False])
def test_llama_scope(unit_norm, random, tmp_path):
    folder = tmp_path / "Llama3_1-8B-Base-L15R-8x"
    (folder / "checkpoints").mkdir(parents=True)
    state = {"encoder.weight": random(F, D), "encoder.bias": random(F), "decoder.weight": random(D, F)}
    state["decoder.bias"] = random(D)
    save_file(state, folder / "checkpoints" / "final.safetensors")
    theta, norm = 0.7, 6.25
    config = {
        "d_model": D,
        "d_sae": F,
        "act_fn": "jumprelu",
        "jump_relu_threshold": theta,
        "top_k": K,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": norm, "out": norm},
        "apply_decoder_bias_to_pre_encoder": False,
        "sparsity_include_decoder_norm": unit_norm,
        "hook_point_in": "blocks.15.hook_resid_post",
        "hook_point_out": "blocks.15.hook_resid_post",
    }
    (folder / "hyperparams.json").write_text(json.dumps(config))
    sae = load_sae(folder)
    assert (sae.config.site, sae.config.architecture) == ("resid_15", "jumprelu")
    x, s = random(N, D) * 4, D**0.5 / norm
    z = (s * x) @ state["encoder.weight"].T + state["encoder.bias"]  # as in training, on scaled input
    written = state["decoder.weight"].norm(dim=0) / s  # what one unit of z writes, in units of x
    active = z * written > theta if unit_norm else z / s > theta
    f = z * active
    assert torch.allclose(sae.encode(x), f * written, atol=1e-4)
    assert torch.allclose(sae(x), (f @ state["decoder.weight"].T + state["decoder.bias"]) / s, atol=1e-4)
    (folder / "hyperparams.json").write_text(json.dumps(config | {"hook_point_out": "blocks.15.hook_mlp_out"}))
    with pytest.raises(UserError, match=r"transcoder"):
        load_sae(folder)
    (folder / "hyperparams.json").write_text(json.dumps(config | {"norm_activation": "token-wise"}))
    with pytest.raises(UserError, match=r"norm_activation 'token-wise'"):
        load_sae(folder)


# OpenAI


def openai(path, random, activation):
    state = {"pre_bias": random(D), "encoder.weight": random(F, D), "latent_bias": random(F)}
    state |= {"decoder.weight": random(D, F), "stats_last_nonzero": torch.zeros(F, dtype=torch.int64)}
    state |= {"latents_activation_frequency": torch.ones(F), "latents_mean_square": torch.zeros(F)}
    options = {"k": K, "postact_fn": "ReLU"} if activation == "TopK" else {}
    path.parent.mkdir(parents=True)
    torch.save(state | {"activation": activation, "activation_state_dict": options}, path)
    return state


@pytest.mark.parametrize(
    ("location", "site"),
    [
        ("resid_delta_mlp", "mlp_6"),
        ("resid_delta_attn_v5_32k", "attn_6"),
        ("resid_post_mlp_v5_128k", "resid_6"),
        ("resid_post_attn_v5_32k", ""),
        ("mlp_post_act_v4", ""),
    ],
)
@pytest.mark.parametrize("activation", ["ReLU", "TopK"])
def test_openai(location, site, activation, random, tmp_path):
    path = tmp_path / "gpt2-small" / location / "autoencoders" / "6.pt"
    state = openai(path, random, activation)
    sae = load_sae(path)
    assert (sae.config.site, sae.config.model) == (site, "gpt2")
    x = random(N, D) * 3 + 1
    mu, sigma = (x.mean(-1, keepdim=True), x.std(-1, keepdim=True)) if activation == "TopK" else (0.0, 1.0)
    normal = (x - mu) / (sigma + 1e-5) if activation == "TopK" else x
    z = (normal - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"]
    f = z.relu()
    if activation == "TopK":
        f = torch.zeros_like(z).scatter(1, (top := z.topk(K)).indices, top.values.relu())
    expected = (f @ state["decoder.weight"].T + state["pre_bias"]) * sigma + mu
    assert torch.allclose(sae(x), expected, atol=1e-5)
    assert torch.allclose(sae.encode(x)[:, :F], f * state["decoder.weight"].norm(dim=0) * sigma, atol=1e-5)


def test_openai_normalised_works_on_a_zero_token_and_any_shape(random, tmp_path):
    path = tmp_path / "resid_delta_mlp_v5_32k" / "autoencoders" / "0.pt"
    openai(path, random, "TopK")
    sae = load_sae(path)
    x = random(2, 3, D)
    x[0, 0] = 0.0
    assert torch.isfinite(sae(x)).all()
    assert torch.allclose(sae(x)[1, 2], sae(x[1, 2]), atol=1e-6)


def test_a_normalised_autoencoder_can_be_evaluated_and_described(tiny_model):
    site = Site("resid", 0)
    sae = NormalisedAutoencoder(random_sae(site, tiny_model.d_model, architecture="topk", k=4), norm="layer_norm")
    texts = ["the man sees the old dog", "a girl walks", "kings know that they were happy ."]
    result = evaluate(tiny_model, {site: sae}, texts, special_tokens=True).sites["resid_0"]
    x = torch.cat([tiny_model.run(tiny_model.tokenize([text]), capture=[site]).activations[site][0] for text in texts])
    error = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert result.explained_variance == pytest.approx(1.0 - float(error), rel=1e-4)
    summaries = top_contexts(tiny_model, {site: sae}, texts, {site: [0, 24, 25]}, special_tokens=True)
    assert summaries[site, 24].density == 1.0  # what b_dec writes
    assert summaries[site, 0].density == pytest.approx(float((sae.encode(x)[:, 0] != 0).float().mean()))


# circuit-tracer


@pytest.mark.parametrize("file", ["config.yaml", "layer_3.safetensors", "W_enc_0.safetensors"])
def test_circuit_tracer_is_refused_with_a_sentence(file, tmp_path):
    if file.endswith("yaml"):
        (tmp_path / file).write_text("model_kind: transcoder_set\nmodel_name: google/gemma-2-2b\n")
    else:
        save_file({"W_enc": torch.zeros(2, 2)}, tmp_path / file)
    for path in (tmp_path, tmp_path / file) if file != "config.yaml" else (tmp_path,):
        with pytest.raises(UserError, match=r"only autoencoders, which rebuild what they read"):
            load_sae(path)


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
        ({"architecture": "temporal"}, "unknown architecture .* 'temporal'"),
        ({"architecture": "skip_transcoder"}, "holds a transcoder"),
        ({"activation_fn": "tanh-relu"}, "activation_fn 'tanh-relu'"),
        ({"normalize_activations": "covariance_whitening"}, "unknown normalize_activations"),
        ({"d_in": 17}, "says d_in = 17"),
        ({"metadata": {"hook_head_index": 3}}, "single attention head"),
    ],
)
def test_saelens_files_that_cannot_be_read_rightly(entries, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_sae(copied("saelens/standard", tmp_path / "sae", **entries))


def test_heads_before_the_output_projection_are_no_site_of_ours(tmp_path):
    metadata = {"hook_name": "blocks.3.attn.hook_z", "model_name": "gpt2-small"}
    folder = copied("saelens/standard", tmp_path / "sae", metadata=metadata, reshape_activations="hook_z")
    assert load_sae(folder).config.site == ""
    assert load_sae(folder, site="attn_3").config.site == "attn_3"


def test_centred_activations_of_transformer_lens_are_warned_of(tmp_path, caplog):
    load_sae(RECORDED / "saelens/standard")
    assert not caplog.text
    metadata = {"hook_name": "blocks.3.hook_resid_post"}
    metadata |= {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    load_sae(copied("saelens/standard", tmp_path / "sae", metadata=metadata))
    assert "center_writing_weights" in caplog.text


# Traps of sparsify


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
    with pytest.raises(UserError, match=r"activation 'groupmax'"):
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

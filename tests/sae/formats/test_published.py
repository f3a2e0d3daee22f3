"""Released files whose owners are no package to record, against their forward pass as published."""

import json
import sys
import types
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.errors import UserError
from sae.evaluation.evaluate import evaluate_saes
from sae.features.contexts import top_contexts
from sae.formats import load_sae
from sae.formats.token_normalised import NormalisedAutoencoder
from sae.model.sites import Site
from tests.sae.evaluation.test_evaluate import random_sae

D, F, K, N = 16, 48, 5, 24


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
    path = "model.layers.0.self_attn.o_proj:input" if site == "attn_0" else None
    assert sae.config.extra.get("site_path") == path


def test_gemma_scope_takes_the_l0_closest_to_100(random, tmp_path):
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_5" / "width_16k"
    for l0 in (12, 82, 143, 309):
        gemma_scope(folder / f"average_l0_{l0}", random)
    assert load_sae(folder).config.extra["source"].endswith("average_l0_82")
    gemma_scope(tmp_path / "gemma-scope-2b-pt-res" / "layer_5" / "width_65k" / "average_l0_99", random)
    with pytest.raises(UserError, match=r"holds 5 autoencoders"):
        load_sae(tmp_path / "gemma-scope-2b-pt-res")


@pytest.mark.parametrize(
    ("release", "folder", "read", "affine"),
    [
        ("gemma-scope-2b-pt-transcoders", "layer_5/width_16k/average_l0_20", "mlp_norm", False),
        ("gemma-scope-2-1b-pt", "transcoder_all/layer_5_width_16k_l0_small", "mlp_in", False),
        ("gemma-scope-2-1b-pt", "transcoder_all/layer_5_width_16k_l0_small_affine", "mlp_in", True),
    ],
)
def test_gemma_scope_transcoders(release, folder, read, affine, random, tmp_path):
    path, second = tmp_path / release / folder, "scope-2-" in release
    b_enc, b_dec, threshold, W_enc, W_dec = gemma_scope(
        path, random, prefix="w_" if second else "W_", safetensors=second
    )
    skip = random(D, D) if affine else torch.zeros(D, D)
    if affine:
        save_file(
            load_file(path / "params.safetensors") | {"affine_skip_connection": skip}, path / "params.safetensors"
        )
    sae, x = load_sae(path), random(N, D)
    z = x @ W_enc + b_enc
    f = z.relu() * (z > threshold)
    assert (sae.config.site, sae.config.read) == ("mlp_5", read)
    assert torch.allclose(sae(x), f @ W_dec + b_dec + x @ skip, atol=1e-5)


@pytest.mark.parametrize(
    ("hooks", "site", "read"),
    [
        (("output", "output"), "resid_7", ""),
        (("self_attn.o_proj.input", "self_attn.o_proj.input"), "attn_7", ""),
        (("post_feedforward_layernorm.output",) * 2, "mlp_7", ""),
        (("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"), "mlp_7", "mlp_in"),
    ],
)
def test_gemma_scope_2_says_what_it_is_wherever_the_folder_is(hooks, site, read, random, tmp_path):
    """Even in a folder called by another kind."""
    path = tmp_path / "my transcoder" / "layer_1_width_16k"
    gemma_scope(path, random, prefix="w_", safetensors=True)
    hook_in, hook_out = (f"model.layers.7.{hook}" for hook in hooks)
    config = {"hf_hook_point_in": hook_in, "hf_hook_point_out": hook_out, "model_name": "google/gemma-3-1b-pt"}
    (path / "config.json").write_text(json.dumps(config | {"type": "transcoder" if read else "sae", "l0": 20.5}))
    sae = load_sae(path)
    assert (sae.config.site, sae.config.read, sae.config.model) == (site, read, "google/gemma-3-1b-pt")
    assert ("site_path" in sae.config.extra) == (site == "attn_7")
    for entries, message in (
        ({"type": "clt"}, "cross-layer transcoder"),
        ({"type": "crosscoder"}, "crosscoder"),
        ({"hf_hook_point_in": [hook_in, hook_in]}, "crosscoder"),
        ({"hf_hook_point_out": "model.norm.output"}, "no site here"),
        ({"hf_hook_point_in": "model.layers.3.input"}, "reads before the MLP"),
        ({"architecture": "topk"}, "allowed is jump_relu"),
    ):
        (path / "config.json").write_text(json.dumps(config | entries))
        with pytest.raises(UserError, match=message):
            load_sae(path)


# Llama Scope


@pytest.mark.parametrize("unit_norm", [True, False])
def test_llama_scope_topk_ranks_by_what_features_write_or_by_themselves(unit_norm, random, tmp_path):
    """Norms of inputs and outputs differ, so that each scale must be in its place."""
    folder = tmp_path / "Llama3_1-8B-Base-L15R-8x"
    (folder / "checkpoints").mkdir(parents=True)
    E, b, W_dec, b_dec = random(F, D), random(F), random(D, F) * random(F).exp(), random(D)
    state = {"encoder.weight": E, "encoder.bias": b, "decoder.weight": W_dec, "decoder.bias": b_dec}
    save_file(state, folder / "checkpoints" / "final.safetensors")
    config = {"act_fn": "topk", "top_k": K, "dataset_average_activation_norm": {"in": 6.25, "out": 2.5}}
    config |= {"hook_point_in": "blocks.15.hook_resid_post", "sparsity_include_decoder_norm": unit_norm}
    (folder / "hyperparams.json").write_text(json.dumps(config))
    sae, x, s_in, s_out = load_sae(folder), random(N, D) * 4, D**0.5 / 6.25, D**0.5 / 2.5
    z = (s_in * x) @ E.T + b
    rank = (z * W_dec.norm(dim=0) if unit_norm else z).topk(K, dim=1).indices
    f = torch.zeros_like(z).scatter(1, rank, z.gather(1, rank).relu())
    assert torch.allclose(sae(x), (f @ W_dec.T + b_dec) / s_out, atol=1e-3)
    assert torch.allclose(sae.encode(x), f * W_dec.norm(dim=0) / s_out, atol=1e-3)


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
    with pytest.raises(UserError, match=r"hook_point_in 'blocks.15.hook_resid_post': transcoders read before the MLP"):
        load_sae(folder)
    hooks = {"hook_point_in": "blocks.15.hook_resid_mid", "hook_point_out": "blocks.15.hook_mlp_out"}
    (folder / "hyperparams.json").write_text(json.dumps(config | hooks))
    transcoder = load_sae(folder)
    assert (transcoder.config.site, transcoder.config.read) == ("mlp_15", "mlp_resid")
    assert torch.allclose(transcoder(x), sae(x), atol=1e-5)
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


@pytest.mark.parametrize("location", ["resid_post_attn_v5_32k", "mlp_post_act"])
def test_openai_places_that_are_no_sites_cannot_be_called_one(location, random, tmp_path):
    path = tmp_path / location / "autoencoders" / "6.pt"
    openai(path, random, "ReLU")
    with pytest.raises(UserError, match=r"belongs to blocks\.6\..*, which is no site"):
        load_sae(path, site="resid_6")


def test_openai_nonlinearities_that_are_not_known_are_refused(random, tmp_path):
    path = tmp_path / "resid_delta_mlp" / "autoencoders" / "6.pt"
    state = openai(path, random, "TopK")
    torch.save(state | {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "Identity"}}, path)
    with pytest.raises(UserError, match=r"postact_fn 'Identity'"):
        load_sae(path)


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
    result = evaluate_saes(tiny_model, {site: sae}, texts, special_tokens=True).sites["resid_0"]
    x = torch.cat([tiny_model.run(tiny_model.tokenize([text]), capture=[site]).activations[site][0] for text in texts])
    error = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert result.explained_variance == pytest.approx(1.0 - float(error), rel=1e-4)
    summaries = top_contexts(tiny_model, {site: sae}, texts, {site: [0, 24, 25]}, special_tokens=True)
    assert summaries[site, 24].density == 1.0  # what b_dec writes
    assert summaries[site, 0].density == pytest.approx(float((sae.encode(x)[:, 0] != 0).float().mean()))


# circuit-tracer


@pytest.mark.parametrize("file", ["config.yaml", "W_enc_0.safetensors"])
def test_cross_layer_transcoders_are_refused_with_a_sentence(file, tmp_path):
    if file.endswith("yaml"):
        (tmp_path / file).write_text("model_kind: cross_layer_transcoder\nmodel_name: google/gemma-2-2b\n")
    else:
        save_file({"W_enc": torch.zeros(2, 2)}, tmp_path / file)
    for path in (tmp_path, tmp_path / file) if file != "config.yaml" else (tmp_path,):
        with pytest.raises(UserError, match=r"only dictionaries that write at one site"):
            load_sae(path)


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk", "k in the config"])
@pytest.mark.parametrize(
    ("hook", "read"), [("ln2.hook_normalized", "mlp_norm"), ("hook_resid_mid", "mlp_resid"), ("", "mlp_in")]
)
def test_circuit_tracer(kind, hook, read, random, tmp_path):
    """Its formula: act(x W_encᵀ + b_enc) W_dec + b_dec + x W_skipᵀ."""
    state = {
        "W_enc": random(F, D),
        "W_dec": random(F, D),
        "b_enc": random(F),
        "b_dec": random(D),
        "W_skip": random(D, D),
    }
    extra = {"jumprelu": {"activation_function.threshold": random(F).abs()}, "topk": {"k": torch.tensor(K)}}.get(
        kind, {}
    )
    save_file(state | extra, tmp_path / "layer_3.safetensors")
    config = [f"feature_input_hook: {hook}"] if hook else []
    config += [f"activation: topk\nk: {K}"] if kind == "k in the config" else []
    (tmp_path / "config.yaml").write_text("\n".join(["model_kind: transcoder_set", *config]))
    for path in (tmp_path / "layer_3.safetensors", tmp_path):
        sae = load_sae(path)
        assert (sae.config.site, sae.config.read) == ("mlp_3", read)
    x = random(N, D)
    z = x @ state["W_enc"].T + state["b_enc"]
    f = z.relu()
    if kind == "jumprelu":
        f = z * (z > extra["activation_function.threshold"])
    elif kind != "relu":
        f = torch.zeros_like(z).scatter(1, (top := z.relu().topk(K)).indices, top.values)
    assert torch.allclose(sae(x), f @ state["W_dec"] + state["b_dec"] + x @ state["W_skip"].T, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("feature_input_hook: attn.hook_q", "transcoders read before the MLP here"),
        ("feature_output_hook: hook_attn_out", "transcoders write at hook_mlp_out"),
        ("activation: topk", "neither it nor config.yaml has k"),
        ("activation: gelu", "unknown activation"),
        ("k: [", "not YAML"),
        ("[" * 5000, "not YAML"),
        ("k: " + "9" * 5000, "not YAML"),
        ("a: &a [1]\nb: *a", "by aliases"),
        ("- k", "config.yaml"),
    ],
)
def test_sets_of_circuit_tracer_that_cannot_be_read(config, message, random, tmp_path):
    state = {"W_enc": random(F, D), "W_dec": random(F, D), "b_enc": random(F), "b_dec": random(D)}
    save_file(state, tmp_path / "layer_0.safetensors")
    (tmp_path / "config.yaml").write_text(config)
    with pytest.raises(UserError, match=message):
        load_sae(tmp_path)


# Qwen Scope


def test_qwen_scope(random, tmp_path):
    folder = tmp_path / f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}"
    folder.mkdir()
    state = {"W_enc": random(F, D), "W_dec": random(D, F), "b_enc": random(F), "b_dec": random(D)}
    torch.save(state, folder / "layer3.sae.pt")
    sae, x = load_sae(folder / "layer3.sae.pt"), random(N, D)
    z = (x @ state["W_enc"].T + state["b_enc"]).relu()
    f = torch.zeros_like(z).scatter(1, (top := z.topk(K)).indices, top.values)
    assert torch.allclose(sae(x), f @ state["W_dec"].T + state["b_dec"], atol=1e-5)
    assert (sae.config.site, sae.config.model, sae.config.k) == ("resid_3", "Qwen/Qwen3-1.7B-Base", K)
    moved = folder.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"nothing says how many features"):
        load_sae(moved)
    (moved / "config.json").write_text(json.dumps({"k": K, "base_model": "Qwen/Qwen3-1.7B-Base", "d_model": D}))
    assert load_sae(moved).config.k == K
    torch.save(state | {"config": Fraction(1, 2)}, moved / "layer3.sae.pt")
    with pytest.raises(UserError, match=r"Python objects beside tensors"):
        load_sae(moved)


# Dunefsky, Chlenski, Nanda


def test_transcoders_of_gpt2(random, tmp_path, monkeypatch):
    """Their config is an object of a class that is not there when the file is read."""
    module = types.ModuleType("sae_training.config")
    exec("class LanguageModelSAERunnerConfig: pass", module.__dict__)
    module.LanguageModelSAERunnerConfig.__module__ = "sae_training.config"
    monkeypatch.setitem(sys.modules, "sae_training", types.ModuleType("sae_training"))
    monkeypatch.setitem(sys.modules, "sae_training.config", module)
    config = module.LanguageModelSAERunnerConfig()
    config.dtype, config.device, config.d_in = torch.float32, torch.device("cpu"), D
    state = {
        "W_enc": random(D, F),
        "b_enc": random(F),
        "W_dec": random(F, D),
        "b_dec": random(D),
        "b_dec_out": random(D),
    }
    path = tmp_path / f"final_sparse_autoencoder_gpt2-small_blocks.8.ln2.hook_normalized_{F}.pt"
    torch.save({"cfg": config, "state_dict": state}, path)
    monkeypatch.delitem(sys.modules, "sae_training.config")
    sae, x = load_sae(tmp_path), random(N, D)
    f = ((x - state["b_dec"]) @ state["W_enc"] + state["b_enc"]).relu()
    assert torch.allclose(sae(x), f @ state["W_dec"] + state["b_dec_out"], atol=1e-5)
    assert (sae.config.site, sae.config.read, sae.config.model) == ("mlp_8", "mlp_norm", "gpt2")

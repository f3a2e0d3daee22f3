"""Transcoders: what they compute, where they read, splicing and evaluation where they write, wrong read places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sae.autoencoder import SAEConfig, SparseAutoencoder
from sae.errors import UserError
from sae.evaluation.evaluate import evaluate_saes
from sae.formats import load_sae, save_sae
from sae.model.language_model import LanguageModel
from sae.model.sites import READ_KINDS, Site
from sae.saes import SAEs, load_saes
from sae.splice import check_saes, edits_of, identity_splice, reconstruct, replace_with_reconstruction
from tests.sae.test_splice import random_sae

TEXTS = ["the man near the old dogs runs", "she sees"]
MLP_0, MLP_1 = Site("mlp", 0), Site("mlp", 1)


def transcoder(
    read: str = "mlp_in",
    *,
    architecture: str = "relu",
    skip: bool = True,
    site: Site = MLP_1,
    r: int = 32,
    seed: int = 0,
) -> SparseAutoencoder:
    """A random one of 24 features and width 32."""
    torch.manual_seed(seed)
    tensors = {
        "W_enc": torch.randn(24, r) / r**0.5, "b_enc": 0.1 * torch.randn(24),
        "W_dec": torch.nn.functional.normalize(torch.randn(24, 32), dim=-1), "b_dec": 0.1 * torch.randn(32),
    }  # fmt: skip
    tensors |= {"threshold": torch.full((24,), 0.3)} if architecture == "jumprelu" else {}
    tensors |= {"W_skip": 0.1 * torch.randn(32, r)} if skip else {}
    k, d_read = 5 if architecture == "topk" else None, None if r == 32 else r
    config = SAEConfig(architecture, 32, 24, str(site), subtract_b_dec=False, read=read, d_read=d_read, k=k)  # type: ignore[arg-type]
    return SparseAutoencoder(config, tensors)


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("skip", [False, True])
def test_forward_is_the_owners_formula(architecture: str, skip: bool, tmp_path: Path) -> None:
    """circuit-tracer's and SAELens': f = act(x W_encT + b_enc), y = f W_dec + b_dec (+ x W_skipT)."""
    sae = transcoder(architecture=architecture, skip=skip, r=40)
    x, t = torch.randn(50, 40), dict(sae.named_buffers())
    z = x @ t["W_enc"].T + t["b_enc"]
    if architecture == "topk":
        kept = z.topk(5).indices
        f = torch.zeros_like(z).scatter(1, kept, z.gather(1, kept)).relu()
    else:
        f = z.relu() * (z > t["threshold"]) if architecture == "jumprelu" else z.relu()
    y = f @ t["W_dec"] + t["b_dec"] + (x @ t["W_skip"].T if skip else 0)
    torch.testing.assert_close(sae(x), y)
    torch.testing.assert_close(reconstruct(sae, x), y)
    some, x_hat = sae.encode_and_reconstruct(x, torch.tensor([3, 1]))
    torch.testing.assert_close((some, x_hat), (f[:, [3, 1]], y))
    sae.save(tmp_path)
    again = load_saes(tmp_path)[MLP_1]
    assert again.config == sae.config and torch.equal(again(x), sae(x))
    assert load_saes(tmp_path, read="mlp_norm").config(MLP_1).read == "mlp_norm"


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2"])
def test_read_places_are_those_of_the_model(family: str, make_tiny_model: Callable[..., LanguageModel]) -> None:
    """By hooks on the modules of three families: a norm in front, parallel blocks, a norm behind as well."""
    model = make_tiny_model(family)
    block = {"gpt2": "transformer.h.1", "gpt_neox": "gpt_neox.layers.1", "gemma2": "model.layers.1"}[family]
    norm = {"gpt2": "ln_2", "gpt_neox": "post_attention_layernorm", "gemma2": "pre_feedforward_layernorm"}[family]
    seen: dict[str, torch.Tensor] = {}
    parts = {name: model.hf.get_submodule(f"{block}.{name}") for name in (norm, "mlp")}
    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: args[0], f"{name} out": out}))
        for name, module in parts.items()
    ]
    places = {kind: Site(kind, 1) for kind in READ_KINDS}
    run = model.run(model.tokenize(TEXTS), capture=[MLP_1, *places.values()], edits={places["mlp_in"]: lambda x: x})
    for hook in hooks:
        hook.remove()
    x = {kind: run.activations[place] for kind, place in places.items()}
    assert torch.equal(x["mlp_resid"], seen[norm]) and torch.equal(x["mlp_in"], seen["mlp"])
    weight, bias = parts[norm].weight, getattr(parts[norm], "bias", None)
    gained = x["mlp_norm"] * (1 + weight) if family == "gemma2" else x["mlp_norm"] * weight + bias
    torch.testing.assert_close(gained, x["mlp_in"], atol=1e-5, rtol=1e-4)
    assert list(run.activations) == [Site(kind, 1) for kind in READ_KINDS] + [MLP_1]  # as the pass comes to them


def test_splicing_and_evaluation_are_at_the_write_place(tiny_model: LanguageModel) -> None:
    saes = SAEs({MLP_0: transcoder("mlp_norm", site=MLP_0), MLP_1: transcoder(architecture="topk"),
                 Site("resid", 0): random_sae(tiny_model, Site("resid", 0))})  # fmt: skip
    check_saes(tiny_model, saes)
    tokens = tiny_model.tokenize(TEXTS)
    run = tiny_model.run(tokens, capture=[MLP_0, Site("mlp_norm", 0)])
    edits = edits_of(saes, {MLP_0: replace_with_reconstruction(saes[MLP_0])})
    spliced = tiny_model.run(tokens, capture=[MLP_0], edits=edits)
    torch.testing.assert_close(spliced.activations[MLP_0], saes[MLP_0](run.activations[Site("mlp_norm", 0)]))
    same = tiny_model.run(tokens, edits=edits_of(saes, {site: identity_splice(sae) for site, sae in saes.items()}))
    torch.testing.assert_close(same.logits, run.logits)
    measured = evaluate_saes(tiny_model, saes, TEXTS)
    counted = tokens.attention_mask.bool() & (tokens.input_ids != tiny_model.tokenizer.bos_token_id)
    x, x_hat = run.activations[MLP_0][counted], saes[MLP_0](run.activations[Site("mlp_norm", 0)][counted])
    expected = 1 - (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    assert measured.sites["mlp_0"].explained_variance == pytest.approx(float(expected), rel=1e-4)
    assert measured.ce_errors_kept == pytest.approx(measured.ce_model, rel=1e-5)


def linear_mlp(model: LanguageModel, *, read: str) -> SparseAutoencoder:
    """A transcoder made elsewhere whose skip connection is the best linear map from mlp_norm to the MLP, said to read
    at `read`.
    """
    run = model.run(model.probe_tokens(), capture=[MLP_0, Site("mlp_norm", 0)])
    x, y = (run.activations[place].flatten(0, 1) for place in (Site("mlp_norm", 0), MLP_0))
    sae = transcoder("mlp_norm", site=MLP_0)
    tensors = {name: torch.zeros_like(t) for name, t in sae.named_buffers()}
    tensors["W_skip"] = torch.linalg.lstsq(x, y - y.mean(0)).solution.T
    tensors["b_dec"] = y.mean(0)
    config = replace(sae.config, read=read, extra={"format": "circuit-tracer"})  # type: ignore[arg-type]
    return SparseAutoencoder(config, tensors)


def test_a_wrong_read_place_is_noticed(tiny_model: LanguageModel, caplog: pytest.LogCaptureFixture) -> None:
    check_saes(tiny_model, {MLP_0: linear_mlp(tiny_model, read="mlp_norm")})
    assert "explained variance of transcoders made elsewhere: mlp_0" in caplog.text
    tiny_model.hf.gpt_neox.layers[0].post_attention_layernorm.weight.data.mul_(-1)  # now the two norms differ
    try:
        with pytest.raises(UserError, match=r"explains nothing .* reading mlp_in; tried as well: .*mlp_norm"):
            check_saes(tiny_model, {MLP_0: linear_mlp(tiny_model, read="mlp_in")})
    finally:
        tiny_model.hf.gpt_neox.layers[0].post_attention_layernorm.weight.data.mul_(-1)


def test_what_is_no_transcoder_of_the_model_is_one_sentence(tiny_model: LanguageModel) -> None:
    with pytest.raises(UserError, match="reads width 40 at mlp_in: allowed is 32"):
        check_saes(tiny_model, {MLP_1: transcoder(r=40)})
    with pytest.raises(UserError, match="transcoders of mlp sites alone"):
        transcoder(site=Site("resid", 0))
    with pytest.raises(UserError, match="nothing can be read at 'mlp_in'"):
        tiny_model.run(tiny_model.probe_tokens(), capture=[Site("mlp_in", 7)])


@pytest.mark.parametrize("read", ["mlp_norm", "mlp_resid"])
@pytest.mark.parametrize(("architecture", "skip"), [("relu", False), ("jumprelu", True), ("topk", True)])
def test_transcoders_are_written_for_other_projects(architecture: str, skip: bool, read: str, tmp_path: Path) -> None:
    """What is written is read back with the same outputs, site and read place; SAELens has no TopK transcoder."""
    sae = transcoder(read, architecture=architecture, skip=skip)
    for file_format in ("circuit_tracer", "saelens") if architecture != "topk" else ("circuit_tracer",):
        save_sae(sae, tmp_path / file_format, file_format=file_format)  # type: ignore[arg-type]
        layer = tmp_path / file_format / "layer_1.safetensors"
        again = load_sae(layer if layer.is_file() else tmp_path / file_format)
        assert (again.config.site, again.config.read, again.has_skip) == ("mlp_1", read, skip)
        x = torch.randn(20, 32)
        torch.testing.assert_close(again(x), sae(x))
    with pytest.raises(UserError, match=r"reads mlp_hidden, for which \w+ has no name"):
        save_sae(transcoder("mlp_hidden"), tmp_path / "no", file_format="saelens")
    with pytest.raises(UserError, match=r"dictionary_learning has no class for a '\w+' transcoder"):
        save_sae(sae, tmp_path / "no", file_format="dictionary_learning")

"""Autoencoders in a running model: what splicing does, and that what does not belong is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from sae.autoencoder import SAEConfig, SparseAutoencoder
from sae.errors import UserError
from sae.evaluation.evaluate import evaluate_saes
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.splice import check_saes, ensure_checked, identity_splice, replace_with_reconstruction

TEXTS = ["the man near the old dogs runs", "she sees", "they"]
RESID_1 = Site("resid", 1)


def random_sae(model: LanguageModel, site: Site, *, width: int | None = None, scale: float = 1.0) -> SparseAutoencoder:
    width = width or model.widths[site]
    rows = torch.nn.functional.normalize(torch.randn(64, width), dim=-1)
    config = SAEConfig("relu", width, 64, site=site.name, model=model.name, model_fingerprint=model.fingerprint)
    tensors = {"W_enc": scale * rows, "b_enc": torch.zeros(64), "W_dec": rows, "b_dec": torch.randn(width)}
    return SparseAutoencoder(config, tensors)


def test_random_autoencoders_at_all_sites_pass(make_tiny_model: Callable[..., LanguageModel]) -> None:
    for architecture in ("gpt2", "gemma2"):
        model = make_tiny_model(architecture)
        saes = {site: random_sae(model, site) for site in model.sites}
        check_saes(model, saes)
        check_saes(model, saes, model.tokenize(TEXTS))


def test_identity_keeps_the_logits_and_reconstruction_does_not(tiny_model: LanguageModel) -> None:
    tokens, sae = tiny_model.tokenize(TEXTS), random_sae(tiny_model, RESID_1)
    plain = tiny_model.run(tokens, capture=[RESID_1])
    same = tiny_model.run(tokens, edits={RESID_1: identity_splice(sae)}).logits
    assert (same - plain.logits).abs().max() <= 1e-5 * plain.logits.abs().max()
    run = tiny_model.run(tokens, edits={RESID_1: replace_with_reconstruction(sae)}, capture=[RESID_1])
    assert torch.equal(run.activations[RESID_1], sae(plain.activations[RESID_1]))
    assert not torch.allclose(run.logits, plain.logits, atol=1e-2)


def test_what_was_made_for_something_else_is_refused(tiny_model: LanguageModel) -> None:
    sae = random_sae(tiny_model, RESID_1)
    with pytest.raises(UserError, match=r"unknown site 'resid_5'.*did you mean 'resid_"):
        check_saes(tiny_model, {Site("resid", 5): sae})
    with pytest.raises(UserError, match="given for site 'mlp_1' was made for site 'resid_1'"):
        check_saes(tiny_model, {Site("mlp", 1): sae})
    with pytest.raises(UserError, match="site 'resid_1' has width 24: allowed is 32"):
        check_saes(tiny_model, {RESID_1: random_sae(tiny_model, RESID_1, width=24)})
    sae.config = replace(sae.config, model_fingerprint="0123", model="other/model")
    with pytest.raises(UserError, match="site 'resid_1' was made for another model: its model is 'other/model'"):
        check_saes(tiny_model, {RESID_1: sae})
    sae.config = replace(sae.config, model_fingerprint="")
    check_saes(tiny_model, {RESID_1: sae})
    with pytest.raises(UserError, match="no autoencoders"):
        check_saes(tiny_model, {})


def test_the_same_site_at_another_place_is_refused(make_tiny_model: Callable[..., LanguageModel]) -> None:
    """The width may be the same, and putting x back changes nothing: only the path tells."""
    usual = make_tiny_model("llama")
    site, path = Site("attn", 1), "model.layers.1.self_attn.o_proj:input"
    moved = LanguageModel(usual.hf, usual.tokenizer, name="moved", site_paths={"attn_1": path})
    assert (usual.moved_sites, moved.moved_sites) == ({}, {site: path})
    sae = random_sae(usual, site)
    for model in (usual, moved):
        check_saes(model, {site: sae})  # nothing is known of where it was made
    sae.config = replace(sae.config, extra={"site_path": path})
    check_saes(moved, {site: sae})
    with pytest.raises(UserError, match=r"reads model.layers.1.self_attn.o_proj:input, .* with attn_1=model"):
        check_saes(usual, {site: sae})
    sae.config = replace(sae.config, extra={"site_path": ""})
    check_saes(usual, {site: sae})
    with pytest.raises(UserError, match=r"loaded with at model.layers.1.self_attn.o_proj:input: leave its site path"):
        check_saes(moved, {site: sae})


@pytest.mark.parametrize("scale", [3e3, 1e6, float("nan")])
def test_a_reconstruction_of_the_wrong_size_is_refused_and_named(tiny_model: LanguageModel, scale: float) -> None:
    saes = {site: random_sae(tiny_model, site) for site in tiny_model.sites}
    saes[RESID_1] = random_sae(tiny_model, RESID_1, scale=scale)
    reason = "does not belong there" if scale == scale else "holds numbers that are not finite in W_enc"
    with pytest.raises(UserError, match=f"autoencoder of site 'resid_1' {reason}"):
        check_saes(tiny_model, saes)


def test_a_useless_reconstruction_is_logged(tiny_model: LanguageModel, caplog: pytest.LogCaptureFixture) -> None:
    tokens = tiny_model.tokenize(TEXTS)
    with caplog.at_level(logging.WARNING, logger="sae.splice"):
        check_saes(tiny_model, {RESID_1: zeroed(random_sae(tiny_model, RESID_1))}, tokens)
        assert not caplog.text  # as far as zero is
        check_saes(tiny_model, {RESID_1: random_sae(tiny_model, RESID_1, scale=3.0)}, tokens)
    assert "site resid_1: the reconstruction is further from x than zero" in caplog.text


def test_files_that_name_another_model_are_warned_of(tiny_model, caplog: pytest.LogCaptureFixture) -> None:
    sae = random_sae(tiny_model, RESID_1)
    for name, warned in ((tiny_model.name, False), ("owner/" + tiny_model.name, False), ("gpt2-small", True)):
        sae.config = replace(sae.config, model=name, model_fingerprint="")
        with caplog.at_level(logging.WARNING, logger="sae.splice"):
            check_saes(tiny_model, {RESID_1: sae})
        assert ("site resid_1: the files of its autoencoder name the model gpt2-small" in caplog.text) == warned


def test_an_autoencoder_is_checked_once_with_a_model(tiny_model, make_tiny_model, monkeypatch) -> None:
    saes = {RESID_1: random_sae(tiny_model, RESID_1)}
    passes, run = [], LanguageModel.run
    monkeypatch.setattr(LanguageModel, "run", lambda *a, **options: passes.append(1) or run(*a, **options))
    for expected in (2, 2):  # the plain pass and the spliced one
        ensure_checked(tiny_model, saes, saes)
        assert len(passes) == expected
    with pytest.raises(UserError, match=r"was made for another model"):
        ensure_checked(make_tiny_model("gpt_neox", width=16), saes, saes)


def test_an_autoencoder_that_does_not_fit_is_refused_every_time(tiny_model) -> None:
    sae = random_sae(tiny_model, RESID_1)
    sae.b_dec[0] = torch.nan
    for _ in range(2):
        with pytest.raises(UserError, match="not finite in b_dec"):
            ensure_checked(tiny_model, {RESID_1: sae})


@pytest.mark.parametrize(("architecture", "fits"), [("gpt2", False), ("llama", True), ("gemma2", True)])
def test_hook_embed_is_embed_where_positions_are_not_added(make_tiny_model, architecture, fits) -> None:
    model, embed = make_tiny_model(architecture), Site("embed")
    sae = random_sae(model, embed)
    sae.config = replace(sae.config, extra={"hook": "hook_embed"})
    with nullcontext() if fits else pytest.raises(UserError, match=r"take one of blocks.0.hook_resid_pre"):
        check_saes(model, {embed: sae})


def zeroed(sae: SparseAutoencoder) -> SparseAutoencoder:
    sae.b_dec.zero_()
    sae.b_enc.fill_(-1e9)
    return sae


def test_a_model_of_16_bits_is_checked_less_strictly(make_tiny_model: Callable[..., LanguageModel]) -> None:
    model = make_tiny_model("gpt_neox", dtype="bfloat16", check=False)
    check_saes(model, {site: random_sae(model, site) for site in model.sites})


def test_autoencoders_are_checked_once(tiny_model, monkeypatch):
    """What was checked with a model is not run, nor warned of, again by what uses it next."""
    saes = {RESID_1: random_sae(tiny_model, RESID_1)}
    check_saes(tiny_model, saes)
    monkeypatch.setattr("sae.splice._check_configs", lambda *args: pytest.fail("checked again"))
    evaluate_saes(tiny_model, saes, TEXTS, max_tokens=20, errors=False)

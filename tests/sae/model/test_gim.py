"""The rules of GIM: values stay, the plain gradient is a special case, and the softmax rule agrees with hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from sae.errors import UserError
from sae.model.gim import PLAIN, GimRules, check_covered, gim_rules, softmax_gradient, written_out_attention
from sae.model.language_model import LanguageModel
from sae.model.load import load_model
from sae.model.sites import Site
from tests.conftest import word_tokenizer
from tests.near import assert_near
from tests.sae.model.test_lrp import TEXTS, readout
from tests.tiny_models import tiny_model


def gradients(model, tokens, rules=None):
    """Logits, and the gradient of a readout at every site, under some rules or none."""
    if rules is None:
        run = model.run(tokens, capture=model.sites, grad=True)
    else:
        with gim_rules(model.hf, rules) as unseen:
            run = model.run(tokens, capture=model.sites, grad=True)
        assert not unseen
    return run.logits, torch.autograd.grad(readout(model, run.logits).sum(), list(run.activations.values()))


def check_rules(model, tokens) -> None:
    """Unchanged logits, nothing left behind, and the plain gradient as a special case."""
    plain_logits, plain = gradients(model, tokens)
    logits, changed = gradients(model, tokens, GimRules())
    same_logits, same = gradients(model, tokens, PLAIN)
    assert torch.equal(logits, plain_logits) and torch.equal(same_logits, plain_logits)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())
    scale = max(g.abs().max() for g in plain)
    for site, found, expected in zip(model.sites, same, plain, strict=True):
        assert_near(found / scale, expected / scale, msg=site)
    assert not torch.allclose(changed[0], plain[0], rtol=0.05)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "qwen3", "gemma2"])
def test_nothing_but_gradients_changes(architecture, make_tiny_model):
    check_rules(make_tiny_model(architecture), make_tiny_model(architecture).tokenize(TEXTS))


def load(family: str) -> LanguageModel:
    return load_model(tiny_model(family), tokenizer=word_tokenizer(), device="cpu", check=False)


FAMILIES = ("phi3", "falcon", "bloom", "mpt", "codegen", "gpt_bigcode", "deepseek_v3", "qwen3_moe", "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_of_queries_keys_and_values(family):
    """Behind one layer of attention the paths by queries and keys, and those by values, add up, each by its factor."""
    model = load(family)
    check_covered(model)
    tokens = model.tokenize(TEXTS)
    check_rules(model, tokens)
    site = model.sites.index(Site("resid", 0))
    neither, by_values, by_scores, both, plain = (
        gradients(model, tokens, replace(PLAIN, query_key=query_key, value=value))[1][site]
        for query_key, value in ((0.0, 0.0), (0.0, 0.5), (0.25, 0.0), (0.25, 0.5), (1.0, 1.0))
    )
    of_values, of_scores = by_values - neither, by_scores - neither
    assert of_values.abs().max() > 0 and of_scores.abs().max() > 0
    assert_near(of_values + of_scores, both - neither)
    assert_near(2 * of_values + 4 * of_scores, plain - neither)


def test_attention_without_a_fused_kernel(make_tiny_model):
    """The rules give the same gradients whether attention is one kernel or written out by the model."""
    fused, eager = make_tiny_model("llama"), make_tiny_model("llama")
    eager.hf.set_attn_implementation("eager")
    tokens = fused.tokenize(TEXTS)
    for one, other in zip(*(gradients(model, tokens, GimRules())[1] for model in (fused, eager)), strict=True):
        assert_near(one, other)


def test_models_without_attention_are_refused():
    model = load("mamba")
    with pytest.raises(UserError, match=r"gim does not know the attention modules of Mamba.*use ig or attrib"):
        check_covered(model)


def test_softmax_rule_by_hand():
    """Three scores 0, 2 ln 2 and 2 ln 4: at temperature 2 their exponentials are 1, 2 and 4."""
    scores = torch.tensor([0.0, 2 * math.log(2), 2 * math.log(4)])
    p, g = [1 / 7, 2 / 7, 4 / 7], [1.0, 0.0, -1.0]
    mean = (1 - 4) / 7
    expected = torch.tensor([share * (value - mean) for share, value in zip(p, g, strict=True)])
    assert_near(softmax_gradient(scores, torch.tensor(g), -1, 2.0), expected)
    tempered = torch.autograd.functional.jacobian(lambda s: torch.softmax(s / 2, -1), scores) @ torch.tensor(g)
    assert_near(softmax_gradient(scores, torch.tensor(g), -1, 2.0), 2 * tempered)  # without the factor 1 / T


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
def test_fused_attention_written_out(mask):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, 2, 2))
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()
    options = {"enable_gqa": True, "scale": 0.3} | {
        "none": {}, "causal": {"is_causal": True}, "bool": {"attn_mask": allowed},
        "float": {"attn_mask": torch.zeros(5, 5).masked_fill(~allowed, -1e9)},
    }[mask]  # fmt: skip
    expected = functional.scaled_dot_product_attention(q, k, v, **options)
    assert_near(written_out_attention(q, k, v, temperature=2.0, **options), expected)

"""The relevance rules: values stay, relevance is conserved, and a small MLP agrees with propagation written by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridRMSNormGated

from sae.errors import UserError
from sae.model.language_model import LanguageModel
from sae.model.load import load_model
from sae.model.lrp import norm_rule, relevance_rules
from sae.model.sites import Site
from tests.conftest import MODEL_FAMILIES, tiny_hf, word_tokenizer

TEXTS = ["the man near the old dogs runs", "she sees", "a boy who likes cats sings ."]
MODELS: dict[str, LanguageModel] = {}


@pytest.fixture(params=[*MODEL_FAMILIES, "qwen2"])
def model(request, make_tiny_model) -> LanguageModel:
    if request.param not in MODELS:
        MODELS[request.param] = make_tiny_model(request.param) if request.param != "qwen2" else qwen2()
    return MODELS[request.param]


def qwen2() -> LanguageModel:
    """Biases at queries, keys and values."""
    sizes = {"vocab_size": 70, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **sizes, **heads, initializer_range=0.1))
    for parameter in hf.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return load_model(hf.eval(), tokenizer=word_tokenizer(), device="cpu")


def readout(model: LanguageModel, logits: torch.Tensor) -> torch.Tensor:
    """A fixed mix of the last position's logits, before a soft cap where the model has one. [B]"""
    cap = getattr(model.hf.config, "final_logit_softcapping", None)
    logits = logits[:, -1].double()
    logits = cap * torch.atanh(logits / cap) if cap else logits
    return logits @ torch.linspace(-1, 1, logits.shape[-1], dtype=torch.double).sin()


def test_nothing_but_gradients_changes_and_nothing_stays(model):
    tokens = model.tokenize(TEXTS)
    plain = model.run(tokens, capture=model.sites, grad=True)
    before = torch.autograd.grad(readout(model, plain.logits).sum(), list(plain.activations.values()))
    with relevance_rules(model.hf):
        inside = model.run(tokens, capture=model.sites, grad=True)
        no_grad = model.run(tokens)
    relevance = torch.autograd.grad(readout(model, inside.logits).sum(), list(inside.activations.values()))
    assert torch.equal(inside.logits, plain.logits)
    assert torch.equal(no_grad.logits, plain.logits)
    assert not torch.allclose(relevance[0], before[0], rtol=0.05)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())
    after = model.run(tokens, capture=model.sites, grad=True)
    again = torch.autograd.grad(readout(model, after.logits).sum(), list(after.activations.values()))
    assert all(torch.equal(x, y) for x, y in zip(before, again, strict=True))


def test_hooks_are_removed_after_an_error(tiny_model):
    with pytest.raises(KeyError), relevance_rules(tiny_model.hf):
        raise KeyError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_model.hf.modules())


def test_relevance_of_inputs_and_biases_is_the_readout(model):
    """Every step being linear in its inputs and biases, input x gradient adds up to the value, at every depth."""
    tokens = model.tokenize(TEXTS)
    biases = [parameter for name, parameter in model.hf.named_parameters() if name.endswith("bias")]
    stream = [Site("embed"), *(Site("resid", layer) for layer in range(model.n_layers))]
    try:
        for bias in biases:
            bias.requires_grad_(True)
        with relevance_rules(model.hf):
            run = model.run(tokens, capture=stream, grad=True)
        value = readout(model, run.logits).sum()
        inputs = [run.activations[site] for site in stream]
        found = torch.autograd.grad(value, [*inputs, *biases], retain_graph=True, materialize_grads=True)
    finally:
        model.hf.requires_grad_(False)
    of_biases = sum((b * g).double().sum() for b, g in zip(biases, found[len(stream) :], strict=True))
    assert torch.allclose((inputs[0] * found[0]).double().sum() + of_biases, value, rtol=1e-4)
    if not biases:
        for x, g in zip(inputs, found, strict=False):
            assert torch.allclose((x * g).double().sum(), value, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama", "gemma2"])
def test_mlp_agrees_with_propagation_by_hand(architecture, make_tiny_model):
    """Relevance of the MLP's input for one output direction, from its weights and values alone."""
    hf = make_tiny_model(architecture).hf
    block = {"gpt2": "transformer.h.0", "gpt_neox": "gpt_neox.layers.0"}.get(architecture, "model.layers.0")
    mlp = hf.get_submodule(f"{block}.mlp")
    x = torch.randn(5, 32, requires_grad=True)
    direction = torch.randn(32)
    with relevance_rules(hf):
        (found,) = torch.autograd.grad((mlp(x) @ direction).sum(), x)
    with torch.no_grad():
        if architecture in ("llama", "gemma2"):
            z, u = mlp.gate_proj(x), mlp.up_proj(x)
            g = direction @ mlp.down_proj.weight
            half = 0.5 * g * mlp.act_fn(z)
            expected = (half / z * u) @ mlp.gate_proj.weight + half @ mlp.up_proj.weight
        else:
            first, second = (mlp.c_fc, mlp.c_proj) if architecture == "gpt2" else (mlp.dense_h_to_4h, mlp.dense_4h_to_h)
            W_in, W_out = (m.weight.T if architecture == "gpt2" else m.weight for m in (first, second))
            z = first(x)
            expected = (direction @ W_out * mlp.act(z) / z) @ W_in
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2", "gemma3_text"])
def test_norms_are_linear_with_their_scale_fixed(architecture, make_tiny_model):
    """The Jacobian is diag(gain / scale), after centring for LayerNorm, with the gain read off the weights."""
    hf = make_tiny_model(architecture).hf
    norm = hf.get_submodule("transformer.h.0.ln_1" if architecture == "gpt2" else "model.layers.0.input_layernorm")
    x = 3 * torch.randn(32) + 1
    with relevance_rules(hf):
        found = torch.autograd.functional.jacobian(norm, x)
    gain = norm.weight + 1 if "Gemma" in type(norm).__name__ else norm.weight
    if architecture == "gpt2":
        centre = torch.eye(32) - torch.full((32, 32), 1 / 32)
        expected = torch.diag(gain / x.std(correction=0)) @ centre
    else:
        expected = torch.diag(gain / x.square().mean().sqrt())
    assert torch.allclose(found, expected, atol=1e-4)


def test_half_precision(make_tiny_model):
    model = make_tiny_model("gemma2", dtype="bfloat16")
    tokens = model.tokenize(TEXTS)
    with relevance_rules(model.hf):
        run = model.run(tokens, capture=model.sites, grad=True)
    assert torch.equal(run.logits, model.run(tokens).logits)
    for g in torch.autograd.grad(run.logits[:, -1, 5].sum(), list(run.activations.values())):
        assert g.dtype == torch.bfloat16 and torch.isfinite(g).all() and g.abs().sum() > 0


def test_attention_passes_relevance_through_values_alone(make_tiny_model):
    hf = make_tiny_model("gpt_neox").hf
    attention = hf.gpt_neox.layers[0].attention
    x = torch.randn(1, 4, 32, requires_grad=True)
    angles = hf.gpt_neox.rotary_emb(x, torch.arange(4)[None])
    with relevance_rules(hf):
        out, _ = attention(x, attention_mask=None, position_embeddings=angles)
        (found,) = torch.autograd.grad(out.sum(), x)
    with torch.no_grad():
        q, k, _ = attention.query_key_value(x).unflatten(-1, (4, 24)).transpose(1, 2).chunk(3, -1)
        q, k = apply_rotary_pos_emb(q, k, *angles)
        scores = (q @ k.mT * 8**-0.5).masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf).softmax(-1)  # [1,H,S,S]
        W_v = attention.query_key_value.weight.unflatten(0, (4, 3, 8))[:, 2]  # [H, 8, d]
        g = attention.dense.weight.sum(0).unflatten(0, (4, 8))  # [H, 8]
        expected = torch.einsum("bhqk,hv,hvd->bkd", scores, g, W_v)
    assert torch.allclose(found, expected, atol=1e-5)


def test_zero_pre_activations_are_no_division_by_zero(make_tiny_model):
    hf = make_tiny_model("llama").hf
    mlp = hf.model.layers[0].mlp
    x = torch.zeros(2, 32, requires_grad=True)
    with relevance_rules(hf):
        (found,) = torch.autograd.grad(mlp(x).sum(), x)
    assert torch.isfinite(found).all()


def test_models_without_known_parts_are_refused():
    hf = tiny_hf("llama")
    hf.model.layers = nn.ModuleList([nn.Linear(32, 32)])
    with pytest.raises(UserError, match="activation and attention"), relevance_rules(hf):
        pass


def test_a_norm_with_a_gate_is_no_norm():
    """It is a product of two inputs, which no rule covers: a model with it is refused, not run without the gate."""
    assert norm_rule(OlmoHybridRMSNormGated(8)) is None
    assert norm_rule(MambaRMSNormGated(8, 8)) is None  # its gate may be left out
    assert norm_rule(LlamaRMSNorm(8)) is not None
    assert norm_rule(Llama4TextL2Norm()) is not None

"""Loading: the self-check, unknown models, other decoders and places, number types, tokenizers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sae.errors import UserError
from sae.model import huggingface
from sae.model.hook_points import HookPoint
from sae.model.huggingface import auto_device, fingerprints
from sae.model.language_model import LanguageModel
from sae.model.load import load_model
from sae.model.sites import Site
from tests.conftest import MODEL_FAMILIES, tiny_hf, word_tokenizer
from tests.near import assert_near

TEXTS = ["the man near the old dogs runs", "she sees", "they", "a boy who likes cats sings ."]  # lengths 7, 2, 1, 7
ATTN_0, RESID_0 = Site("attn", 0), Site("resid", 0)


# ---- mistakes and the self-check


def test_weights_that_are_not_finite_fail_at_load() -> None:
    hf = tiny_hf("llama")
    hf.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match="site 'mlp_1'"):
        load_model(hf)


def test_sixteen_bits_leave_rotary_frequencies_alone(tmp_path: Path) -> None:
    """In bfloat16 a frequency is off by up to 0.4 %, which is a radian at position 250."""
    tiny_hf("llama").save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="bfloat16", device="cpu")
    assert model.dtype == torch.bfloat16
    frequencies = {name: x.dtype for name, x in model.hf.named_buffers() if "inv_freq" in name}
    assert frequencies and set(frequencies.values()) == {torch.float32}


def test_wrong_table_fails_at_load_and_names_the_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    from sae.model import sites

    monkeypatch.setitem(sites.MODEL_FAMILIES, "gemma2", sites.MODEL_FAMILIES["llama"])  # before the post-norms
    with pytest.raises(UserError, match=r"embed \+ attn_0 \+ mlp_0 differs from resid_0"):
        load_model(tiny_hf("gemma2"))
    assert load_model(tiny_hf("gemma2"), check=False).n_layers == 2


def test_a_write_that_changes_something_fails_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    write = HookPoint.write
    monkeypatch.setattr(
        HookPoint, "write", lambda self, x: write(self, 1.5 * x if self.site == Site("mlp", 1) else x), raising=True
    )
    with pytest.raises(UserError, match=r"replacing the tensor at site 'mlp_1' \('gpt_neox.layers.1.mlp'\) by a copy"):
        load_model(tiny_hf("gpt_neox"))


class NormBesideUnused(torch.nn.Module):
    """A norm, and a module whose output nobody reads."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.norm, self.unused = norm, torch.nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x)
        return self.norm(x)


def test_a_site_that_does_not_reach_the_logits_fails_at_load() -> None:
    hf = tiny_hf("llama")
    hf.model.norm = NormBesideUnused(hf.model.norm)
    with pytest.raises(UserError, match=r"site 'resid_1' \('model.norm.unused'\) does not lie between"):
        load_model(hf, site_paths={"resid_1": "model.norm.unused"})


def test_sites_out_of_order_fail_at_load() -> None:
    with pytest.raises(UserError, match="not reached in this order"):
        load_model(tiny_hf("llama"), site_paths={"mlp": "model.layers.{layer}.self_attn.q_proj"})


@pytest.mark.parametrize("name", ["no/such-model-anywhere", "/nonexistent/model", "."])
def test_unknown_model_is_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface, "hub_reachable", lambda: False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"config\.json and the weights"):
        load_model(name)


def test_unknown_model_offers_the_folder_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pythia-tiny").mkdir()
    with pytest.raises(UserError, match=r"did you mean '.*/pythia-tiny'"):
        load_model(tmp_path / "pythia-tinny")
    with pytest.raises(UserError, match=r"unknown device 'gpu'"):
        load_model(tiny_hf("gpt2"), device="gpu")
    with pytest.raises(UserError, match=r"device 'meta' holds no numbers"):
        load_model(tiny_hf("gpt2"), device="meta")
    with pytest.raises(UserError, match=r"unknown dtype 'float31'.*'float32'"):
        load_model(tiny_hf("gpt2"), dtype="float31")


# ---- other decoders, other places, other number types


def test_site_at_the_input_of_a_module() -> None:
    paths = {"attn": "model.layers.{layer}.self_attn.o_proj:input"}
    model = load_model(tiny_hf("gemma2", width=32), tokenizer=word_tokenizer(), site_paths=paths)
    tokens = model.tokenize(TEXTS)
    full = model.run(tokens, capture=model.sites)
    normal = load_model(tiny_hf("gemma2", width=32), tokenizer=word_tokenizer())
    assert torch.equal(full.logits, normal.run(tokens).logits)
    block = model.hf.model.layers[0]
    after = block.post_attention_layernorm(block.self_attn.o_proj(full.activations[ATTN_0]))
    assert_near(after, normal.run(tokens, capture=[ATTN_0]).activations[ATTN_0])
    zero = model.run(tokens, edits={ATTN_0: torch.zeros_like}).logits
    assert_near(zero, normal.run(tokens, edits={ATTN_0: torch.zeros_like}).logits)
    for site in model.sites:
        skip = model.resume_from(site, full.activations)
        assert_near(model.run(tokens, skip=skip).logits, full.logits, msg=site)
    ours = model.generate(tokens, max_new_tokens=4, edits={ATTN_0: torch.zeros_like})
    assert torch.equal(ours, normal.generate(tokens, max_new_tokens=4, edits={ATTN_0: torch.zeros_like}))


def test_any_other_decoder_with_or_without_paths() -> None:
    """Phi has parallel blocks and is not in the table; paths that are given are those that are found."""
    from transformers import PhiConfig, PhiForCausalLM

    config = PhiConfig(
        vocab_size=63, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        initializer_range=0.1, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    hf = PhiForCausalLM(config)
    blocks = "model.layers.{layer}"
    paths = {"attn": f"{blocks}.self_attn", "mlp": f"{blocks}.mlp", "resid": blocks}
    model = load_model(hf, tokenizer=word_tokenizer(), site_paths=paths)
    assert model.site_paths == load_model(hf).site_paths and not model.moved_sites
    assert [site.name for site in model.sites] == ["embed", "attn_0", "mlp_0", "resid_0", "attn_1", "mlp_1", "resid_1"]
    assert model.parallel_blocks
    tokens = model.tokenize(TEXTS)
    run = model.run(tokens, capture=model.sites, grad=True)
    total = run.activations[RESID_0] + run.activations[Site("attn", 1)] + run.activations[Site("mlp", 1)]
    assert_near(total, run.activations[Site("resid", 1)])
    gradients = torch.autograd.grad(run.logits.sum(), list(run.activations.values()))
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    for row, text in enumerate(TEXTS):
        assert_near(model.run(model.tokenize([text])).logits[0, -1], run.logits[row, -1])


@pytest.mark.parametrize("architecture", MODEL_FAMILIES)
def test_parallel_blocks_are_noticed(architecture: str, make_tiny_model: Callable[..., LanguageModel]) -> None:
    assert make_tiny_model(architecture).parallel_blocks == (architecture == "gpt_neox")


def test_sixteen_bit_model(make_tiny_model: Callable[..., LanguageModel]) -> None:
    full, half = make_tiny_model("llama"), make_tiny_model("llama", dtype="bfloat16")
    assert half.dtype == torch.bfloat16 and half.fingerprint == full.fingerprint
    tokens = half.tokenize(TEXTS)
    run = half.run(tokens, capture=half.sites, edits={RESID_0: lambda x: x.float() * 1.0})  # cast back by itself
    assert run.activations[RESID_0].dtype == torch.bfloat16
    assert torch.allclose(run.logits.float(), full.run(tokens).logits, atol=0.1)


def test_model_without_pad_token_or_tokenizer() -> None:
    bare = word_tokenizer(eos_token="<eos>", unk_token="<unk>")
    model = load_model(tiny_hf("gpt2"), tokenizer=bare)
    assert bare.pad_token is None and bare.padding_side == "right"  # the caller's tokenizer is as it was
    padded = model.run(model.tokenize(TEXTS)).logits
    assert_near(padded[1, -1], model.run(model.tokenize(TEXTS[1:2])).logits[0, -1])
    assert model.generate(model.tokenize(TEXTS), max_new_tokens=2).shape == (4, 9)
    silent = load_model(tiny_hf("gpt2"))
    assert torch.equal(silent.run(model.tokenize(TEXTS)).logits, padded)
    with pytest.raises(UserError, match="without a tokenizer"):
        silent.tokenize(TEXTS)


def test_saved_folder_gives_the_same_model(tmp_path: Path, tiny_model: LanguageModel) -> None:
    hf = tiny_hf("gpt_neox")
    hf.half().save_pretrained(tmp_path / "m")
    word_tokenizer().save_pretrained(tmp_path / "m")
    loaded = load_model(tmp_path / "m", device="cpu")
    assert loaded.dtype == torch.float32 and loaded.name == str(tmp_path / "m")
    tokens = loaded.tokenize(TEXTS)
    assert torch.equal(tokens.input_ids, tiny_model.tokenize(TEXTS).input_ids)
    assert torch.allclose(loaded.run(tokens).logits, tiny_model.run(tokens).logits, atol=2e-2)


def test_fingerprint_does_not_depend_on_the_process() -> None:
    hf = tiny_hf("llama")
    for index, parameter in enumerate(hf.parameters()):
        values = torch.arange(parameter.numel()) % 7 - 3 + index
        parameter.data.copy_(values.view_as(parameter))
    assert fingerprints(hf)[0] == fingerprints(hf.double())[0] == "2bc4d7c41e296318"


def test_fingerprints_tell_models_apart(make_tiny_model: Callable[..., LanguageModel]) -> None:
    models = [("gpt_neox", 2, 0), ("gpt_neox", 2, 1), ("gpt_neox", 3, 0), ("llama", 2, 0), ("mistral", 2, 0)]
    assert len({make_tiny_model(a, n, seed=seed).fingerprint for a, n, seed in models}) == len(models)


def test_device_is_found(tiny_model: LanguageModel) -> None:
    assert auto_device().type in ("cuda", "mps", "cpu")
    assert tiny_model.tokenize(["he"]).input_ids.device == tiny_model.device

"""Decoders of every make: sites are found and add up, gradients reach them, padding and training mode do nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.errors import UserError
from sae.model.forward import longest_alike
from sae.model.huggingface import pretrained_model, pretrained_tokenizer
from sae.model.language_model import LanguageModel, Run
from sae.model.load import load_model
from sae.model.lrp import check_conserved
from sae.model.sites import Site
from sae.model.tokens import Tokens
from sae.neurons import mlp_neuron_dictionaries
from tests.conftest import tiny_hf, word_tokenizer
from tests.tiny_models import FAMILIES, SPECIAL_SIZES, tiny_model

TEXTS = ["the man near the old dogs runs", "she sees"]
ATTN_0, MLP_0, RESID_0 = Site("attn", 0), Site("mlp", 0), Site("resid", 0)


def load(family: str, **options: Any) -> LanguageModel:
    return load_model(tiny_model(family), tokenizer=word_tokenizer(), device="cpu", **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_found_and_add_up(family: str) -> None:
    model = load(family, check=False)
    tokens = model.tokenize(TEXTS)
    run = model.run(tokens, capture=model.sites, grad=True)
    for layer in range(model.n_layers):
        before = Site("resid", layer - 1) if layer else Site("embed")
        added = [site for site in model.sites if site.layer == layer and site.kind != "resid"]
        assert added, f"no contributions in block {layer}"
        total = sum(run.activations[site] for site in (before, *added))
        assert torch.allclose(total, run.activations[Site("resid", layer)], atol=1e-4), layer
    gradients = torch.autograd.grad(run.logits.square().sum(), list(run.activations.values()))
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    assert torch.allclose(run.logits[1, -1], model.run(tokens[1]).logits[0, -1], atol=1e-4)
    first = model.sites[1]
    skip = {first: torch.zeros_like(run.activations[first])}
    assert torch.allclose(
        model.run(tokens, edits={first: torch.zeros_like}).logits, model.run(tokens, skip=skip).logits, atol=1e-4
    )
    check_hidden_neurons(model, run)


EXPERTS_LATER = ("deepseek_v3", "jamba", "llama4_text")
WITHOUT_NEURONS = {"mamba": "no MLPs", "gpt_oss": "mixture", "mixtral": "mixture", "qwen3_moe": "mixture"}


def check_hidden_neurons(model: LanguageModel, run: Run) -> None:
    """What the MLP adds is made of its hidden neurons, gated or not, behind a norm or not; experts are refused."""
    sites = [site for site in model.sites if site.kind == "mlp"]
    sites = (
        sites[:1]
        if type(model.hf.config).__name__ in ("DeepseekV3Config", "JambaConfig", "Llama4TextConfig")
        else sites
    )
    reason = WITHOUT_NEURONS.get(model.hf.config.model_type)
    with pytest.raises(UserError, match=reason) if reason else nullcontext():
        for site, sae in mlp_neuron_dictionaries(model, sites=sites).items():
            place = Site("mlp_hidden", site.layer)
            n = model.run(model.tokenize(TEXTS), capture=[place], need_logits=False).activations[place]
            x = run.activations[site].detach()
            torch.testing.assert_close(sae(n), x, atol=1e-5 * float(x.abs().max()), rtol=1e-4)


def test_what_is_added_is_not_what_the_module_returns() -> None:
    """Granite multiplies by .22, Falcon adds the attention to the MLP's output in place, OPT's MLP has no rows."""
    places = {family: load(family)._hook_points for family in ("granite", "falcon", "opt")}
    assert places["granite"][ATTN_0].scale == places["granite"][MLP_0].scale == 0.22
    assert [site.kind for site, place in places["falcon"].items() if place.in_place] == ["mlp", "mlp"]
    assert [site.kind for site, place in places["opt"].items() if place.flat] == ["mlp", "mlp"]


def test_paths_that_are_no_contributions_are_told(caplog: pytest.LogCaptureFixture) -> None:
    load("phi3", site_paths={"mlp": "model.layers.{layer}.mlp.gate_up_proj:input"})
    assert "not what sublayers add to the residual stream in 2 blocks: embed + attn_0 + mlp_0" in caplog.text
    caplog.clear()
    blocks = "model.layers.{layer}"
    given = {"attn": f"{blocks}.self_attn", "mlp": f"{blocks}.mlp", "resid": blocks}
    assert load("granite", site_paths=given)._hook_points[ATTN_0].scale == 0.22
    assert not caplog.text


def test_blocks_that_do_not_add_up_keep_the_stream(caplog: pytest.LogCaptureFixture) -> None:
    model = load("openai-gpt")  # a norm after each sum
    assert [site.name for site in model.sites] == ["embed", "resid_0", "resid_1"]
    assert "no attn and mlp sites" in caplog.text and "give site_paths" in caplog.text


def test_an_encoder_is_refused() -> None:
    with pytest.raises(UserError, match="is not a decoder: its logits at a token depend on the tokens after it"):
        load("bert")


def test_padding_of_a_recurrent_state_is_left_out() -> None:
    model = load("rwkv")
    assert model.padding_shows
    rows = [[1, 45, 30, 17], [1, 50, 60, 17, 20, 9, 10, 33]]
    both, alone = Tokens.from_rows(rows), Tokens.from_rows(rows[:1])
    together, single = (model.run(tokens, capture=[RESID_0]) for tokens in (both, alone))
    assert torch.allclose(together.logits[0, 4:], single.logits[0], atol=1e-5)
    assert torch.allclose(together.activations[RESID_0][0, 4:], single.activations[RESID_0][0], atol=1e-5)
    assert not together.activations[RESID_0][0, :4].any()
    for run in (lambda: model.run(both, grad=True, capture=[RESID_0]), lambda: model.generate(both, max_new_tokens=2)):
        with pytest.raises(UserError, match="state that runs over padding: give prompts of equal length in tokens"):
            run()


def test_rows_that_run_apart_keep_their_attention_where_it_is_frozen() -> None:
    model = load("bart")
    assert model.padding_shows
    both = Tokens.from_rows([[1, 45, 30, 17], [1, 50, 60, 17, 20, 9, 10, 33]])
    edit = {RESID_0: lambda x, columns: x + torch.linspace(-1, 1, 32)}
    with model.edited(edit):
        free = model.run(both).logits
        with model.frozen_attention():
            together = model.run(both).logits
            alone = [model.run(both[i : i + 1]).logits[0] for i in range(2)]
    assert all(torch.allclose(together[i], alone[i], atol=1e-5) for i in range(2))
    assert not torch.allclose(together, free, atol=1e-3)


ROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0}
SCALED = {
    "phi3": {"rope_scaling": ROPE, "original_max_position_embeddings": 12},
    "llama4_text": {"num_hidden_layers": 4, "attn_temperature_tuning": True, "floor_scale": 13},
}


@pytest.mark.parametrize("family", SCALED)
def test_rows_whose_positions_are_scaled_by_the_longest_run_apart(family: str, monkeypatch) -> None:
    """Beyond a number of tokens that the config says; up to it rows of all lengths share a batch."""
    monkeypatch.setitem(SPECIAL_SIZES, family, {**SPECIAL_SIZES.get(family, {}), **SCALED[family]})
    model = load(family)
    assert longest_alike(model.hf) == 12 and not model.padding_shows
    rows = [[1, 45, 30, 17], [1, 50, 60, 17, 20, 9, 10, 33, 12, 8, 45, 30, 51, 17, 22, 60]]
    both, short = Tokens.from_rows(rows), Tokens.from_rows([rows[0], rows[1][:8]])
    alone = [model.run(Tokens.from_rows([row])).logits[0] for row in rows]
    together = model.run(both).logits
    assert all(torch.allclose(together[i, -len(row) :], alone[i], atol=1e-5) for i, row in enumerate(rows))
    mixed = model._run(both, set(), {}, {}).logits
    assert not all(torch.allclose(mixed[i, -len(row) :], alone[i], atol=1e-5) for i, row in enumerate(rows))
    for run in (lambda: model.run(both, grad=True, capture=[RESID_0]),
                lambda: model.generate(short, max_new_tokens=5)):  # fmt: skip
        with pytest.raises(UserError, match="scales positions by the longest text of a batch of more than 12 tokens"):
            run()
    assert model.run(short, grad=True, capture=[RESID_0]).activations[RESID_0].requires_grad
    assert model.generate(short, max_new_tokens=4).shape == (2, 12)


def test_the_callers_state_does_not_show(tiny_model: LanguageModel) -> None:
    tokens = tiny_model.tokenize(TEXTS)
    expected = tiny_model.run(tokens).logits
    tiny_model.hf.train()
    assert torch.equal(tiny_model.run(tokens).logits, expected) and not tiny_model.hf.training
    with torch.no_grad():
        assert tiny_model.run(tokens, capture=[RESID_0], grad=True).activations[RESID_0].requires_grad


class NoBackward(torch.nn.Module):
    """A module without a backward pass."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.inner(x)


def test_modules_without_a_backward_pass_are_told(caplog: pytest.LogCaptureFixture) -> None:
    hf = tiny_hf("llama")
    for block in hf.model.layers:
        block.mlp.down_proj = NoBackward(block.mlp.down_proj)
    load_model(hf)
    assert "no backward pass" in caplog.text


def test_a_model_without_gradients_is_refused_where_they_are_needed_and_runs_elsewhere(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hf = tiny_hf("llama")
    hf.model.norm = NoBackward(hf.model.norm)
    model = load_model(hf, tokenizer=word_tokenizer(), device="cpu")
    assert not model.has_gradients and "what needs gradients will be refused" in caplog.text
    tokens = model.tokenize(["the man near the dogs runs"])
    with pytest.raises(UserError, match=r"no gradient reaches the logits.*the method exact"):
        model.run(tokens, capture=[RESID_0], grad=True)
    assert model.run(tokens, edits={RESID_0: lambda x: x}).logits.isfinite().all()


# ---- relp


CONSERVED = (
    "glm4", "mixtral", "qwen3_moe", "qwen2_moe", "nemotron", "bloom", "phi3", "falcon", "deepseek_v3", "codegen",
    "gpt_bigcode", "persimmon",
)  # fmt: skip


@pytest.mark.parametrize("family", CONSERVED)
def test_relevance_is_conserved(family: str) -> None:
    check_conserved(load(family, check=False))


@pytest.mark.parametrize("family", ["gpt_oss", "mamba"])
def test_relevance_that_is_lost_is_refused(family: str) -> None:
    with pytest.raises(UserError, match=r"relp does not (know|cover).*use ig or attrib"):
        check_conserved(load(family, check=False))


# ---- files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with its tokenizer."""
    path = tmp_path_factory.mktemp("model") / "m"
    tiny_hf("llama").save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


def _config(**values: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | values))

    return change


def _drop_weight(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.0.mlp.down_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def _half(path: Path) -> None:
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def _pointer(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop_weight, r"no weights for model.layers.0.mlp.down_proj.weight: they would be random"),
        (_config(num_hidden_layers=3), "no weights for model.layers.2.input_layernorm.weight and 8 more"),
        (_config(hidden_size=64, head_dim=16), r"another shape for .*\(\[.*\] and not \[.*\]\) and"),
        (_config(num_hidden_layers=1e30), "num_hidden_layers is 1e.30: at most 10000"),
        (_config(vocab_size=10**14), "vocab_size is 100000000000000: at most"),
        (_config(vocab_size="3"), "vocab_size"),
        (_config(model_type="new", auto_map={"AutoConfig": "new.NewConfig"}), "code of its own"),
        (_half, r"model.safetensors ends \d+ bytes early"),
        (_pointer, "model.safetensors is a pointer of Git LFS"),
    ],
)
def test_damaged_models_are_one_sentence(
    damage: Callable[[Path], None], message: str, folder: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(folder, tmp_path / "m"))
    damage(path)
    with pytest.raises(UserError, match=message):
        pretrained_model(str(path), None)


def test_damaged_tokenizers_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(folder, tmp_path / "m"))
    (path / "tokenizer.json").write_text((path / "tokenizer.json").read_text()[:300])
    with pytest.raises(UserError, match=r"tokenizer of model .* cannot be loaded"):
        pretrained_tokenizer(str(path), required=True)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_one_model_in_every_number_type(stored: str, tmp_path: Path) -> None:
    tiny_hf("llama").to(getattr(torch, stored)).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    models = [
        load_model(tmp_path, dtype=dtype, device="cpu", check=False)
        for dtype in ("float32", "float64", "bfloat16", "float16")
    ]
    assert len({model.fingerprint for model in models}) == 1
    half = load_model(models[-1].hf, check=False)  # an object, which has lost what float16 does not hold
    assert all(model.is_model(half.fingerprint) for model in models) and half.is_model(models[0].fingerprint)


def test_a_pad_token_that_the_model_does_not_know() -> None:
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model = load_model(tiny_hf("llama"), tokenizer=tokenizer, check=False)
    assert tokenizer.pad_token_id >= model.vocab_size
    padded = model.run(model.tokenize(TEXTS)).logits[1, -1]
    assert torch.allclose(padded, model.run(model.tokenize(TEXTS[1:])).logits[0, -1], atol=1e-5)

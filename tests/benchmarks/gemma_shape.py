"""A random model of Gemma 2's shape with random autoencoders on disk, for the benchmarks of memory and cost."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from circuits.prompts.dataset import PromptSet
from sae.autoencoder import SAEConfig, SparseAutoencoder
from sae.model.language_model import LanguageModel, Tokens
from sae.model.load import load_model
from sae.model.sites import Site


def make_model(*, layers: int, width: int, vocab: int, device: str, dtype: str) -> LanguageModel:
    """Gemma 2 with 8 heads of 256, 4 of keys and values, and an MLP of four widths; 2B is width 2,304, 26 layers."""
    torch.manual_seed(0)
    heads = max(1, 8 * width // 2304)
    head_dim = 256 if width == 2304 else width // heads
    config = Gemma2Config(
        vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, intermediate_size=4 * width,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 2), head_dim=head_dim,
        query_pre_attn_scalar=256, max_position_embeddings=256, initializer_range=0.02,
    )  # fmt: skip
    with torch.device(device):
        hf = Gemma2ForCausalLM(config).to(getattr(torch, dtype)).eval()
    return load_model(hf, device=device, dtype=dtype)


def circuit_sites(model: LanguageModel) -> list[Site]:
    """Attention, MLP and residual stream of every layer."""
    return [site for site in model.sites if site.layer is not None]


def random_sae(site: Site, width: int, n_features: int, *, threshold: float, device: str = "cpu") -> SparseAutoencoder:
    """JumpReLU with a random dictionary: activations of unit directions are about normal, so `threshold` sets L0."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(site.name.encode()))
    W_dec = torch.nn.functional.normalize(torch.randn(n_features, width, generator=generator, device=device), dim=-1)
    tensors = {
        "W_enc": W_dec.clone(), "b_enc": torch.zeros(n_features), "W_dec": W_dec, "b_dec": torch.zeros(width),
        "threshold": torch.full((n_features,), threshold),
    }  # fmt: skip
    config = SAEConfig("jumprelu", width, n_features, site.name, subtract_b_dec=False)
    return SparseAutoencoder(config, tensors).to(device)


def write_saes(folder: Path, model: LanguageModel, n_features: int, *, l0: int, tokens: Tokens) -> Path:
    """An autoencoder for every site, with thresholds that leave about `l0` features of these tokens active."""
    sites = circuit_sites(model)
    activations = model.run(tokens, capture=sites, need_logits=False).activations
    for site in sites:
        if not (folder / "saes" / site.name / "sae.safetensors").exists():
            sae = random_sae(site, model.widths[site], n_features, threshold=0.0, device=str(model.device))
            x = activations[site].flatten(0, 1)[:64].float()
            threshold = torch.quantile((x @ sae.W_enc.T).flatten()[:1_000_000], 1 - l0 / n_features).item()
            sae.threshold.fill_(max(threshold, 1e-6))  # type: ignore[operator, union-attr]
            sae.save(folder / "saes" / site.name)
    return folder


def make_prompts(n: int, length: int, vocab: int, device: str) -> PromptSet:
    """Pairs of random tokens that differ at the second."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(3, vocab, (n, length), generator=generator)
    patch = clean.clone()
    patch[:, 1] = torch.randint(3, vocab, (n,), generator=generator)
    ones = torch.ones_like(clean)
    answers = torch.randint(3, vocab, (2, n), generator=generator)
    return PromptSet(
        clean=Tokens(clean, ones), patch=Tokens(patch, ones), clean_answers=answers[0], patch_answers=answers[1],
        cases=["random"] * n, templates=["one"] * n, texts=[""] * n,
    ).to(device)  # fmt: skip

"""Random autoencoders at every site of the tiny model, and a few minimal pairs for it, with spans where asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from circuits.attribution.activations import Setting, capture_activations
from circuits.attribution.effects import SiteEffects
from circuits.metrics.metrics import logit_difference
from circuits.prompts.alignment import span_keys
from circuits.prompts.dataset import PromptSet
from sae.autoencoder import SAEConfig, SparseAutoencoder
from sae.model.language_model import Tokens
from sae.saes import SAEs


def random_sae(site, width: int, *, architecture: str = "topk", n_features: int = 48, k: int = 6, seed: int = 0):
    """An untrained autoencoder whose features are active on about a tenth to a half of the tokens."""
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(n_features, width, generator=generator), dim=-1)
    tensors = {
        "W_enc": W_dec + 0.05 * torch.randn(n_features, width, generator=generator),
        "b_enc": 0.01 * torch.randn(n_features, generator=generator),
        "W_dec": W_dec,
        "b_dec": 0.01 * torch.randn(width, generator=generator),
    }
    if architecture == "jumprelu":
        tensors["threshold"] = 0.02 * torch.rand(n_features, generator=generator)
    config = SAEConfig(
        architecture=architecture,
        d_model=width,
        n_features=n_features,
        site=str(site),
        k=k if architecture == "topk" else None,
    )
    return SparseAutoencoder(config, tensors)


@pytest.fixture(scope="session")
def make_saes():
    """Function: model -> {site: random autoencoder} for all its sites."""

    def make(model, **options):
        widths = enumerate(model.widths.items())
        return SAEs({site: random_sae(site, width, seed=seed, **options) for seed, (site, width) in widths})

    return make


@pytest.fixture(scope="session")
def tiny_saes(tiny_model, make_saes):
    """A random top-k autoencoder at every site of the tiny model."""
    return make_saes(tiny_model)


@pytest.fixture(scope="session")
def tiny_prompts(tiny_model) -> PromptSet:
    """Eight minimal pairs of 5 or 7 tokens that differ at position 1, two cases, two templates."""
    generator = torch.Generator().manual_seed(0)
    special = tiny_model.special_ids
    words = torch.tensor([i for i in range(tiny_model.vocab_size) if i not in special])

    def draw(*shape: int) -> torch.Tensor:
        return words[torch.randint(len(words), shape, generator=generator)]

    frames = {5: draw(5), 7: draw(7)}
    rows = [frames[5 if row % 2 == 0 else 7].clone() for row in range(8)]
    others = [row.clone() for row in rows]
    for row, other in zip(rows, others, strict=True):
        row[1], other[1] = words[torch.randperm(len(words), generator=generator)[:2]]
    answers = torch.stack([words[torch.randperm(len(words), generator=generator)[:2]] for _ in rows])  # [B, 2]
    return PromptSet(
        clean=Tokens.from_rows([row.tolist() for row in rows]),
        patch=Tokens.from_rows([other.tolist() for other in others]),
        clean_answers=answers[:, 0],
        patch_answers=answers[:, 1],
        cases=["a_b" if row < 4 else "b_a" for row in range(8)],
        templates=["5" if row % 2 == 0 else "7" for row in range(8)],
        texts=[f"prompt {row}" for row in range(8)],
    )


@pytest.fixture(scope="module")
def states(tiny_model, tiny_saes, tiny_prompts):
    return capture_activations(Setting(tiny_model, tiny_saes, logit_difference), tiny_prompts, sites=tiny_model.sites)


def dense(effects: SiteEffects, shape) -> torch.Tensor:
    """[B, S, F + 1], positions counted from the first real token."""
    full = torch.zeros(*shape, effects.n_features + 1)
    full[effects.example.long(), effects.position.long(), effects.feature.long()] = effects.value
    return full


def with_spans(prompts, rows: dict[int, list[str]]):
    """The prompts with the roles of `rows`, by the length of the prompt."""
    spans = tuple(dict.fromkeys(name for row in rows.values() for name in row))
    width = prompts.clean.n_positions
    table = [[-1] * (width - n) + [spans.index(name) for name in rows[n]] for n in prompts.clean.lengths.tolist()]
    numbers = torch.tensor(table)
    keys = span_keys([""] * len(prompts), numbers, spans)
    return replace(prompts, spans=spans, span_numbers=numbers, templates=keys, template_rule="spans")


MIXED = {5: ["a", "b", "c", "c", "end"], 7: ["a", "b", "b", "c", "c", "c", "end"]}

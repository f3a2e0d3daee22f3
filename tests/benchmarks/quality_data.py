"""The activations that all trainers of the quality benchmark learn from and are scored on.

- `real`: activations of `models/tinystories-260k` at a site on the training stories, each row once, in one random
  order; scored on the held-out stories by `sae.evaluation.evaluate`: explained variance, L0, CE recovered, dead
  features.
- `synthetic`: x = Σ_i a_i g_i + noise over known unit directions g_i [512, d] of width 128. Feature i is active
  independently of the others with a probability that falls from .067 to .006 with its rank (8 active on average),
  with a magnitude |1 + n/4|; noise has standard deviation .05. Scored on fresh rows, and by how well the decoder holds
  the directions: the mean over directions of the largest cosine with a decoder row, and the share above .9.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from sae._files import atomic_write
from sae.autoencoder import SparseAutoencoder
from sae.data.activations import FORWARD_TOKENS, ContextStream, ModelActivations
from sae.data.text import TextSource
from sae.evaluation.evaluate import evaluate_saes
from sae.evaluation.metrics import FeatureTotals, ReconstructionTotals
from sae.features.matching import match_features
from sae.model.language_model import LanguageModel
from sae.model.load import load_model
from sae.model.sites import Site
from sae.splice import decode_sparse

SHARED = Path(__file__).parents[3] / "shared"
MODEL, TEXT = SHARED / "models/tinystories-260k", SHARED / "data/tinystories"
HELD_OUT_TOKENS = 30_000
WIDTH, DIRECTIONS, ACTIVE = 128, 512, 8
NOISE = 0.05
RECOVERED = 0.9
"""Cosine above which a direction counts as recovered."""


@dataclass(frozen=True)
class Score:
    """How good an autoencoder is on rows it was not trained on."""

    l0: float
    """Active features a token."""
    explained_variance: float
    """1 − Σ‖x − x̂‖² / Σ‖x − x̄‖²."""
    dead: float
    """Share of the features that fired on no held-out token."""
    ce_recovered: float | None = None
    """(CE_zero − CE) / (CE_zero − CE_model), x̂ spliced into the model; None without a model."""
    mmcs: float | None = None
    """Mean over the true directions of the largest cosine with a decoder row; None where they are not known."""
    recovered: float | None = None
    """Share of the true directions with a cosine above .9."""


class Synthetic:
    """Sparse sums of known directions."""

    def __init__(self, seed: int, tokens: int):
        self.name, self.seed, self.tokens = f"synthetic-{seed}", seed, tokens
        generator = torch.Generator().manual_seed(seed)
        self.directions = normalize(torch.randn(DIRECTIONS, WIDTH, generator=generator), dim=1)
        self.chance = 1 / (torch.arange(DIRECTIONS) + 49)
        self.chance *= ACTIVE / self.chance.sum()

    def rows(self, n: int, *, seed: int) -> Tensor:
        """n rows [n, d]."""
        generator = torch.Generator().manual_seed(seed)
        parts = [self._some(min(2**14, n - start), generator) for start in range(0, n, 2**14)]
        return torch.cat(parts)

    def _some(self, n: int, generator: torch.Generator) -> Tensor:
        active = torch.rand(n, DIRECTIONS, generator=generator) < self.chance
        size = (1 + torch.randn(n, DIRECTIONS, generator=generator) / 4).abs()
        return (active * size) @ self.directions + NOISE * torch.randn(n, WIDTH, generator=generator)

    def make(self) -> Tensor:
        """The rows to train on."""
        return self.rows(self.tokens, seed=1000 + self.seed)

    @cached_property
    def held_out(self) -> Tensor:
        """Rows to score on."""
        return self.rows(HELD_OUT_TOKENS, seed=2000 + self.seed)

    def score(self, sae: SparseAutoencoder) -> Score:
        """All of `Score` but CE recovered."""
        features, totals = FeatureTotals(sae.config.n_features), ReconstructionTotals()
        for x in self.held_out.split(2**13):
            f = sae.encode_sparse(x)
            totals.update(x, decode_sparse(sae, f, len(x)))
            features.update(f.feature, f.value, len(x))
        cosine = match_features(self.directions, sae.W_dec).similarity
        recovered = float((cosine > RECOVERED).float().mean())
        return Score(
            features.l0, totals.explained_variance, features.dead_fraction, None, float(cosine.mean()), recovered
        )


class Real:
    """Activations of a trained model at one site."""

    def __init__(self, site: str, tokens: int):
        self.name, self.tokens, self.site = site, tokens, Site.parse(site)

    @cached_property
    def model(self) -> LanguageModel:
        """The model."""
        return load_model(str(MODEL), device="cpu")

    def make(self) -> Tensor:
        """The rows to train on."""
        stream = ContextStream(self.model, TextSource.of(TEXT / "train.jsonl"))
        source = ModelActivations(self.model, stream, [self.site])
        buffer = {self.site: torch.empty(self.tokens + FORWARD_TOKENS, self.model.widths[self.site])}
        order = torch.randperm(source.fill(buffer), generator=torch.Generator().manual_seed(0))
        return buffer[self.site][order[: self.tokens]]

    def score(self, sae: SparseAutoencoder) -> Score:
        """Reconstruction and CE recovered on the held-out stories."""
        texts = TextSource.of(TEXT / "valid.jsonl").read()
        result = evaluate_saes(self.model, {self.site: sae}, texts, max_tokens=HELD_OUT_TOKENS)
        m = result.sites[self.site.name]
        return Score(m.l0, m.explained_variance, m.dead_fraction, m.predictions.ce_recovered)


Data = Real | Synthetic


def rows_file(data: Data, folder: Path) -> Path:
    """The file with the rows to train on, made if it is not there."""
    path = folder / f"{data.name}-{data.tokens}.safetensors"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            save_file({"x": data.make().contiguous()}, temporary)
    return path


def load_rows(path: Path) -> Tensor:
    """Rows [N, d] of a file."""
    return load_file(path)["x"]

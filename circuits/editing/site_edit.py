"""The edit of one site: x -> x' = x + sum_i (f_i' - f_i) W_dec[i], and the means that features can be set to.

Only the encoder rows of the edited features are computed; where features compete (top k) all of them must be.

Shapes: B prompts, S positions, d model width, F features of a site, n edited features of a site, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import get_args

import torch
from torch import Tensor

from circuits.editing.targets import Features, counted_activations
from circuits.options import Operation
from sae.autoencoder import SparseAutoencoder
from sae.errors import UserError, unknown
from sae.model.hook_points import SiteEdit
from sae.model.language_model import LanguageModel, Tokens
from sae.model.sites import Site
from sae.saes import as_saes

NEEDS_VALUE = ("set", "scale", "steer")


class SiteFeatureEdit:
    """x -> x' = x + sum_i (f_i' - f_i) W_dec[i] for the features `index` [n] of one site."""

    def __init__(self, sae: SparseAutoencoder, index: Tensor, operation: Operation, value: Tensor | None = None):
        self.index = index.to(sae.device)  # [n]
        self.operation = operation
        self.value = None if value is None else value.to(sae.device)  # [] or [n]
        self.competing = sae.nonlinearity.needs_k
        self.sae = sae if self.competing else sae.restrict(index)
        self.W_dec = sae.W_dec[self.index]  # [n, d]

    def features(self, x: Tensor) -> Tensor:
        """f of the edited features: x [..., d] -> [..., n]."""
        if not self.competing:
            return self.sae.encode(x)
        tokens = x.reshape(-1, x.shape[-1])  # [N, d]
        active = self.sae.encode_sparse(tokens)
        column = torch.full((self.sae.config.n_features,), -1, device=x.device)  # [F]
        column[self.index] = torch.arange(len(self.index), device=x.device)
        edited = column[active.feature] >= 0
        f = torch.zeros(len(tokens), len(self.index), device=x.device)  # [N, n]
        f[active.token[edited], column[active.feature[edited]]] = active.value[edited].float()
        return f.reshape(*x.shape[:-1], -1)

    def change(self, f: Tensor) -> Tensor:
        """f' - f [..., n]."""
        if self.operation == "zero":
            return -f
        assert self.value is not None
        if self.operation == "scale":
            return (self.value - 1) * f
        return self.value - f

    def __call__(self, x: Tensor) -> Tensor:
        if self.operation == "steer":
            assert self.value is not None
            return x + (self.value.expand(len(self.index)) @ self.W_dec).to(x.dtype)
        return x + (self.change(self.features(x)) @ self.W_dec).to(x.dtype)


def make_edits(
    saes: Mapping[Site, SparseAutoencoder],
    features: Features,
    *,
    operation: Operation = "zero",
    value: float | None = None,
    means: Mapping[Site, Tensor] | None = None,
) -> dict[Site, SiteEdit]:
    """Edits by site, for `LanguageModel.run` and `LanguageModel.generate`. means: [n] by site, for `mean`."""
    check_operation(operation, value)
    if operation == "mean" and means is None:
        raise UserError("the operation 'mean' needs the means of the features: see feature_means")
    constant = None if value is None else torch.tensor(float(value))
    targets = means if operation == "mean" and means is not None else dict.fromkeys(features, constant)
    return {site: SiteFeatureEdit(saes[site], index, operation, targets[site]) for site, index in features.items()}


def check_operation(operation: str, value: float | None) -> None:
    """`UserError` unless the operation is known and has a value exactly where it needs one."""
    if operation not in get_args(Operation):
        raise unknown("operation", operation, get_args(Operation))
    if operation in NEEDS_VALUE and value is None:
        raise UserError(f"the operation {operation!r} needs a value")
    if value is not None and not math.isfinite(value):
        raise UserError(f"value is {value}: it must be a finite number")
    if operation not in NEEDS_VALUE and value is not None:
        raise UserError(f"the operation {operation!r} takes no value (given {value}); {', '.join(NEEDS_VALUE)} do")


@torch.no_grad()
def feature_means(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    features: Features,
    batches: Sequence[Tokens],
    *,
    where: Sequence[Tensor] | None = None,
) -> dict[Site, Tensor]:
    """Mean of each chosen feature over all tokens (special tokens aside) of the batches, or those of `where` ([B, S]
    bool each): [n] by site.
    """
    readers = {site: SiteFeatureEdit(saes[site], index, "zero") for site, index in features.items()}
    sums = {site: torch.zeros(len(index), device=as_saes(saes).device) for site, index in features.items()}
    n_tokens = 0
    masks: Sequence[Tensor | None] = where or [None] * len(batches)
    for tokens, mask in zip(batches, masks, strict=True):
        activations = counted_activations(model, tokens, features, mask)
        n_tokens += len(next(iter(activations.values())))
        for site, x in activations.items():
            sums[site] += readers[site].features(x).sum(0)
    return {site: total / max(n_tokens, 1) for site, total in sums.items()}

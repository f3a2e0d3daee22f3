"""Learn a linear probe (`circuits.metrics.probe`) from labelled prompts by logistic regression.

1. `read_site` gives x of one site at the last token, or its mean over a span.
2. `fit_probe` standardises it, fits scikit-learn's regression, folds the standardisation back into weight and bias, and
   tells how often the probe is right on held-out prompts.

Shapes: B prompts, S positions, d model width, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.errors import UserError
from sae.model.language_model import LanguageModel, Tokens
from sae.model.sites import Site

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class FittedProbe:
    """A probe learned from labelled prompts."""

    weight: Tensor
    """[d] for two classes, of which it prefers the second; [C, d] for more."""
    bias: Tensor
    """[] or [C]."""
    classes: list[str]
    """Names of the labels, sorted."""
    accuracy: float
    """Share of held-out prompts it labels rightly."""
    chance: float
    """Share of the commonest label among them."""
    n_train: int
    """Prompts learned from."""
    n_test: int
    """Held-out prompts."""


@torch.no_grad()
def read_site(
    model: LanguageModel, tokens: Tokens, site: Site, inside: Tensor | None = None, *, batch_size: int = 64
) -> Tensor:
    """x at the last token, [B, d]; with `inside` [B, S] bool the mean over these tokens."""
    batches = []
    for start in range(0, len(tokens), batch_size):
        rows = slice(start, start + batch_size)
        x = model.run(tokens[rows], capture=[site], need_logits=False).activations[site].float()
        if inside is None:
            batches.append(x[:, -1])
        else:
            is_inside = inside[rows].to(x)[..., None]
            batches.append((x * is_inside).sum(1) / is_inside.sum(1))
    return torch.cat(batches).cpu()


def fit_probe(
    x: Tensor, labels: Sequence[str], *, held_out: float = 0.25, penalty: float = 1.0, seed: int = 0
) -> FittedProbe:
    """Logistic regression from x [B, d] to the labels on standardised coordinates, folded back into raw ones.

    held_out: share of the prompts it is scored on; penalty: inverse strength of the L2 penalty, scikit-learn's C.
    """
    from sklearn.model_selection import train_test_split

    classes = sorted(set(labels))
    rarest = min((sum(label == name for label in labels) for name in classes), default=0)
    if len(classes) < 2 or rarest < 2:
        raise UserError(f"a probe needs two labels with two prompts each, found {', '.join(classes) or 'none'}")
    features, given = x.double().numpy(), [classes.index(label) for label in labels]
    train_x, test_x, train_y, test_y = train_test_split(
        features, given, test_size=max(held_out, len(classes) / len(given)), random_state=seed, stratify=given
    )
    weight, bias = regress(train_x, train_y, penalty=penalty)
    output = torch.einsum("bd,...d->b...", torch.from_numpy(test_x), weight) + bias  # [n] or [n, C]
    given_y = output > 0 if len(classes) == 2 else output.argmax(-1)
    accuracy = float((given_y == torch.tensor(test_y)).double().mean())
    commonest = max(test_y.count(number) for number in range(len(classes))) / len(test_y)
    return FittedProbe(weight.float(), bias.float(), classes, accuracy, commonest, len(train_y), len(test_y))


def regress(
    x: NDArray[np.float64], y: Sequence[int], *, penalty: float = 1.0, balanced: bool = False
) -> tuple[Tensor, Tensor]:
    """Weight [d] and bias [] of a logistic regression on x [B, d] standardised, in raw coordinates, float64; [C, d] and
    [C] for C > 2 classes.

    penalty: inverse strength of the L2 penalty, scikit-learn's C; balanced: whether classes weigh alike.
    """
    from sklearn.linear_model import LogisticRegression

    mean, scale = x.mean(0), x.std(0).clip(min=1e-6)
    weights = "balanced" if balanced else None
    regression = LogisticRegression(C=penalty, max_iter=2000, class_weight=weights).fit((x - mean) / scale, y)
    weight = torch.from_numpy(regression.coef_ / scale)  # [1 or C, d]
    bias = torch.from_numpy(regression.intercept_) - weight @ torch.from_numpy(mean)
    return (weight[0], bias[0]) if len(weight) == 1 else (weight, bias)

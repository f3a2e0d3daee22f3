"""What training does when its numbers run away: it stops with a sentence, and what was saved before stays."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from sae.errors import UserError

log = logging.getLogger(__name__)


def diverged(name: str, step: int, checkpoints: Path) -> UserError:
    """The error for an autoencoder whose loss or weights are no numbers any more; raise what this returns."""
    saved = sorted(path.name for path in checkpoints.glob("step_*")) if checkpoints.is_dir() else []
    stands = f"the checkpoint {saved[-1]} stands" if saved else "there is no checkpoint yet"
    return UserError(
        f"the training of {name} diverged: at step {step} its loss or weights are not finite, so nothing was exported "
        f"({stands}): train again with a lower learning rate, or less extreme weights of the penalties"
    )


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether there is no NaN and no infinity in any of the tensors."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def warn_of_useless(explained: Mapping[str, float]) -> None:
    """Warns of each autoencoder, by name, whose explained variance is below zero: its x̂ is worse than the mean."""
    for name, value in explained.items():
        if not value >= 0:
            log.warning(
                "%s: explained variance is %.3g, below zero: the mean activation is a better reconstruction than this "
                "autoencoder's; train it longer, or with a lower learning rate",
                name,
                value,
            )

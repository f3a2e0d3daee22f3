"""Refusals of what other projects make that is no autoencoder of one site, by name and with the reason."""

from __future__ import annotations

import re
from pathlib import Path

from sae.errors import UserError

_REASONS = {
    "transcoder": "a transcoder, which reads at one site and writes at another: only autoencoders, which "
    "rebuild what they read, can be used here",
    "crosscoder": "a crosscoder, which reads and writes several layers at once: only autoencoders of one site can be "
    "used here",
    "clt": "a cross-layer transcoder, which reads one layer and writes all that follow: only autoencoders, which "
    "rebuild what they read, can be used here",
    "lorsa": "a low-rank sparse attention layer (Lorsa), which moves information between tokens: only autoencoders, "
    "which take each token alone, can be used here",
    "temporal": "a temporal autoencoder, whose features depend on earlier tokens: only autoencoders that take each "
    "token alone can be used here",
    "matchingpursuit": "a matching pursuit autoencoder, which picks features one after another from what the ones "
    "before left: its features are no function of one linear map, as those used here are",
    "abstopk": "an AbsTopK autoencoder, whose features are the k largest in size and may be negative: only features "
    "that are zero or positive can be used here",
    "groupmax": "an autoencoder with groupmax, which keeps the largest feature of each group: there is no such "
    "activation here",
    "tanhrelu": "an autoencoder with tanh-relu, whose features saturate: they are not linear in the activations where "
    "they are active, as those used here are",
    "skip": "an autoencoder with a skip connection: what it writes is not made of features alone, so that their "
    "effects would not add up",
}
_ALSO = {"crosslayertranscoder": "clt", "lowranksparseattention": "lorsa", "molt": "transcoder"}
_CONTAINED = ("crosslayertranscoder", "transcoder", "crosscoder", "temporal", "matchingpursuit", "lorsa")


def refusal(source: Path, name: str) -> UserError | None:
    """The error for an architecture, class or activation of this name; None where it is not one of those refused."""
    plain = re.sub(r"[^a-z]", "", name.lower())
    kind = next((name_part for name_part in _CONTAINED if name_part in plain), plain)
    kind = _ALSO.get(kind, kind)
    return UserError(f"{source} holds {_REASONS[kind]}") if kind in _REASONS else None


def transcoder_refusal(source: Path) -> UserError:
    """The error for a transcoder; raise what this returns."""
    return UserError(f"{source} holds {_REASONS['transcoder']}")

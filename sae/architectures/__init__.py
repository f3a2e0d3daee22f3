"""Every architecture by its name in `config.json`."""

from __future__ import annotations

from sae.errors import unknown
from sae.nonlinearities import GATED, IDENTITY, JUMPRELU, RELU, TOPK, Nonlinearity

NONLINEARITIES: dict[str, Nonlinearity] = {
    "topk": TOPK,
    "relu": RELU,
    "batchtopk": JUMPRELU,
    "jumprelu": JUMPRELU,
    "gated": GATED,
    "multi_topk": TOPK,
    "matryoshka": JUMPRELU,
    "relu_unit": RELU,
    "p_anneal": RELU,
    "identity": IDENTITY,
}
"""What each architecture does at inference; batch-wise selection has become a threshold by then."""


def nonlinearity(architecture: str) -> Nonlinearity:
    """The inference nonlinearity of an architecture."""
    if architecture not in NONLINEARITIES:
        raise unknown("architecture", architecture, NONLINEARITIES)
    return NONLINEARITIES[architecture]

"""Every architecture by its name in configs and files."""

from __future__ import annotations

from sae.activation_functions import ActivationFunction
from sae.architectures.base import Architecture
from sae.architectures.batchtopk import BatchTopK
from sae.architectures.gated import Gated
from sae.architectures.identity import Identity
from sae.architectures.jumprelu import JumpReLU
from sae.architectures.matryoshka import Matryoshka
from sae.architectures.p_anneal import PAnneal
from sae.architectures.relu import ReLU, ReLUUnit
from sae.architectures.topk import MultiTopK, TopK
from sae.errors import unknown

ARCHITECTURES: dict[str, Architecture] = {
    kind.name: kind()
    for kind in (TopK, ReLU, BatchTopK, JumpReLU, Gated, MultiTopK, Matryoshka, ReLUUnit, PAnneal, Identity)
}


def architecture(name: str) -> Architecture:
    """The architecture of this name."""
    if name not in ARCHITECTURES:
        raise unknown("architecture", name, ARCHITECTURES)
    return ARCHITECTURES[name]


def nonlinearity(name: str) -> ActivationFunction:
    """The activation function, at inference, of the architecture of this name."""
    return architecture(name).nonlinearity

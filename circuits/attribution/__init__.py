"""Node effects: one interface over all methods.

`attribute` computes, for one batch of prompts, the sparse effects of every site's features and errors; gradient
methods also return the gradient in model space that edges need.
"""

from circuits.attribution.activations import ActivationPair, capture_activations
from circuits.attribution.effects import SiteEffects
from circuits.attribution.feature_effects import EdgeInputs, contract_gradient
from circuits.attribution.node_effects import (
    GRADIENT_AT_CLEAN,
    METHOD_NAMES,
    Attribution,
    attribute,
    attribute_batches,
)
from circuits.options import METHODS

__all__ = [
    "GRADIENT_AT_CLEAN", "METHODS", "METHOD_NAMES", "ActivationPair", "Attribution", "EdgeInputs", "SiteEffects",
    "attribute", "attribute_batches", "capture_activations", "contract_gradient",
]  # fmt: skip

"""Node effects: one interface over all methods.

`attribute` computes, for one batch of prompts, the sparse effects of every site's features and errors; gradient
methods also return the gradient in model space that edges need.
"""

from circuits.attribution.attribute import METHOD_NAMES, METHODS, Attribution, attribute
from circuits.attribution.effects import SiteEffects, contract_gradient
from circuits.attribution.states import States, capture_states

__all__ = [
    "METHODS",
    "METHOD_NAMES",
    "Attribution",
    "SiteEffects",
    "States",
    "attribute",
    "capture_states",
    "contract_gradient",
]

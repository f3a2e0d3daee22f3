"""Describe the features of a circuit, so that drawings show words in place of numbers, and colours by class."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from circuits.circuit import Circuit
from circuits.discovery.activity import mean_activations
from circuits.prompts.dataset import PromptSet
from sae.features.contexts import top_contexts


def describe_features(
    circuit: Circuit, texts: Iterable[str] | None = None, *, prompts: PromptSet | None = None
) -> dict[str, dict[str, Any]]:
    """Describe the features with edges, for the circuit's drawings, tables and pages.

    Args:
        circuit: The circuit; the descriptions are kept in `circuit.features`.
        texts: Texts whose strongest tokens and contexts describe a feature; the prompts by default.
        prompts: Prompts whose cases and spans a feature is on for; those of the circuit by default.

    Returns:
        Name of a feature, `resid_3/120` -> its top tokens, contexts, logits that it raises and lowers, and mean
        activation by case and span, as plain JSON.

    Raises:
        UserError: For a circuit from disk whose model, SAEs or prompts are gone.
    """
    model, saes, prompts = circuit.model, circuit.saes, prompts or circuit.prompts
    features = circuit.features_with_edges()
    by_case = mean_activations(model, saes, prompts, {site: torch.tensor(index) for site, index in features.items()})
    for (site, feature), summary in top_contexts(model, saes, texts or prompts.texts, features).items():
        name = f"{site.name}/{feature}"
        about = {key: value for key, value in summary.to_dict().items() if key not in ("site", "index")}
        circuit.features[name] = about | {"by_case": by_case[name]}
    return circuit.features

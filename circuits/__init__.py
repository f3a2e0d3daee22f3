"""From prompts to a sparse feature circuit, and from the circuit back to the model's behaviour.

    from circuits import ablate, describe_features, discover, faithfulness, load_prompts

    pairs, held_out = load_prompts("train.jsonl", model), load_prompts("test.jsonl", model)
    circuit = discover(model, saes, pairs)
    describe_features(circuit)
    circuit.plot("circuit.svg")
    faithfulness(circuit, held_out).to_frame()
    ablate(circuit.strongest_features(10), held_out)

Names are imported when they are first used: `import circuits` imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from circuits.behaviours.find import find_behaviours
    from circuits.behaviours.options import BehaviourSearchOptions
    from circuits.benchmark.options import SuiteOptions
    from circuits.benchmark.suite import evaluate_suite
    from circuits.circuit import Circuit
    from circuits.comparison.circuits import compare_circuits
    from circuits.comparison.compare import compare_methods
    from circuits.debiasing.options import ShiftOptions
    from circuits.debiasing.shift import shift
    from circuits.debiasing.targeted import targeted_perturbation
    from circuits.discovery.attention.head_loadings import head_loadings
    from circuits.discovery.attention.qk import qk_attribution
    from circuits.discovery.description import describe_features
    from circuits.discovery.discover import discover
    from circuits.editing.applied import edited
    from circuits.editing.declaration import Edit, load_edits, save_edits
    from circuits.editing.edit import ablate, steer
    from circuits.faithfulness.edge_mask import learn_edge_mask
    from circuits.faithfulness.learned_mask import learn_mask
    from circuits.faithfulness.nodes import faithfulness
    from circuits.options import DiscoverOptions
    from circuits.prompts.dataset import PromptSet, load_prompts
    from circuits.uncertainty.verification import verify
    from circuits.validity.validate import validate

_MODULES = {
    "discovery.attention.head_loadings": ("head_loadings",),
    "discovery.attention.qk": ("qk_attribution",),
    "behaviours.find": ("find_behaviours",),
    "behaviours.options": ("BehaviourSearchOptions",),
    "benchmark.options": ("SuiteOptions",),
    "benchmark.suite": ("evaluate_suite",),
    "circuit": ("Circuit",),
    "comparison.circuits": ("compare_circuits",),
    "comparison.compare": ("compare_methods",),
    "discovery.description": ("describe_features",),
    "discovery.discover": ("discover",),
    "editing.applied": ("edited",),
    "editing.declaration": ("Edit", "load_edits", "save_edits"),
    "editing.edit": ("ablate", "steer"),
    "faithfulness.edge_mask": ("learn_edge_mask",),
    "faithfulness.learned_mask": ("learn_mask",),
    "faithfulness.nodes": ("faithfulness",),
    "options": ("DiscoverOptions",),
    "prompts.dataset": ("PromptSet", "load_prompts"),
    "debiasing.options": ("ShiftOptions",),
    "debiasing.shift": ("shift",),
    "debiasing.targeted": ("targeted_perturbation",),
    "uncertainty.verification": ("verify",),
    "validity.validate": ("validate",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "BehaviourSearchOptions", "Circuit", "DiscoverOptions", "Edit", "PromptSet", "ShiftOptions", "SuiteOptions",
    "ablate", "compare_circuits", "compare_methods", "describe_features", "discover", "edited", "evaluate_suite",
    "faithfulness", "find_behaviours", "head_loadings", "learn_edge_mask", "learn_mask", "load_edits", "load_prompts",
    "qk_attribution", "save_edits", "shift", "steer", "targeted_perturbation", "validate", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

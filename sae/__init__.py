"""From text to feature dictionaries: sparse autoencoders (SAEs) at the sites of a language model.

    from sae import evaluate_saes, load_model, load_saes, train_saes

    model = load_model("EleutherAI/pythia-70m-deduped")
    saes = train_saes(model, "text.txt", out="runs/pythia")     # or load_saes("runs/pythia")
    evaluate_saes(model, saes, "held_out.txt")

Names are imported when they are first used: `import sae` imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae.autoencoder import SAEConfig, SparseAutoencoder
    from sae.data.text import TextSource
    from sae.errors import UserError
    from sae.evaluation.evaluate import evaluate_saes
    from sae.evaluation.results import Evaluation
    from sae.features.contexts import FeatureSummaries, FeatureSummary, top_contexts
    from sae.features.matching import Match, match_by_activation, match_features
    from sae.features.options import FeaturePageOptions
    from sae.features.page import FeaturePage, FeaturePages
    from sae.features.pages import feature_pages
    from sae.formats import load_sae, save_sae
    from sae.model.language_model import LanguageModel
    from sae.model.load import load_model
    from sae.model.sites import Site
    from sae.saes import SAEs, load_saes
    from sae.training.config import FinetuneConfig, TrainConfig
    from sae.training.finetuning import finetune_saes
    from sae.training.train import train_saes

_MODULES = {
    "autoencoder": ("SAEConfig", "SparseAutoencoder"),
    "data.text": ("TextSource",),
    "errors": ("UserError",),
    "evaluation.evaluate": ("evaluate_saes",),
    "evaluation.results": ("Evaluation",),
    "features.contexts": ("FeatureSummaries", "FeatureSummary", "top_contexts"),
    "features.matching": ("Match", "match_by_activation", "match_features"),
    "features.options": ("FeaturePageOptions",),
    "features.page": ("FeaturePage", "FeaturePages"),
    "features.pages": ("feature_pages",),
    "formats": ("load_sae", "save_sae"),
    "model.language_model": ("LanguageModel",),
    "model.load": ("load_model",),
    "model.sites": ("Site",),
    "saes": ("SAEs", "load_saes"),
    "training.config": ("FinetuneConfig", "TrainConfig"),
    "training.finetuning": ("finetune_saes",),
    "training.train": ("train_saes",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Evaluation", "FeaturePage", "FeaturePageOptions", "FeaturePages", "FeatureSummaries", "FeatureSummary",
    "FinetuneConfig", "LanguageModel", "Match", "SAEConfig", "SAEs", "Site", "SparseAutoencoder", "TextSource",
    "TrainConfig", "UserError", "evaluate_saes", "feature_pages", "finetune_saes", "load_model", "load_sae",
    "load_saes", "match_by_activation", "match_features", "save_sae", "top_contexts", "train_saes",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

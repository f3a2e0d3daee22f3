"""The real model of two stories, stories260K (`karpathy/tinyllamas`): 5 layers, trained on TinyStories.

It is not part of the repository: the stories look for it in `../shared` beside the clone, and say so where it is not.
"""

from __future__ import annotations

from pathlib import Path

from sae import TrainConfig, load_model, load_saes, train_saes
from sae.model.language_model import LanguageModel
from sae.saes import SAEs

SHARED = Path(__file__).resolve().parents[2] / "shared"
MODEL = SHARED / "models" / "tinystories-260k"
TRAIN_TEXT = SHARED / "data" / "tinystories" / "train.jsonl"
VALID_TEXT = SHARED / "data" / "tinystories" / "valid.jsonl"
PRONOUNS = SHARED / "data" / "pronoun_gender"


def is_here() -> bool:
    """Whether model, text and prompts are there; prints what is missing otherwise."""
    missing = [path for path in (MODEL, TRAIN_TEXT, VALID_TEXT, PRONOUNS) if not path.exists()]
    if missing:
        print(f"skipped: this story needs a model that is not part of the repository ({missing[0]} is missing)")
    return not missing


def open_model(out: Path, saes: Path | None, tokens: int) -> tuple[LanguageModel, SAEs]:
    """The model, and autoencoders of its residual stream: those of a run folder, or trained into `out`."""
    model = load_model(str(MODEL))
    config = TrainConfig(features=256, k=12, tokens=tokens)
    return model, load_saes(saes) if saes else train_saes(model, TRAIN_TEXT, config=config, sites="resid", out=out)

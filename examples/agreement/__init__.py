"""A small language model of subject–verb agreement, with its prompts and text: everything `sfc demo` needs."""

from pathlib import Path

FOLDER = Path(__file__).parent
MODEL = FOLDER / "model"
PROMPT_SETS = ("simple", "nounpp", "rc", "within_rc")
SPLITS = ("train", "test")


def prompts(name: str, split: str) -> Path:
    """The JSON-lines file of a prompt set ("simple", "nounpp", "rc", "within_rc"), split "train" or "test"."""
    if name not in PROMPT_SETS or split not in SPLITS:
        raise ValueError(f"no prompts {name!r}, {split!r}: sets are {PROMPT_SETS}, splits {SPLITS}")
    return FOLDER / "prompts" / name / f"{split}.jsonl"


def text(split: str) -> Path:
    """The text file, one document a line, split "train" or "valid"."""
    if split not in ("train", "valid"):
        raise ValueError(f"no text {split!r}: splits are 'train' and 'valid'")
    return FOLDER / "text" / f"{split}.txt"

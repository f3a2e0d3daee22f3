"""Writes text for training and validating SAEs, one document a line: `python -m examples.agreement.make_text`.

Its seeds are not those of the model's training stream, and no validation document is also a training document.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import tyro

from examples.agreement import FOLDER
from examples.agreement.grammar import documents

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextConfig:
    """How much text to write, and where."""

    out: Path = FOLDER / "text"
    """folder of the files"""
    train: int = 9000
    """documents"""
    valid: int = 700
    """documents"""
    seed: int = 10_000_019
    """of the training text; the next number is that of the validation text"""


def make_text(config: TextConfig) -> dict[str, list[str]]:
    """Return distinct documents, by split."""
    train = dict.fromkeys(documents(config.train, seed=config.seed))
    valid = dict.fromkeys(line for line in documents(config.valid, seed=config.seed + 1) if line not in train)
    return {"train": list(train), "valid": list(valid)}


def main(config: TextConfig) -> None:
    config.out.mkdir(parents=True, exist_ok=True)
    for split, lines in make_text(config).items():
        path = config.out / f"{split}.txt"
        path.write_text("".join(line + "\n" for line in lines))
        log.info("%s: %d documents, %d bytes", path, len(lines), path.stat().st_size)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(tyro.cli(TextConfig, description=__doc__))

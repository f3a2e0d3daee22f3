"""How often a model prefers the right verb form on the prompt sets: `python -m examples.agreement.evaluate`.

A pair is right when logit(clean answer) > logit(patch answer) after the clean prompt. Both directions of a minimal
pair are in the files, so a model that always says the same form gets a half.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from examples.agreement import MODEL, PROMPT_SETS, prompts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Accuracy:
    """How a model does on one prompt file."""

    accuracy: float
    """share of pairs with the right form ahead"""
    logit_difference: float
    """mean of logit(clean answer) − logit(patch answer)"""
    by_case: dict[str, float]
    """accuracy by case, e.g. "singular_plural": a singular subject and a plural noun near it"""


def load(folder: Path = MODEL) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The bundled model, or another one of the same tokenizer."""
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def answer_id(tokenizer: PreTrainedTokenizerBase, answer: str) -> int:
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(f"answer {answer!r} is {len(ids)} tokens: one is needed")
    return ids[0]


@torch.no_grad()
def logit_differences(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[dict[str, str]]
) -> torch.Tensor:
    """logit(clean answer) − logit(patch answer) at the end of each clean prompt [B]."""
    rows = [tokenizer(pair["clean_prefix"])["input_ids"] for pair in pairs]
    last = torch.tensor([len(row) - 1 for row in rows])
    longest = int(last.max()) + 1
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
    logits = model(input_ids=ids).logits[torch.arange(len(rows)), last]  # [B, V]; padding is on the right
    clean, patch = (
        torch.tensor([answer_id(tokenizer, pair[key]) for pair in pairs]) for key in ("clean_answer", "patch_answer")
    )
    return (logits.gather(1, clean[:, None]) - logits.gather(1, patch[:, None]))[:, 0]


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> Accuracy:
    pairs = [json.loads(line) for line in path.read_text().splitlines()]
    difference = logit_differences(model, tokenizer, pairs)
    cases: dict[str, list[bool]] = defaultdict(list)
    for pair, value in zip(pairs, difference.tolist(), strict=True):
        cases[pair["case"]].append(value > 0)
    return Accuracy(
        accuracy=(difference > 0).double().mean().item(),
        logit_difference=difference.mean().item(),
        by_case={case: sum(right) / len(right) for case, right in sorted(cases.items())},
    )


def main(model: Path = MODEL, split: str = "test") -> None:
    network, tokenizer = load(model)
    for name in PROMPT_SETS:
        result = evaluate(network, tokenizer, prompts(name, split))
        cases = "  ".join(f"{case} {share:.3f}" for case, share in result.by_case.items())
        line = f"{name:10} accuracy {result.accuracy:.3f}  logit difference {result.logit_difference:5.2f}   {cases}"
        log.info("%s", line)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    tyro.cli(main, description=__doc__)

"""The contexts that a model predicts well (Michaud et al. 2023, "The quantization model of neural scaling").

1. Every document is read from its start, up to a length. A context is a document up to some token, its answer the token
   that follows; its surprise is -log p(answer | context) in nats.
2. Of the contexts below a threshold some are drawn at random, without replacement, and stay in the order of the text.
3. They become prompts without a patch side, so that everything that takes prompts takes them. Contexts whose text does
   not give the same tokens again are left out.

Legend: B documents, S positions, V vocabulary, N contexts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuits.behaviours.options import BehaviourSearchOptions
from circuits.prompts.alignment import length_keys
from circuits.prompts.dataset import PromptSet
from sae.data.batches import LOGIT_BYTES, context_of, token_batches
from sae.errors import UserError
from sae.model.language_model import LanguageModel
from sae.model.tokens import Tokens


@dataclass(frozen=True)
class Contexts:
    """N contexts that the model predicts well."""

    prompts: PromptSet
    """As prompts without a patch side, whose clean answer is the true next token."""
    document: list[int]
    """Number of the text each is from, among those that are not blank."""
    position: list[int]
    """Index of the answer in its document's tokens."""
    surprise: list[float]
    """-log p of the answer, in nats."""
    n_tokens: int
    """Next tokens that were looked at."""
    n_below: int
    """How many of these were predicted well enough."""

    def __len__(self) -> int:
        return len(self.document)

    def rows(self, model: LanguageModel, chosen: Iterable[int]) -> list[dict[str, Any]]:
        """Some contexts as the lines of a prompt file."""
        answers = self.prompts.clean_answers.tolist()
        strings = model.token_strings(answers)
        return [{"clean_prefix": self.prompts.texts[i], "clean_answer": strings[i]} for i in chosen]


def read_contexts(model: LanguageModel, texts: str | Path | Iterable[str], options: BehaviourSearchOptions) -> Contexts:
    """The contexts of a text that the model predicts well; `UserError` where there are none."""
    length = context_of(model, options.context_length)
    rows = max(1, min(32, LOGIT_BYTES // (4 * length * model.vocab_size)))
    document, position, surprise, prefixes = [], [], [], []
    n_documents = n_tokens = 0
    for tokens in token_batches(model, texts, max_tokens=options.tokens, batch_size=rows, context=length):
        values, counted = next_token_surprise(model, tokens)
        n_tokens += int(counted.sum())
        for row, column in (counted & (values < options.surprise)).nonzero().tolist():
            start = tokens.n_positions - int(tokens.lengths[row])
            document.append(n_documents + row)
            position.append(column + 1 - start)
            surprise.append(values[row, column].item())
            prefixes.append(tokens.input_ids[row, start : column + 2].tolist())
        n_documents += len(tokens)
    if not prefixes:
        raise UserError(
            f"none of {n_tokens} next tokens has a -log p below {options.surprise:g}: give a larger surprise, or more "
            "text"
        )
    generator = torch.Generator().manual_seed(options.seed)
    drawn = torch.randperm(len(prefixes), generator=generator)[: options.contexts].sort().values.tolist()
    same = [i for i, same in zip(drawn, _repeat(model, [prefixes[i] for i in drawn]), strict=True) if same]
    if not same:
        raise UserError("no context gives the same tokens when its text is read again: is the tokenizer the model's?")
    return Contexts(
        prompts=_prompts(model, [prefixes[i] for i in same]),
        document=[document[i] for i in same],
        position=[position[i] for i in same],
        surprise=[surprise[i] for i in same],
        n_tokens=n_tokens,
        n_below=len(prefixes),
    )


def _prompts(model: LanguageModel, prefixes: list[list[int]]) -> PromptSet:
    """Contexts with their answer at the end, as prompts without a patch side."""
    clean = Tokens.from_rows([ids[:-1] for ids in prefixes], pad_id=model.text_coder.pad_id)
    prompts = PromptSet(
        clean=clean,
        patch=None,
        clean_answers=torch.tensor([ids[-1] for ids in prefixes]),
        patch_answers=None,
        cases=[""] * len(prefixes),
        templates=length_keys(clean),
        texts=[_text(model, ids[:-1]) for ids in prefixes],
    )
    return prompts.to(model.device)


@torch.no_grad()
def next_token_surprise(model: LanguageModel, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """-log p of every next token [B, S - 1], and whether it counts: not padding, nor special, nor the first."""
    ids = tokens.input_ids
    log_p = model.run(tokens.to(model.device)).logits[:, :-1].float().log_softmax(-1)
    values = -log_p.gather(-1, ids[:, 1:, None].to(log_p.device))[..., 0].cpu()
    special = torch.isin(ids, torch.tensor(sorted(model.special_ids), dtype=torch.long, device=ids.device))
    real = tokens.attention_mask.bool() & ~special
    return values, (real[:, 1:] & (real.cumsum(1)[:, 1:] > 1)).cpu()


def _repeat(model: LanguageModel, prefixes: list[list[int]]) -> list[bool]:
    """Whether text and answer of each context give the same tokens when they are read again."""
    texts = [_text(model, ids[:-1]) for ids in prefixes]
    answers = model.token_strings([ids[-1] for ids in prefixes])
    again = model.text_coder.prompt_ids(texts)
    follow = model.text_coder.continuations(texts, answers)
    return [prompt == ids[:-1] and more == ids[-1:] for ids, prompt, more in zip(prefixes, again, follow, strict=True)]


def _text(model: LanguageModel, ids: list[int]) -> str:
    """The text of some tokens, special ones left out."""
    return "".join(model.token_strings([id for id in ids if id not in model.special_ids]))

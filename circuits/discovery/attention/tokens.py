"""The token of every prompt that a person means: a span, an index, the last one, or a word.

`subject`  the last token of the span of that name, which has read the whole of it
`3`, `-1`  the token of that index, from 0, or from the end
`last`     the last token, where no span is called so
`cats`     the one token of the prompt that reads so, white space aside
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from circuits.prompts.dataset import PromptSet
from sae.errors import UserError, unknown
from sae.model.language_model import LanguageModel


def token_columns(model: LanguageModel, prompts: PromptSet, name: str) -> Tensor:
    """[B] int64 column of the token in each padded prompt, -1 where a prompt has none. UserError where none has it."""
    n_positions = prompts.clean.n_positions
    columns = torch.arange(n_positions, device=prompts.clean.input_ids.device)
    if name in prompts.spans:
        inside = prompts.positions(prompts.spans) == prompts.spans.index(name)
        return torch.where(inside, columns, -1).amax(-1)
    if re.fullmatch(r"-?\d{1,9}", name):
        index, lengths = int(name), prompts.clean.lengths.to(columns.device)
        column = n_positions + index if index < 0 else n_positions - lengths + index
        inside = (-lengths <= index) & (index < lengths)
        chosen = torch.where(inside, column, -1)
    elif name == "last":
        return torch.full((len(prompts),), n_positions - 1, device=columns.device)
    else:
        chosen = _columns_of_word(model, prompts, name).to(columns.device)
    if not bool((chosen >= 0).any()):
        names = [*prompts.spans, *(() if "last" in prompts.spans else ("last",)), "an index such as 2 or -1"]
        raise unknown("token", name, [*names, "a word that stands once in a prompt"])
    return chosen


def _columns_of_word(model: LanguageModel, prompts: PromptSet, word: str) -> Tensor:
    columns = []
    for ids, mask in zip(prompts.clean.input_ids, prompts.clean.attention_mask.tolist(), strict=True):
        strings = [text.strip() if real else None for text, real in zip(model.token_strings(ids), mask, strict=True)]
        columns.append(strings.index(word.strip()) if strings.count(word.strip()) == 1 else -1)
    return torch.tensor(columns)


def check_order(query: Tensor, key: Tensor, names: tuple[str, str]) -> None:
    """UserError where the query stands before the key in a prompt that has both: attention looks back alone."""
    if bool(((query >= 0) & (key > query)).any()):
        raise UserError(f"the key {names[1]!r} stands behind the query {names[0]!r}: attention looks back alone")

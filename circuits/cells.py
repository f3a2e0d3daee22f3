"""Which tokens of different prompts are the same place, so that a mean over them means something.

Every token of a prompt lies in a cell; tokens of equal cell are averaged together.

- By template: (template, position). Prompts of one template have equal length and align position by position.
- Pooled: one cell for all tokens of all prompts. What all prompts share at a position (the determiner, the first token)
  is then taken away along with what tells them apart, so the model without any node is no longer the model on another
  prompt but a broken one, and faithfulness says little. It is offered for comparison and never the default.

Shapes: B prompts, S positions.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from circuits.prompts import PromptSet


class Cells:
    """The cells of some reference prompts, numbered from 0."""

    def __init__(self, reference: PromptSet, *, pooled: bool = False) -> None:
        self.pooled = pooled
        self._number: dict[Hashable, int] = {}
        for keys in self._keys(reference):
            for key in keys:
                self._number.setdefault(key, len(self._number))

    def __len__(self) -> int:
        return len(self._number)

    def covers(self, prompts: PromptSet) -> Tensor:
        """[B] bool: whether every token of a prompt lies in a cell of the reference."""
        return torch.tensor([all(key in self._number for key in keys) for keys in self._keys(prompts)])

    def of(self, prompts: PromptSet) -> Tensor:
        """[B, S] int64 the number of every token's cell; -1 at padding and in cells the reference does not have."""
        n_positions = prompts.clean.n_positions
        rows = [[self._number.get(key, -1) for key in keys] for keys in self._keys(prompts)]
        table = [[-1] * (n_positions - len(row)) + row for row in rows]
        return torch.tensor(table, device=prompts.clean.input_ids.device)

    def _keys(self, prompts: PromptSet) -> list[list[Hashable]]:
        lengths = prompts.clean.lengths.tolist()
        if self.pooled:
            return [[None] * length for length in lengths]
        rows = zip(prompts.templates, lengths, strict=True)
        return [[(template, position) for position in range(length)] for template, length in rows]

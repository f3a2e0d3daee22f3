"""Which tokens of different prompts are the same place, so that a mean over them means something.

Every token of a prompt lies in a cell; tokens of equal cell are averaged together.

- By template: (template, position). Prompts of one template have equal length and align position by position.
- By span, where prompts have named spans: (frame, span, the span before it, place in the span). The frame is the
  `template` field of the file. Places are counted from the end of the span, where most of a word's tokens have been
  read, in the first span of a prompt from its beginning. Prompts of different lengths so share their means; a span
  longer than all in the reference takes the farthest place known for the tokens beyond.
- Pooled: one cell for all tokens of all prompts. What all prompts share at a position (the determiner, the first token)
  is then taken away along with what tells them apart, so the model without any node is no longer the model on another
  prompt but a broken one, and faithfulness says little. It is offered for comparison and never the default.

Shapes: B prompts, S positions.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from circuits.prompts.alignment import frame_of
from circuits.prompts.dataset import PromptSet

Cell = tuple[Any, ...]
"""(template, position); by span (frame, span, span before, place); pooled ()."""


class PositionGroups:
    """The cells of some reference prompts, numbered from 0."""

    def __init__(self, reference: PromptSet, *, pooled: bool = False) -> None:
        self.pooled = pooled
        self._number: dict[Cell, int] = {}
        for keys in self._keys(reference):
            for key in keys:
                self._number.setdefault(key, len(self._number))

    def __len__(self) -> int:
        return len(self._number)

    def covers(self, prompts: PromptSet) -> Tensor:
        """[B] bool: whether every token of a prompt lies in a cell of the reference."""
        return torch.tensor([all(self._find(key) >= 0 for key in keys) for keys in self._keys(prompts)])

    def of(self, prompts: PromptSet) -> Tensor:
        """[B, S] int64 the number of every token's cell; -1 at padding and in cells the reference does not have."""
        n_positions = prompts.clean.n_positions
        rows = [[self._find(key) for key in keys] for keys in self._keys(prompts)]
        table = [[-1] * (n_positions - len(row)) + row for row in rows]
        return torch.tensor(table, device=prompts.clean.input_ids.device)

    def _find(self, key: Cell) -> int:
        """Number of the cell, or of the nearest known place of its span; -1 where there is none."""
        number = self._number.get(key, -1)
        while number < 0 and len(key) == 4 and key[3] > 0:
            key = (*key[:3], key[3] - 1)
            number = self._number.get(key, -1)
        return number

    def _keys(self, prompts: PromptSet) -> list[list[Cell]]:
        lengths = prompts.clean.lengths.tolist()
        if self.pooled:
            return [[()] * length for length in lengths]
        if prompts.template_rule == "spans" and prompts.roles is not None:
            frames = map(frame_of, prompts.templates)
            return [_span_cells(frame, row) for frame, row in zip(frames, _names(prompts), strict=True)]
        rows = zip(prompts.templates, lengths, strict=True)
        return [[(template, position) for position in range(length)] for template, length in rows]


def _names(prompts: PromptSet) -> list[list[str]]:
    """The span of every token, by name, without padding."""
    assert prompts.roles is not None
    return [[prompts.spans[number] for number in row if number >= 0] for row in prompts.roles.tolist()]


def _span_cells(frame: str, names: list[str]) -> list[Cell]:
    """The cell of every token of one prompt."""
    cells: list[Cell] = []
    before = ""
    for name, run in groupby(names):
        length = len(list(run))
        places = range(length) if not before else range(length - 1, -1, -1)
        cells += [(frame, name, before, place) for place in places]
        before = name
    return cells

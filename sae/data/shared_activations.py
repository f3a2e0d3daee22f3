"""Activations from forward passes that several processes share.

1. The first process reads the text, plans the forward passes that one process would make, and sends their tokens to
   the others: a position in the text means the same however many there are.
2. In turns, each runs the model on one batch of contexts, and sends its rows on: to each process those of the sites
   that it trains (`by_site`), or the rows, at all sites, of its share of every training step (`by_row`).
3. A row lies in every buffer where it would lie in that of one process; rows and sites of others are left as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from sae._run.processes import Processes
from sae.data.activations import ModelActivations
from sae.model.sites import Site
from sae.model.tokens import Tokens

Receivers = Callable[[int], Tensor]
"""From the number n of rows of a fill to the process [n] that each is for, -1 for none."""


class SharedActivations(ModelActivations):
    """Activations as `ModelActivations`, with the forward passes of a fill shared out."""

    def __init__(self, alone: ModelActivations, processes: Processes, shares: Sequence[Collection[Site]]) -> None:
        """alone: as one process would read; shares: the sites whose rows each process needs."""
        super().__init__(alone.model, alone.stream, alone.sites, exclude_special=alone.exclude_special)
        self.processes, self.shares = processes, [sorted(share) for share in shares]
        self.receivers: Receivers | None = None

    def by_site(self) -> None:
        """From now on send each process all rows of its sites."""
        self.receivers = None

    def by_row(self, receivers: Receivers) -> None:
        """From now on send each process its rows, at all sites."""
        self.receivers = receivers

    def fill(self, buffer: dict[Site, Tensor], ids: Tensor | None = None, *, one_epoch: bool = False) -> int:
        """Fill the buffers as `ModelActivations` does, with what is for this process alone."""
        assert ids is None and not one_epoch
        rank, size = self.processes.rank, self.processes.size
        planned = self._plan(len(next(iter(buffer.values()))))
        ends = [0, *accumulate(int(keep.sum()) for _, keep in planned)]
        rows = [torch.arange(start, end) for start, end in pairwise(ends)]
        receivers = None if self.receivers is None else self.receivers(ends[-1])
        for first in range(0, len(planned), size):
            mine = first + rank
            activations = self.forward(*planned[mine]) if mine < len(planned) else {}
            self._exchange(activations, rows[first : first + size], receivers, buffer)
        return ends[-1]

    def _plan(self, capacity: int) -> list[tuple[Tokens, Tensor]]:
        """The batches of a fill, and the position in the text after them, as the first process reads them."""
        planned, state, length = self.processes.by_first(
            lambda: (list(self.batches(capacity)), self.stream.state, self.stream.length)
        )
        self.stream.state, self.stream.length = state, length
        return planned

    def _exchange(
        self,
        activations: Mapping[Site, Tensor],
        rows: Sequence[Tensor],
        receivers: Tensor | None,
        buffer: Mapping[Site, Tensor],
    ) -> None:
        """Send the rows of this process's batch on, and put those that arrive into the buffer; rows: of each process's
        batch, numbered within the fill.
        """
        rank, size = self.processes.rank, self.processes.size
        for turn in range(max(len(self._sites_for(process)) for process in range(size))):
            sent, sent_sizes = [torch.empty(0, device=self.model.device)], [0] * size
            for process in range(size if activations else 0):
                for site in self._sites_for(process)[turn : turn + 1]:
                    wanted = self._rows_for(process, rows[rank], receivers) - rows[rank][:1]
                    sent.append(activations[site][wanted.to(self.model.device)].float().flatten())
                    sent_sizes[process] = sent[-1].numel()
            sites = self._sites_for(rank)[turn : turn + 1]
            arriving = [self._rows_for(rank, numbers, receivers) for numbers in rows] if sites else []
            sizes = [len(numbers) * self.widths[sites[0]] for numbers in arriving]
            sizes += [0] * (size - len(sizes))
            blocks = self.processes.exchange(torch.cat(sent), sent_sizes, sizes).split(sizes)
            for numbers, block in zip(arriving, blocks, strict=False):
                buffer[sites[0]][numbers.to(self.model.device)] = block.view(len(numbers), -1)

    def _sites_for(self, process: int) -> Sequence[Site]:
        return self.shares[process] if self.receivers is None else self.sites

    @staticmethod
    def _rows_for(process: int, rows: Tensor, receivers: Tensor | None) -> Tensor:
        return rows if receivers is None else rows[receivers[rows] == process]

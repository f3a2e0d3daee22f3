"""The features of an autoencoder shared out over processes, each with a block of them; exact, and cheap to talk about.

1. Every process has the same tokens, and computes the pre-activations z of its features alone.
2. The k largest of a token are among the k largest of each process: those are gathered, k numbers a token and process,
   and each keeps what is its own of the k largest of them all, as in the code of Gao et al. 2024 and in sparsify.
3. x̂ and penalties are sums over features, so over processes: `over_all_features` adds them up. The loss is then the
   same for all, and its gradient at a process's part of a sum is the one at the sum: it is passed on as it is.

N tokens, d width, n features of one process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sae._run.processes import Processes


@dataclass(frozen=True)
class FeatureShards:
    """Equal blocks of features, in the order of the processes that have them."""

    processes: Processes
    """The processes that share them."""

    def mine(self, x: Tensor) -> Tensor:
        """This process's block of rows of x [F, ...]."""
        return x.chunk(self.processes.size)[self.processes.rank]

    def over_all_features(self, x: Tensor) -> Tensor:
        """The sum of the tensors of all processes; its gradient is that of each."""
        return _Sum.apply(x, self.processes)

    def among_largest(self, value: Tensor, k: int) -> Tensor:
        """Which of at most k values of each token, [N, m], are among the k largest of all processes, [N, m]."""
        m = value.shape[1]
        padded = torch.nn.functional.pad(value, (0, k - m), value=-torch.inf)
        candidates = torch.cat(self.processes.gathered_tensors(padded), 1)  # the same bits, and so choice, everywhere
        chosen = torch.zeros(candidates.shape, dtype=torch.bool, device=value.device)
        chosen.scatter_(1, candidates.topk(k, dim=1, sorted=False).indices, True)
        return chosen[:, self.processes.rank * k :][:, :m]


class Sharded:
    """Activations of features, of which other processes may have more."""

    shards: FeatureShards | None = None
    """How features are shared out; None where all are here."""

    def over_all_features(self, x: Tensor) -> Tensor:
        """A sum over all features from that over the features here."""
        return x if self.shards is None else self.shards.over_all_features(x)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, processes: Processes) -> Tensor:
        return processes.sum_(x.clone())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return g, None

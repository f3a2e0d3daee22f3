"""How much memory tensors take at most while something runs, counted and not guessed from the process.

On CUDA the allocator keeps count. Elsewhere every operation's outputs are watched: a storage counts from the operation
that made it until it is freed. Scratch space inside an operation is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_memory(function: Callable[[], Any], device: torch.device) -> int:
    """Bytes of tensors alive at once while `function` runs, beyond those alive before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with _Watch() as watch:
        function()
    return watch.peak


class _Watch(TorchDispatchMode):
    """Sums the sizes of storages that operations make while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._counted: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            if id(storage) not in inputs:
                self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._counted and self._counted[key]() is storage:
            return
        size = storage.nbytes()

        def freed(_: Any) -> None:
            self.now -= size

        self._counted[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    """What holds the numbers of all tensors among some values: of a sparse one, its indices and entries."""
    for x in tree_leaves(values):
        if isinstance(x, torch.Tensor):
            for dense in (x._indices(), x._values()) if x.is_sparse else (x,):
                yield dense.untyped_storage()

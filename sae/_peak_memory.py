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

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: nothing is compiled here, and to forbid it costs each operation more than to watch it."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._counted: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if new := [storage for storage in _storages(out) if not self._is_counted(storage)]:
            inputs = {id(storage) for storage in _storages((args, kwargs))}  # an output may be a view of one
            for storage in new:
                if id(storage) not in inputs and not self._is_counted(storage):
                    self._count(storage)
        return out

    def _is_counted(self, storage: torch.UntypedStorage) -> bool:
        reference = self._counted.get(id(storage))
        return reference is not None and reference() is storage

    def _count(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()

        def freed(_: Any) -> None:
            self.now -= size

        self._counted[id(storage)] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    """The storages of all tensors in an operation's arguments or results: of a sparse one, its indices and entries."""
    if isinstance(values, torch.Tensor):
        for dense in (values._indices(), values._values()) if values.is_sparse else (values,):
            yield dense.untyped_storage()
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _storages(value)
    elif isinstance(values, dict):
        yield from _storages(tuple(values.values()))

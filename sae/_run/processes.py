"""Several processes of one command, started by torchrun: who writes, who waits, who speaks.

1. torchrun starts N processes with the same words and says in the environment which is which; `launch` calls it for
   `--processes N`. All of them read the same files and make the same plan.
2. `joined` connects them: gloo between CPUs, NCCL between GPUs, of which each process has one. `current` are the
   processes of this command, one alone by default, so that nothing else asks how many there are.
3. The first process alone locks, prints and writes what is of the whole run; `by_first` tells its answer to the others.
4. The first process that fails says why, and all end with its exit status (`failed`). One that was killed closes its
   connections, at which the others end; whoever hangs is waited for `PATIENCE` at most.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from sae.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Value = TypeVar("Value")
PATIENCE = timedelta(hours=1)
"""Longest time that processes wait for one another: more than a batch, a checkpoint or the loading of a model takes."""
KILLED = 128
"""What a shell adds to the number of the signal that ended a process."""
INTERRUPTED = 130
"""Exit status after Ctrl-C."""


@dataclass(frozen=True)
class Processes:
    """The processes of one command, as one of them sees them; by default there is no other."""

    rank: int = 0
    """Number of this process."""
    size: int = 1
    """Processes in all."""
    n_local: int = 1
    """Processes on this machine."""
    store: Any = None
    """torch.distributed's store of small values, which outlives each of them."""

    @property
    def is_first(self) -> bool:
        """Whether this process prints, and writes what is of the whole run."""
        return self.rank == 0

    def by_first(self, function: Callable[[], Value]) -> Value:
        """Call the function in the first process alone, and give its result to all; the others wait for it."""
        answer: list[Any] = [function() if self.is_first else None]
        if self.size > 1:
            from torch import distributed

            with _connected():
                distributed.broadcast_object_list(answer, src=0)
        return answer[0]

    def gathered(self, value: Value) -> list[Value]:
        """The values of all processes, in their order, once all have come here."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            from torch import distributed

            with _connected():
                distributed.all_gather_object(values, value)
        return values

    def sum_(self, x: Tensor) -> Tensor:
        """The sum of the tensors of all processes, in place; the same bits in each of them."""
        if self.size > 1:
            from torch import distributed

            with _connected():
                distributed.all_reduce(x)
        return x

    def gathered_tensors(self, x: Tensor) -> list[Tensor]:
        """The tensors of all processes, of one shape, in their order."""
        if self.size == 1:
            return [x]
        from torch import distributed

        received = [x.new_empty(x.shape) for _ in range(self.size)]
        with _connected():
            distributed.all_gather(received, x)
        return received

    def to_first(self, x: Tensor) -> list[Tensor]:
        """The tensors of all processes, of one shape, in the first of them; nothing in the others."""
        if self.size == 1:
            return [x]
        from torch import distributed

        received = [x.new_empty(x.shape) for _ in range(self.size)] if self.is_first else None
        with _connected():
            distributed.gather(x, received, dst=0)
        return received or []

    def exchange(self, sent: Tensor, sent_sizes: list[int], sizes: list[int]) -> Tensor:
        """Receive from the others, one after another; sent: what goes to each, likewise; sizes: numbers from each."""
        from torch import distributed

        received = sent.new_empty(sum(sizes))
        with _connected():
            distributed.all_to_all_single(received, sent, sizes, sent_sizes)
        return received

    def dealt(self, n: int, name: str) -> Iterator[int]:
        """Numbers below n, each for the process that is the first to ask; name: of this dealing, used once."""
        if self.size == 1:
            yield from range(n)
            return
        while (number := self._next(name)) < n:
            yield number

    def _next(self, name: str) -> int:
        with _connected():
            return int(self.store.add(f"dealt/{name}", 1)) - 1


_current = Processes()


def current() -> Processes:
    """The processes that `joined` connected; this one alone where it did not."""
    return _current


def launched() -> bool:
    """Whether torchrun started this process beside others."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def to_launch(n: int | None) -> int:
    """How many processes are to be started for `--processes`; 0 where they run already, or one is enough.

    Raises UserError where torchrun started another number.
    """
    if not launched():
        return 0 if n in (None, 1) else n
    if n not in (None, int(os.environ["WORLD_SIZE"])):
        raise UserError(f"processes is {n}, and torchrun started {os.environ['WORLD_SIZE']}: leave out --processes")
    return 0


def speaks() -> bool:
    """Whether this process is the first, or alone."""
    return not launched() or os.environ["RANK"] == "0"


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Connect the processes that torchrun started until the block ends; device: the option of that name.

    Raises UserError where there is no GPU for each.
    """
    import torch
    from torch import distributed

    global _current
    on_gpus = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    n_local = int(os.environ["LOCAL_WORLD_SIZE"])
    if on_gpus:
        _take_gpu(device, n_local)
    elif device == "mps" or (device == "auto" and torch.backends.mps.is_available()):
        raise UserError("several processes cannot share Apple's GPU: give --device cpu")
    store, rank, size = _store()
    with _connected():
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpus else "gloo", store=distributed.PrefixStore("group", store), rank=rank,
            world_size=size, timeout=PATIENCE,
        )  # fmt: skip
    _current = Processes(rank, size, n_local, store)
    if rank:
        logging.disable(logging.WARNING)  # the first process says it
    yield _current
    distributed.destroy_process_group()  # not after a failure: `failed` is the first to tell the others
    _current = Processes()
    logging.disable(logging.NOTSET)


def launch(words: Sequence[str], n: int) -> int:
    """Run `sfc` with these words in n processes by torchrun; returns the exit status of the first that failed."""
    import torch
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // n)))
    logging.disable(logging.ERROR)  # of torchrun: each process says what it has to say
    options = ["--standalone", "--nproc-per-node", str(n), "-m", "circuits.cli", *words]
    try:
        torchrun.run(torchrun.parse_args(options))
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        return status if status >= 0 else KILLED - status
    except SignalException:
        return INTERRUPTED
    return 0


def failed(status: int) -> tuple[bool, int]:
    """Whether this process is the first of all to fail, and so says why; and the exit status of the one that is."""
    if not launched():
        return True, status
    try:
        store, rank, _ = _store()
        mine = f"{rank} {status}"
        first = store.compare_set("failed", "", mine).decode()
    except RuntimeError:  # torchrun itself is gone
        return True, status
    return first == mine, int(first.split()[1])


def _store() -> tuple[Any, int, int]:
    """torchrun's store of small values, the number of this process, and how many there are."""
    from torch import distributed

    if _current.store is not None:
        return _current.store, _current.rank, _current.size
    return next(iter(distributed.rendezvous("env://", timeout=PATIENCE)))


def _take_gpu(device: str, n_local: int) -> None:
    import torch

    if device not in ("auto", "cuda"):
        raise UserError(f"device is {device!r}: each of several processes has a GPU of its own: give cuda, or cpu")
    if n_local > torch.cuda.device_count():
        raise UserError(
            f"{n_local} processes and {torch.cuda.device_count()} GPUs on this machine: start as many processes as "
            "there are GPUs, or give --device cpu"
        )
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


@contextmanager
def _connected() -> Iterator[None]:
    """Tell in a sentence that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            "another process of this command has ended, or does not answer, and this one ends too; what was finished "
            "is on disk: go on with --resume and the same options"
        ) from error

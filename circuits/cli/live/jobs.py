"""Experiments on the model, one after the other in a thread of its own, watched and cancelled from other threads.

1. A job is a generator. Between its steps (`yield`) jobs that somebody waits for go first: those that have not begun.
2. Whatever a job runs goes through the model's forward passes: a hook there ends a job that was cancelled, and counts.
3. What a job has to say is a list of events, which any number of readers follow from where they were.
"""

from __future__ import annotations

import itertools
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from graphs.errors import GraphError
from sae.errors import UserError
from sae.model.language_model import LanguageModel

log = logging.getLogger(__name__)

WAITING, REMEMBERED = 20, 100
"""Most jobs that wait, and most that can still be asked for."""
PAUSE = 0.2
"""Seconds between two events of progress."""
ENDS = ("done", "error", "cancelled")
"""Kinds of a job's last event."""

Steps = Callable[["Job"], Iterator[None]]


class Cancelled(UserError):
    """The job was cancelled."""


@dataclass
class Job:
    """An experiment, and what it has said so far."""

    begin: Steps
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    events: list[dict[str, Any]] = field(default_factory=list)
    """Plain JSON, each with its `kind`."""
    cancelled: bool = False
    expected: int = 0
    """About how many forward passes it takes; 0 where nobody knows."""
    passes: int = 0
    """Forward passes so far."""
    _told: float = 0.0

    @property
    def ended(self) -> bool:
        """Whether there will be no more events."""
        return bool(self.events) and self.events[-1]["kind"] in ENDS

    def say(self, kind: str, **data: Any) -> None:
        """Add an event."""
        self.events.append({"kind": kind, **data})

    def check(self) -> None:
        """Raise `Cancelled` if somebody cancelled it."""
        if self.cancelled:
            raise Cancelled("cancelled")

    def step(self) -> None:
        """A forward pass begins."""
        self.check()
        self.passes += 1
        now = time.monotonic()
        if self.expected and now - self._told > PAUSE:
            self._told = now
            self.say("progress", share=min(0.99, self.passes / self.expected))


class Worker:
    """The thread that has the model, and the jobs that wait for it."""

    def __init__(self, model: LanguageModel) -> None:
        self._queue: queue.PriorityQueue[tuple[int, int, Job | None, Iterator[None] | None]] = queue.PriorityQueue()
        self._number = itertools.count()
        self._current: Job | None = None
        self.jobs: dict[str, Job] = {}
        self._hook = model.hf.register_forward_pre_hook(self._forward)
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def submit(self, begin: Steps) -> Job:
        """Let a job wait for its turn. Raises UserError where too many wait already."""
        if self._queue.qsize() >= WAITING:
            raise UserError(f"{WAITING} experiments wait already: let some end, or cancel them")
        job = Job(begin)
        self.jobs[job.id] = job
        for old in [id for id, other in self.jobs.items() if other.ended][:-REMEMBERED]:
            del self.jobs[old]
        self._queue.put((0, next(self._number), job, None))
        return job

    def cancel(self, id: str) -> None:
        """Let a job end before its next forward pass; nothing happens to one that has ended."""
        self.jobs[id].cancelled = True

    def close(self) -> None:
        """Cancel everything and wait for the thread, a while at most."""
        for job in self.jobs.values():
            job.cancelled = True
        self._queue.put((2, next(self._number), None, None))
        self._thread.join(timeout=10)
        self._hook.remove()

    def _forward(self, module: Any, inputs: Any) -> None:
        if self._current is not None and threading.current_thread() is self._thread:
            self._current.step()

    def _run(self) -> None:
        while True:
            _, _, job, steps = self._queue.get()
            if job is None:
                return
            self._current = job
            steps = job.begin(job) if steps is None else steps
            if self._step(job, steps):
                self._queue.put((1, next(self._number), job, steps))
            self._current = None

    def _step(self, job: Job, steps: Iterator[None]) -> bool:
        """Whether the job goes on after its next step."""
        try:
            job.check()
            next(steps)
            return True
        except StopIteration:
            job.say("done")
        except Cancelled:
            job.say("cancelled")
        except (UserError, GraphError) as error:
            job.say("cancelled" if job.cancelled else "error", **({} if job.cancelled else {"message": str(error)}))
        except Exception as error:
            log.exception("an experiment failed")
            job.say("error", message=f"this failed ({type(error).__name__}: {error}); the terminal has more")
        return False

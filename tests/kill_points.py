"""Kills at counted events: a command dies at the same point in every run, however busy the machine is.

    forked_sfc(..., before=Kill("os.rename", r"/shard_00001\\.safetensors$"))

Python tells its audit hooks what it is about to do with files, whoever calls: `open`, `os.mkdir`, `os.rename` (which
`replace` is too), `os.remove`, `os.rmdir`, `os.chmod`, `shutil.rmtree`. SIGKILL comes just before that happens.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Kill:
    """Kills the process that calls it at an event to come."""

    event: str = ""
    """One of CHANGES; any of them where it is empty."""
    path: str = ""
    """A regular expression: what the path must hold that appears, changes or goes."""
    count: int = 1
    """The event's number among those that match."""

    def __call__(self) -> None:
        left, wanted = [self.count], re.compile(self.path)

        def count_down(event: str, arguments: Sequence[Any]) -> None:
            if event not in CHANGES or (self.event and event != self.event):
                return
            if event == "open" and not (arguments[2] or 0) & WRITING:
                return
            path = arguments[1] if event == "os.rename" else arguments[0]
            if not isinstance(path, int) and wanted.search(os.fsdecode(path)):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count_down)


@dataclass(frozen=True)
class KillAfter:
    """Kills the process that calls it after some seconds of wall time, wherever it is then."""

    seconds: float

    def __call__(self) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)

"""One command at a time writes to a folder.

1. A command that makes a run takes the folder for itself (`lock`); a second one ends with a sentence. Commands that add
   a result to a run share it (`lock(..., shared=True)`).
2. The lock is `flock` on the folder: nothing is left on disk, and the system lets go of it when a process dies.
3. Where there is no `flock`, a file `.sfc.lock` with machine and process stands for it; that of a dead process is
   removed.
4. Who has a folder alone removes what killed processes were writing there.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from sae._files import make_folder
from sae._run.contents import clean
from sae._run.processes import current
from sae.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".sfc.lock"
PATIENCE = 0.3
"""Seconds that a command waits for another one that is just beginning."""
_taken = threading.local()


@contextmanager
def lock(folder: str | Path, *, shared: bool = False) -> Iterator[Path]:
    """Have a folder, made where there is none, to write to until the block ends; taken again inside, it stays taken.

    shared: beside others that share it; of a folder that is not there nothing is taken.
    Of several processes of one command the first takes it, for all of them.
    Raises UserError where another process has it.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    if (shared and is_new) or not current().is_first:
        yield folder
        return
    path = make_folder(folder).resolve()
    mine: set[Path] = _taken.__dict__.setdefault("folders", set())
    if path in mine:
        yield folder
        return
    release = _take(path, shared)
    mine.add(path)
    try:
        yield folder
    finally:
        mine.discard(path)
        if is_new:
            with suppress(OSError):  # it holds something
                path.rmdir()
        release()


def _take(path: Path, shared: bool) -> Callable[[], object]:
    """Takes the lock and returns what lets go of it."""
    if fcntl is not None:
        handle = os.open(path, os.O_RDONLY)
        try:
            _flock(handle, path, shared)
            return partial(os.close, handle)
        except BlockingIOError:
            os.close(handle)
            raise UserError(
                f"another command is writing to {str(path)!r}: wait until it has ended, or give another folder"
            ) from None
        except OSError:  # a file system without locks
            os.close(handle)
    return (lambda: None) if shared else _take_file(path / LOCK_FILE)


def _flock(handle: int, path: Path, shared: bool) -> None:
    """Alone at first, to clean up, then with others if `shared`."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with suppress(BlockingIOError):
                if shared:
                    return fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
            continue
        clean(path)
        return fcntl.flock(handle, fcntl.LOCK_SH) if shared else None


def _take_file(path: Path) -> Callable[[], object]:
    """The same by a file that says whose it is."""
    for _ in range(2):
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(f"{platform.node()} {os.getpid()}")
            clean(path.parent)
            return partial(path.unlink, missing_ok=True)
        except FileExistsError:
            if _is_alive(path):
                raise UserError(
                    f"another command is writing to {str(path.parent)!r}: wait until it has ended, or remove "
                    f"{str(path)!r} if none is"
                ) from None
            path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {str(path.parent)!r} ({error.strerror}): give another folder") from None
    raise UserError(f"another command is beginning to write to {str(path.parent)!r}: try again")


def _is_alive(path: Path) -> bool:
    """Whether the process that a lock file names may still run; one on another machine may."""
    try:
        node, number = path.read_text(encoding="utf-8").rsplit(" ", 1)
        if node != platform.node():
            return True
        os.kill(int(number), 0)
    except (ProcessLookupError, ValueError, FileNotFoundError):
        return False
    except OSError:
        return True
    return True

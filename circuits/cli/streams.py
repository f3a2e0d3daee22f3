"""Standard output and error that are closed, full, a broken pipe or not UTF-8 never end a command in a traceback."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from unicodedata import category

_TURNS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that turn the order of those that follow."""


class Printable(logging.Formatter):
    """Messages of the log as `printable` text."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def prepare_streams() -> None:
    """Make standard output and error something that can be written to: nowhere if closed, characters that an encoding
    lacks as escapes.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def printable(text: str) -> str:
    """The text with escapes in place of control characters, but for line breaks and tabs: nothing that a prompt, a
    label or a file's name holds moves the cursor, changes colours or the order of letters, or retitles the window.
    """
    return "".join(
        f"\\x{ord(c):02x}" if category(c) == "Cc" and c not in "\n\t" else f"\\u{ord(c):04x}" if c in _TURNS else c
        for c in text
    )


def say(text: str) -> None:
    """Write to standard output at once; where its reader has gone, what is said from now on goes nowhere.

    Raises OSError where it cannot be written otherwise, such as on a full disk.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        to_nowhere()
    except OSError:
        to_nowhere()
        raise


def say_error(text: str) -> None:
    """Write to standard error, if it can be written to."""
    with suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()


def to_nowhere() -> None:
    """Send what is written to standard output from now on nowhere: Python flushes again when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with suppress(OSError, ValueError):
        os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)

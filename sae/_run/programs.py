"""Programs that are asked: a JSON value a line on their standard input, an answer a line on their standard output."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Sequence

from sae.errors import UserError


def ask(command: str, questions: Sequence[object], *, timeout: float, called: str = "the program") -> list[str]:
    """The lines that a program answers, empty ones aside.

    Raises:
        UserError: It cannot be run, takes more than `timeout` seconds, or ends with another status than 0.
    """
    asked = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in questions)
    try:
        done = subprocess.run(
            shlex.split(command), input=asked, capture_output=True, text=True, timeout=timeout, encoding="utf-8"
        )
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"cannot run {called} {command!r}: {error}") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{called} {command!r} did not end within {timeout:g} seconds: raise --timeout") from None
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise UserError(f"{called} {command!r} ended with status {done.returncode}: {said[-1] if said else 'no word'}")
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]

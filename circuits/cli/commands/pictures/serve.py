"""`sfc serve`: experiments with a run in the browser."""

from __future__ import annotations

import importlib.util
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from circuits.cli.options import Output, RunsCircuit, UsesSaes
from circuits.cli.streams import say, say_error
from sae._options import Positive, Range
from sae.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ServeCommand(UsesSaes, RunsCircuit):
    """Open a run in the browser: type a prompt, see its features, edit them and see what the model says then.

    Every experiment is written to edits/ of the run and shows the command that repeats it. Only this machine is
    answered, and only who has the address that is printed.
    """

    circuit: Positional[Path]
    """Run folder with a circuit (`sfc discover`)."""
    port: Annotated[int, Range(0, 65535)] = 8765
    """Port on this machine; 0 takes any that is free."""
    text: str | None = None
    """Held-out text on which side effects of edits are measured, .txt or .jsonl."""
    texts: Positive = 50
    """Texts read of --text."""

    def run(self) -> Output:
        if missing := [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]:
            names = " and ".join(missing)
            raise UserError(f"sfc serve needs {names}: pip install 'sparse-feature-circuits[live]'")
        from circuits.cli.live.app import listen
        from circuits.cli.live.serving import open_run, serve

        with listen(self.port) as listening:  # a port that is taken is told before the model is loaded
            experiments = open_run(self, self.text, self.texts)
            port, token = listening.getsockname()[1], secrets.token_urlsafe(24)
            url = f"http://127.0.0.1:{port}/?token={token}"
            (say_error if self.json else say)(f"open {url}\n(Ctrl-C ends the server)\n")
            serve(experiments, listening, token=token)
        return Output("stopped", {"url": url})

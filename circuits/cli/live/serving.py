"""Opens a run and answers requests until it is interrupted."""

from __future__ import annotations

import socket
from contextlib import suppress

import uvicorn

from circuits.cli.common import load_circuit
from circuits.cli.live.app import make_app
from circuits.cli.live.experiments import Experiments
from circuits.cli.live.jobs import Worker
from circuits.cli.options import RunsCircuit
from sae.data.text import TextSource


def open_run(options: RunsCircuit, text: str | None = None, texts: int = 50) -> Experiments:
    """A run's circuit with its model and autoencoders, ready for experiments.

    Args:
        options: Which run, and how its model is loaded.
        text: Held-out text on which side effects are measured.
        texts: Texts read of it.
    """
    if text is not None:
        next(iter(TextSource.of(text).read()), None)  # a name that is wrong is told before the model is loaded
    return Experiments(options, load_circuit(options), text, texts)


def make_server(experiments: Experiments, worker: Worker, *, token: str, port: int) -> uvicorn.Server:
    """A server that logs no addresses, since the first one holds the token."""
    app = make_app(experiments, worker, token=token, port=port)
    return uvicorn.Server(
        uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=1)
    )


def serve(experiments: Experiments, listening: socket.socket, *, token: str) -> None:
    """Answer until the process is interrupted; a job that still runs is cancelled then."""
    worker = Worker(experiments.model)
    try:
        with suppress(KeyboardInterrupt):
            make_server(experiments, worker, token=token, port=listening.getsockname()[1]).run(sockets=[listening])
    finally:
        worker.close()

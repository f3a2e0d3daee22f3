"""The command line in processes of their own that need not import anything, and that may be killed
(`tests.kill_points`).

1. When all tests are collected, and none has run, the test process forks a process that waits: everything is imported
   there, and no thread of torch has started.
2. Each command is a fork of that process, with its own standard output and error (files), and no GPU. What its options
   are is found out before, and so once.
3. Its status comes back through a pipe, with the CPU seconds that it took (`tests.cpu_times`).
"""

from __future__ import annotations

import importlib
import os
import pickle
import pkgutil
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tyro._parsers import ParserSpecification

import circuits
import graphs
import sae
from circuits.cli.main import COMMANDS, command_class
from circuits.cli.parser import parse
from sae.errors import UserError
from tests.workers import fork

PARSERS: dict[Any, Any] = {}


def read_once(make: Callable[..., Any]) -> Callable[..., Any]:
    """What tyro knows of the options of a command: it takes longer to find out than to read them."""

    def parser(options: Any, *more: Any, **settings: Any) -> Any:
        if settings["parent_classes"]:
            return make(options, *more, **settings)
        if options not in PARSERS:
            PARSERS[options] = make(options, *more, **settings)
        return PARSERS[options]

    return parser


@dataclass(frozen=True)
class Result:
    """What a command did; the status of a killed one is minus the signal."""

    status: int
    out: str
    err: str


@dataclass(frozen=True)
class Request:
    words: list[str] | None  # no command, `before` alone
    environment: dict[str, str]
    output: str  # the folder of its files `out` and `err`
    before: Callable[[], None] | None


class ForkedCommands:
    """Runs `sfc` in forks of this process as it is now."""

    def __init__(self, threads: int) -> None:
        self.cpu_seconds = 0.0
        self.pipe, theirs = socket.socketpair()
        self.pid = fork()
        if self.pid == 0:
            self.pipe.close()
            _serve(theirs, threads)
        theirs.close()

    def run(
        self, *words: object, before: Callable[[], None] | None = None, environment: Mapping[str, str] | None = None
    ) -> Result:
        """Run `sfc` with these words to its end.

        Args:
            before: called in the new process before the command; what can be pickled, such as a function of a module.
            environment: variables to add to those of the test.
        """
        return self._request([str(word) for word in words], before, environment)

    def call(self, function: Callable[[], None], *, environment: Mapping[str, str] | None = None) -> Result:
        """Call a function of a module in a process of its own."""
        return self._request(None, function, environment)

    def _request(
        self, words: list[str] | None, before: Callable[[], None] | None, environment: Mapping[str, str] | None
    ) -> Result:
        with tempfile.TemporaryDirectory() as output:
            request = Request(words, dict(environment or {}), output, before)
            _send(self.pipe, pickle.dumps((request, str(Path.cwd()), dict(os.environ))))
            status, seconds = pickle.loads(_receive(self.pipe))
            self.cpu_seconds += seconds
            return Result(status, *(Path(output, name).read_text("utf-8", "replace") for name in ("out", "err")))

    def close(self) -> None:
        self.pipe.close()
        os.waitpid(self.pid, 0)


def _serve(pipe: socket.socket, threads: int) -> None:
    """Forks a process for each request, until the test process is gone."""
    try:
        for package in (circuits, graphs, sae):  # commands import what they need, here once for all
            for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
                if not module.name.endswith(("__main__", "triton_kernels")):
                    importlib.import_module(module.name)
        _prepare_to_load()
        ParserSpecification.from_callable_or_type = staticmethod(read_once(ParserSpecification.from_callable_or_type))
        torch.cuda.is_available = lambda: False  # CUDA does not survive a fork
        torch.set_num_threads(threads)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        while message := _receive(pipe):
            request, folder, environment = pickle.loads(message)
            start = time.process_time()
            _prepare_to_parse(request.words or [])
            preparing = time.process_time() - start
            child = fork()
            if child == 0:
                pipe.close()
                signal.signal(signal.SIGINT, signal.default_int_handler)
                os.environ.clear()
                os.environ.update(environment | request.environment)
                os.chdir(folder)
                torch.set_num_threads(threads)
                _run(request)
            _, status, used = os.wait4(child, 0)
            _send(pipe, pickle.dumps((os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime + preparing)))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _prepare_to_load() -> None:
    """Compile the thousand patterns by which transformers renames weights, half of what a small command takes."""
    with suppress(ImportError, AttributeError):  # of other releases
        mapping = importlib.import_module("transformers.conversion_mapping")
        mapping.get_checkpoint_conversion_mapping("gpt_neox")
        importlib.import_module("transformers.models.gpt_neox.modeling_gpt_neox")


def _prepare_to_parse(words: list[str]) -> None:
    """Find out the options of a command, for the forks that come."""
    if words and words[0] in COMMANDS and words[0] not in _prepared:
        _prepared.add(words[0])
        with suppress(UserError, SystemExit):
            parse(command_class(words[0]), [], prog="sfc")


_prepared: set[str] = set()


def _run(request: Request) -> None:
    """The command, as a process that ends when it ends."""
    status = 1
    try:
        for descriptor, name in ((1, "out"), (2, "err")):
            file = os.open(Path(request.output, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, descriptor)
            os.close(file)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False, buffering=1)
        if request.before is not None:
            request.before()
        status = 0
        if request.words is not None:
            from circuits.cli.main import main

            main(request.words)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            sys.stderr.write(stop.code + "\n")
    except BaseException:
        status = 1
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            status = 120  # as the interpreter does
        os._exit(status)


def _send(pipe: socket.socket, message: bytes) -> None:
    pipe.sendall(struct.pack("<q", len(message)) + message)


def _receive(pipe: socket.socket) -> bytes:
    """The next message; nothing where the other side is gone."""
    header = _exactly(pipe, 8)
    return _exactly(pipe, struct.unpack("<q", header)[0]) if header else b""


def _exactly(pipe: socket.socket, size: int) -> bytes:
    parts: list[Any] = []
    while size and (part := pipe.recv(size)):
        parts.append(part)
        size -= len(part)
    return b"" if size else b"".join(parts)

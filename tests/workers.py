"""The suite in several processes, without a plugin: `-n 2`, the default; `-n 0` runs it in this process.

1. This process imports everything and collects the tests, once: torch and transformers take longer to import than many
   tests to run.
2. Each worker is a fork of it, and asks for a file of tests (or all files that need a browser) until there are no more.
3. The reports come back through pipes; this process alone writes to the terminal.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

import pytest

Groups = list[list[pytest.Item]]


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("workers")._addoption  # `addoption` keeps lower-case letters to pytest itself
    add("-n", dest="workers", type=int, default=2, metavar="N", help="Run the tests in N processes; 0 for this one.")


def wants_workers(session: pytest.Session) -> bool:
    option = session.config.option
    return option.workers > 1 and not (option.collectonly or option.usepdb or session.testsfailed)


def run_in_workers(session: pytest.Session, *, on_start: Callable[[], None], on_end: Callable[[], None]) -> None:
    """Run the collected tests in forks of this process; each calls `on_start` before and `on_end` after its tests."""
    groups = _groups(session.items)
    workers: dict[Connection, int] = {}
    session.config._tmp_path_factory.getbasetemp()  # made before the forks, which have folders in it
    try:
        for number in range(min(session.config.option.workers, len(groups))):
            ours, theirs = Pipe()
            pid = fork()
            if pid == 0:
                _work(session, groups, theirs, number, on_start, on_end)
            theirs.close()
            workers[ours] = pid
        _collect_reports(session, workers, iter(range(len(groups))))
    finally:
        for pid in workers.values():
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)


def _groups(items: list[pytest.Item]) -> Groups:
    """Tests by file; the files whose tests share a browser are one group."""
    names = [item.nodeid.partition("::")[0] for item in items]
    in_browser = {
        name for name, item in zip(names, items, strict=True) if "browser" in getattr(item, "fixturenames", ())
    }
    groups: dict[str, list[pytest.Item]] = {}
    for name, item in zip(names, items, strict=True):
        groups.setdefault("browser" if name in in_browser else name, []).append(item)
    return list(groups.values())


def fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which a plugin may have started
        return os.fork()


def _collect_reports(session: pytest.Session, workers: dict[Connection, int], waiting: Iterator[int]) -> None:
    """Deal out the groups and pass on the reports until all workers have ended."""
    hook = session.config.hook
    while workers:
        for pipe in wait(list(workers)):
            try:
                message = pipe.recv()
            except EOFError:
                status = os.waitstatus_to_exitcode(os.waitpid(workers.pop(pipe), 0)[1])
                if status:
                    raise session.Failed(f"a worker ended with status {status}") from None
                continue
            if message is None:
                pipe.send(next(waiting, None))
                continue
            report = hook.pytest_report_from_serializable(config=session.config, data=message)
            if report.when == "setup":
                hook.pytest_runtest_logstart(nodeid=report.nodeid, location=report.location)
            hook.pytest_runtest_logreport(report=report)
            if report.when == "teardown":
                hook.pytest_runtest_logfinish(nodeid=report.nodeid, location=report.location)
            if session.shouldfail:
                raise session.Failed(session.shouldfail)


class _Reports:
    """Sends the reports of a worker to the process that writes them."""

    def __init__(self, config: pytest.Config, pipe: Connection) -> None:
        self.config, self.pipe = config, pipe

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.pipe.send(self.config.hook.pytest_report_to_serializable(config=self.config, report=report))


def _work(
    session: pytest.Session,
    groups: Groups,
    pipe: Connection,
    number: int,
    on_start: Callable[[], None],
    on_end: Callable[[], None],
) -> None:
    """Run groups of tests for as long as there are some, then end this process."""
    status = 1
    try:
        _separate(session.config, number)
        session.config.pluginmanager.register(_Reports(session.config, pipe))
        on_start()
        for item, following in pairwise(chain(_dealt(groups, pipe), [None])):
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        on_end()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _dealt(groups: Groups, pipe: Connection) -> Iterator[Any]:
    """The tests of this worker, a group at a time."""
    while True:
        pipe.send(None)
        if (index := pipe.recv()) is None:
            return
        yield from groups[index]


def _separate(config: pytest.Config, number: int) -> None:
    """A worker has its own temporary folders and captured output, and nothing to say to the terminal."""
    folder = config._tmp_path_factory.getbasetemp() / f"worker{number}"
    folder.mkdir()
    config._tmp_path_factory._basetemp = folder
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture.is_globally_capturing():
        capture.stop_global_capturing()
        capture.start_global_capturing()
        capture.suspend_global_capture()
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if reporter is not None:
        reporter._tw._file = io.StringIO()

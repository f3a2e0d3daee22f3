"""What each test costs in CPU seconds, of the suite and of each file: `python -m pytest -p tests.cpu_times`.

Wall time says little where several programs share the cores. Fixtures count for the test that asks for them first,
commands in forks (`tests.forked`) for the test that runs them. What comes before the first test does not count here.
"""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Iterator

import pytest

SHOWN = 40


def cpu_seconds(config: pytest.Config) -> float:
    """Of this process, of its children that have ended, and of the commands that ran in forks."""
    from tests.conftest import FORKED  # which sets what torch reads when it is imported

    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    in_forks = config.stash[FORKED].cpu_seconds if FORKED in config.stash else 0.0
    return sum(one.ru_utime + one.ru_stime for one in used) + in_forks


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    item.user_properties.append(("before", cpu_seconds(item.config)))
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[pytest.TestReport]:
    report = yield
    if call.when == "teardown":
        report.user_properties = [("cpu_seconds", cpu_seconds(item.config) - dict(item.user_properties)["before"])]
    return report


class Totals:
    """Collects reports, which come from the workers (`tests.workers`) if there are any."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            self.seconds[report.nodeid] += dict(report.user_properties)["cpu_seconds"]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        files: Counter[str] = Counter()
        for name, seconds in self.seconds.items():
            files[name.partition("::")[0]] += seconds
        for title, counts in (("tests", self.seconds), ("files", files)):
            terminalreporter.section(f"CPU seconds of {title}")
            for name, seconds in counts.most_common(SHOWN):
                terminalreporter.write_line(f"{seconds:7.2f}  {name}")
        terminalreporter.write_line(f"{sum(self.seconds.values()):7.2f}  all tests, without starting and collecting")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Totals())

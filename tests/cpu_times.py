"""What each test costs in CPU seconds, of the suite and of each file: `python -m pytest -p tests.cpu_times`.

Wall time says little where several programs share the cores. Fixtures count for the test that asks for them first;
what runs in forks (`tests.forked`) does not count here, nor what comes before the first test.
"""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Iterator

import pytest

SHOWN = 40


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    item.user_properties.append(("before", cpu_seconds()))
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[pytest.TestReport]:
    report = yield
    if call.when == "teardown":
        report.user_properties = [("cpu_seconds", cpu_seconds() - dict(item.user_properties)["before"])]
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

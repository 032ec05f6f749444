"""`--failures-to FILE`: every failure is written there as it happens, so a long run that is cut loses none.

For machines that are lent by the minute: with pytest-xdist the process that collects the results writes.
"""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--failures-to", type=Path, metavar="FILE", help="append each failure to FILE as it happens")


def pytest_configure(config: pytest.Config) -> None:
    target = config.getoption("--failures-to")
    if target is not None and not hasattr(config, "workerinput"):  # that attribute is how pytest-xdist marks a worker
        config.pluginmanager.register(Failures(target))


class Failures:
    """Appends to the file."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            with self._target.open("a", encoding="utf-8") as stream:
                stream.write(f"=== {report.nodeid} ({report.when}, {report.duration:.1f} s)\n{report.longreprtext}\n\n")

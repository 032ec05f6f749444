"""The table of faults is whole, names tests that exist, and its page is what the results say."""

from __future__ import annotations

import ast
import xml.etree.ElementTree as ElementTree
from functools import cache
from pathlib import Path

import pytest
from fault_report import PAGE, page, read_report, read_results
from fault_table import EXTRA, FAULTS

TESTS = Path(__file__).resolve().parents[1]


@cache
def functions(file: str) -> frozenset[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def test_there_are_40_and_each_has_a_test_here() -> None:
    assert [fault.number for fault in FAULTS] == list(range(1, 41))
    assert all(fault.tests for fault in FAULTS)


@pytest.mark.parametrize("test", sorted({test for fault in FAULTS for test in fault.tests} | set(EXTRA)))
def test_every_named_test_exists(test: str) -> None:
    file, _, name = test.partition("::")
    assert name in functions(file)


def test_the_page_is_what_the_results_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(read_results()), "run tests/daemon/fault_report.py --page"


def test_results_of_tests_that_are_gone_are_gone() -> None:
    named = {test for fault in FAULTS for test in fault.tests} | set(EXTRA)
    assert set(read_results()["tests"]) <= named


def test_a_failure_is_a_failure() -> None:
    report = ElementTree.fromstring("""<testsuites><testsuite>
        <testcase file="tests/daemon/a.py" name="test_x[1]" time="1.5">
          <properties><property name="measured" value="5 ms"/></properties></testcase>
        <testcase file="tests/daemon/a.py" name="test_x[2]" time="1"><failure message="no"/></testcase>
        <testcase file="tests/daemon/a.py" name="test_y" time="1"><error message="setup"/></testcase>
        <testcase file="tests/daemon/a.py" name="test_z" time="0"><skipped message="why"/></testcase>
    </testsuite></testsuites>""")
    outcomes = read_report(report, ["daemon/a.py::test_x", "daemon/a.py::test_y", "daemon/a.py::test_z"])
    counts = [(outcome.passed, outcome.failed, outcome.skipped) for outcome in outcomes.values()]
    assert counts == [(1, 1, 0), (0, 1, 0), (0, 0, 1)]
    assert outcomes["daemon/a.py::test_x"].measured == ["5 ms"]
    assert outcomes["daemon/a.py::test_x"].seconds == 2.5

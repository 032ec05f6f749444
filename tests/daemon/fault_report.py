"""Runs every test of fault_table.py and writes the results: `make test-faults`.

docs/reference/fault-tests.json holds what was measured, fault-tests.md is made from it. With numbers (`fault_report.py 3 12`)
only those are run again; each result carries the commit and the day of its own run. Tests of the image run with
`--image` or alone with `--image-only`, after `make image-test` has built it. `--page` only writes the page again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measured_run  # found through the line above
from fault_table import EXTRA, FAULTS, Fault
from measured_run import ROOT

RESULTS = ROOT / "docs" / "reference" / "fault-tests.json"
PAGE = ROOT / "docs" / "reference" / "fault-tests.md"


@dataclass(kw_only=True)
class Outcome:
    """What one test function of the table did, all its cases together."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    measured: list[str] = field(default_factory=list)
    commit: str = ""
    day: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("numbers", nargs="*", type=int, help="faults to try, 0: what is measured besides; default: all")
    parser.add_argument("--image", action="store_true", help="also the tests that need the container image")
    parser.add_argument("--image-only", action="store_true", help="the tests that need the container image, no others")
    parser.add_argument("--page", action="store_true", help="run nothing, write the page from the results")
    options = parser.parse_args(arguments)
    failed, found = 0, {}
    if not options.page:
        chosen = [fault for fault in FAULTS if not options.numbers or fault.number in options.numbers]
        wanted = {test for fault in chosen for test in fault.tests} | (
            set(EXTRA) if 0 in options.numbers or not options.numbers else set()
        )
        for is_image in kinds(options):
            tests = sorted((test for test in wanted if test.startswith("image/") is is_image), key=place)
            if tests:
                outcomes = run(tests)
                failed += sum(outcome.failed for outcome in outcomes.values())
                found.update({test: asdict(outcome) for test, outcome in outcomes.items()})
    known = read_results()
    if not options.page:
        known["tests"].update(found)
        known["machine"] = measured_run.machine()
        RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    PAGE.write_text(page(known), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {summary(known)}")
    return 1 if failed else 0


def place(test: str) -> tuple[str, int]:
    """Sorts tests as their files have them: tests of one container may build on each other (guessing closes a login)."""
    file, _, name = test.partition("::")
    return file, (ROOT / "tests" / file).read_text(encoding="utf-8").index(f"def {name}(")


def kinds(options: argparse.Namespace) -> list[bool]:
    """Which runs of pytest there are: without the image's tests, with nothing else."""
    if options.image_only:
        return [True]
    return [False, True] if options.image else [False]


def read_results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"tests": {}, "machine": ""}


def run(tests: Sequence[str]) -> dict[str, Outcome]:
    """Every case of the test functions, in one run of pytest, one after another."""
    _, report = measured_run.run([f"tests/{test}" for test in tests], marked="not gpu")
    return {} if report is None else read_report(report, tests)


def read_report(report: Element, tests: Sequence[str]) -> dict[str, Outcome]:
    commit = measured_run.commit()
    outcomes = {test: Outcome(commit=commit, day=datetime.now(UTC).date().isoformat()) for test in tests}
    for case in report.iter("testcase"):
        test = f"{str(case.get('file')).removeprefix('tests/')}::{str(case.get('name')).partition('[')[0]}"
        outcome = outcomes.get(test)
        if outcome is None:
            continue
        outcome.seconds = round(outcome.seconds + float(case.get("time", 0)), 1)
        if case.find("failure") is not None or case.find("error") is not None:
            outcome.failed += 1
        elif case.find("skipped") is not None:
            outcome.skipped += 1
        else:
            outcome.passed += 1
        outcome.measured += measured_run.measured(case)
    return outcomes


def outcome_of(fault: Fault, known: dict[str, Any]) -> str:
    results = [known["tests"].get(test) for test in fault.tests]
    if any(result and result["failed"] for result in results):
        return "**failed**"
    passed = sum(bool(result and result["passed"]) for result in results)
    if passed == len(results):
        return "passed"
    return f"passed {passed} of {len(results)}, the others not run" if passed else "not run"


def page(known: dict[str, Any]) -> str:
    parts = [
        HEAD.format(machine=known["machine"] or "no machine yet"),
        "| # | what happens | what must hold | result | cases | measured |\n|---|---|---|---|---|---|",
    ]
    for fault in FAULTS:
        results = [known["tests"][test] for test in fault.tests if test in known["tests"]]
        cases = sum(result["passed"] for result in results)
        measured = "; ".join(text for result in results for text in result["measured"])
        where = f" Not here: {fault.elsewhere}." if fault.elsewhere else ""
        parts.append(
            f"| {fault.number} | {fault.what} | {fault.rule} | {outcome_of(fault, known)} | {cases} | {measured}{where} |"
        )
    parts.append("\nMeasured in the same run:\n")
    for test in EXTRA:
        for text in known["tests"].get(test, {"measured": []})["measured"]:
            parts.append(f"- {test.partition('::')[2].removeprefix('test_').replace('_', ' ')}: {text}")
    parts.append(
        "\n## Tests\n\n| # | test | passed | failed | skipped | seconds | run |\n|---|---|---|---|---|---|---|"
    )
    for fault in FAULTS:
        parts += [_line(fault.number, test, known["tests"].get(test)) for test in fault.tests]
    return "\n".join(parts) + "\n"


HEAD = """<!-- Generated by `make test-faults` from fault-tests.json; do not edit. -->

# Faults and attacks

What the queue is tested against, and how it did. `make test-faults` runs all of it ({machine}); the fast ones are part of
`make test`. Tests of the container need an image and run with `--image` after `make image-test`. A test that needs a GPU or
another machine is named with its script; what was never run says so.
"""


def _line(number: int, test: str, result: dict[str, Any] | None) -> str:
    name = f"`tests/{test}`"
    if result is None:
        return f"| {number} | {name} | | | | | not run |"
    counts = " | ".join(str(result[key]) for key in ("passed", "failed", "skipped", "seconds"))
    return f"| {number} | {name} | {counts} | {result['day']}, {result['commit']} |"


def summary(known: dict[str, Any]) -> str:
    results = [outcome_of(fault, known) for fault in FAULTS]
    return ", ".join(f"{results.count(result)} {result}" for result in sorted(set(results)))


if __name__ == "__main__":
    sys.exit(main())

"""Runs tests that record what they measure, for the scripts that make pages of it (`*_report.py` in the folders below).

A test records with pytest's `record_property("measured", text)`.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def machine() -> str:
    release = platform.release().split("-")[0]
    return f"{os.cpu_count()} CPU cores, Linux {release}, Python {platform.python_version()}"


def commit() -> str:
    """With a plus when files differ from it."""
    command = ["git", "describe", "--always", "--dirty=+"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def run(tests: Sequence[str], *, marked: str) -> tuple[int, ElementTree.Element | None]:
    """pytest's exit status and its report (JUnit); None when it wrote none. `marked` is pytest's -m."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-m", marked, "-o", "junit_family=xunit1",
                   "-p", "no:cacheprovider", f"--junitxml={report}", *tests]  # fmt: skip
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        return status, ElementTree.parse(report).getroot() if report.exists() else None


def measured(report: ElementTree.Element) -> list[str]:
    """What was recorded in a whole report, or in one case of it."""
    return [str(item.get("value")) for item in report.iter("property") if item.get("name") == "measured"]

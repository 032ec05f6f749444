"""Full and read-only disks, real ones: small file systems mounted for one process (tests 6 and 7). As root only."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from mounted import SCENARIOS

SCRIPT = Path(__file__).parent / "mounted.py"
FAST = ("full-while-training", "read-only-root", "read-only-inbox")


def can_mount() -> bool:
    try:
        done = subprocess.run(
            ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, timeout=10
        )
    except OSError:
        return False
    return done.returncode == 0


needs_mounts = pytest.mark.skipif(not can_mount(), reason="this user may not mount file systems")


def run(scenario: str, folder: Path) -> None:
    command = ["unshare", "-m", sys.executable, str(SCRIPT), str(folder), scenario]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


@needs_mounts
@pytest.mark.parametrize("scenario", FAST)
def test_full_and_read_only(tmp_path: Path, scenario: str) -> None:
    run(scenario, tmp_path)


@needs_mounts
@pytest.mark.slow
@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name not in FAST])
def test_more_of_them(tmp_path: Path, scenario: str) -> None:
    run(scenario, tmp_path)

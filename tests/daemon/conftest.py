"""A data root for each test. Helpers are in daemon_harness.py, which tests import by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from dropforge.daemon import process
from dropforge.daemon.lease import holder
from dropforge.paths import DataRoot

sys.path.insert(0, str(Path(__file__).parent))

from daemon_harness import Harness  # found through the line above


@pytest.fixture
def root(tmp_path: Path) -> Iterator[DataRoot]:
    data_root = DataRoot(tmp_path / "data").create()
    (data_root.datasets / "rows.jsonl").write_text('{"text": "hello"}\n')
    yield data_root
    for run in (data_root.path / "runs").iterdir():  # nothing may outlive a failed test
        leftover = holder(data_root.run(run.name))
        if leftover is not None and leftover.alive():
            process.kill_family(leftover.pid)


@pytest.fixture
def harness(root: DataRoot) -> Iterator[Harness]:
    with Harness(root) as running:
        yield running

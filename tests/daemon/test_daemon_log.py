"""state/daemon.log: there, capped, without secrets, and no reason to stop."""

from __future__ import annotations

import logging

import pytest
from daemon_harness import Harness, drop
from dropforge.daemon import daemon_log
from dropforge.daemon.daemon_log import DaemonLog
from dropforge.paths import DataRoot

log = logging.getLogger("dropforge.daemon")


def test_it_holds_what_the_daemon_said(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dropforge.daemon")
    drop(harness.root, "a.yaml")
    harness.until_in("done")
    text = (harness.root.state / "daemon.log").read_text()
    assert "accepted" in text and "succeeded" in text


def test_it_is_capped(root: DataRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon_log, "MAX_BYTES", 2000)
    with DaemonLog(root):
        for number in range(200):
            log.warning("line %d", number)
    files = sorted(root.state.glob("daemon.log*"))
    assert [path.name for path in files] == ["daemon.log", "daemon.log.1"]
    assert all(path.stat().st_size <= 2000 for path in files)


def test_secrets_and_tracebacks(root: DataRoot, caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    (root.secrets / "NOTIFY_TOKEN").write_text("canary-in-a-file")
    monkeypatch.setenv("SOME_API_KEY", "canary-in-a-variable")
    with DaemonLog(root):
        try:
            raise ValueError("canary-in-a-file")
        except ValueError:
            log.exception("said %s", "canary-in-a-variable")
    text = (root.state / "daemon.log").read_text()
    assert text.count("[redacted]") == 3 and "canary" not in text
    assert "canary" not in caplog.text


def test_a_file_that_cannot_be_written_stops_nothing(root: DataRoot) -> None:
    (root.state / "daemon.log").mkdir()
    with DaemonLog(root):
        log.warning("still alive")
    assert (root.state / "daemon.log").is_dir()

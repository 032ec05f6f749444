"""A daemon with the fake runner, as a process: `daemon_process.py ROOT [CRASH_POINT] [NTH] [JOURNAL]`.

With a crash point it kills itself with SIGKILL there, the NTH time it comes by. With a journal it and its runner write down
what they do to the disk (disk_recorder.py).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

import disk_recorder  # beside this file
from dropforge.daemon.loop import Daemon, DaemonOptions
from dropforge.errors import EnvironmentFault
from dropforge.paths import DataRoot
from dropforge.spec_check import check

FAKE_RUNNER = (sys.executable, str(Path(__file__).parent / "fake_runner.py"))


def main(root: str, die_at: str = "", nth: str = "1", journal: str = "") -> int:
    left = int(nth)
    runner_command = FAKE_RUNNER
    if journal:
        disk_recorder.install(Path(root), Path(journal))
        runner_command = (*FAKE_RUNNER, "--journal", journal)

    def crash(label: str) -> None:
        nonlocal left
        if label == die_at:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = DaemonOptions(poll_seconds=0.02, settle_seconds=0.05, grace_seconds=5.0, warm=False)
    try:
        # `check` in this process: the limited child is tested elsewhere and would only slow these tests down.
        with Daemon(
            DataRoot(Path(root)), options=options, runner_command=runner_command, crash=crash, check=check
        ) as daemon:
            daemon.run()
            return daemon.exit_status
    except EnvironmentFault as error:
        print(error, file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

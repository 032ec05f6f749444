"""A daemon with the fake runner, as a process: `daemon_process.py ROOT [CRASH_POINT] [NTH]`.

With a crash point it kills itself with SIGKILL there, the NTH time it comes by.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

from dropforge.daemon.loop import Daemon, DaemonOptions
from dropforge.errors import EnvironmentFault
from dropforge.paths import DataRoot
from dropforge.spec_check import check

FAKE_RUNNER = (sys.executable, "-P", str(Path(__file__).parent / "fake_runner.py"))


def main(root: str, die_at: str = "", nth: str = "1") -> int:
    left = int(nth)

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
            DataRoot(Path(root)), options=options, runner_command=FAKE_RUNNER, crash=crash, check=check
        ) as daemon:
            daemon.run()
    except EnvironmentFault as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""Event listener: when supervisord gives up on a service, stop everything, so that the restart policy sees it.

supervisord has no such option of its own: with a service FATAL it stays up, and so does the container.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from supervisor import childutils

FATAL_FILE = Path("/run/dropforge/fatal")


def main() -> None:
    while True:
        headers, payload = childutils.listener.wait()
        if headers["eventname"] == "PROCESS_STATE_FATAL":
            name = childutils.get_headers(payload)["processname"]
            FATAL_FILE.write_text(name + "\n", encoding="utf-8")
            print(f"dropforge: ERROR: {name} cannot be kept up; stopping the container", file=sys.stderr, flush=True)
            os.kill(os.getppid(), signal.SIGTERM)
        childutils.listener.ok()


if __name__ == "__main__":
    main()

"""Real daemons with the real trainer, a fraction of a second after they are asked for: `warm_stem.py ROOT`.

Importing the training libraries takes longer than a tiny training, so this process does it once and forks: a line on standard
input asks for a daemon, its pid comes back on standard output. That daemon forks its runners as well. Daemon, runner,
trainer and protocol are the shipped ones; only exec and the imports are left out.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO, NoReturn

from dropforge.daemon import runner
from dropforge.daemon.loop import Daemon, DaemonOptions
from dropforge.daemon.worker import Worker
from dropforge.paths import DataRoot
from dropforge.spec_check import check

WARM = (*runner.WARM_MODULES, "transformers.models.llama.modeling_llama", "dropforge.trl_adapter", "dropforge.data",
        "dropforge.recipes", "dropforge.export.export_adapter", "dropforge.export.precheck",
        "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
        "peft.tuners.lora", "sympy", "torch._dynamo", "bitsandbytes")  # fmt: skip
POLL_SECONDS, SETTLE_SECONDS, GRACE_SECONDS = 0.05, 0.05, 30.0


class Forked:
    """What Worker uses of subprocess.Popen, for a child that was forked."""

    stdin = None

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


class ForkingWorker(Worker):
    """Starts a runner by fork where Worker starts one by exec."""

    def _spawn(self, *arguments: str, stdout: BinaryIO, stdin: int = subprocess.DEVNULL) -> Forked:  # type: ignore[override]
        options = ["--data", str(self._root.path), "--parent", str(os.getpid()), *arguments]
        pid = os.fork()
        return Forked(pid) if pid else run_child(options, output=stdout.fileno(), folder=self._root.path)


def become_fresh(*, output: int) -> None:
    """What exec would have done: no handlers, no open files but the standard ones (a copy of the lock would be a lock)."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.closerange(3, 4096)


def run_child(options: list[str], *, output: int, folder: Path) -> NoReturn:
    status = 70
    try:
        os.setsid()
        become_fresh(output=output)
        os.chdir(folder)
        status = runner.main(options)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)  # never back into the daemon's frames


def serve(root: DataRoot) -> NoReturn:
    status = 70
    try:
        os.setsid()
        log = os.open(root.state / "stem.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        become_fresh(output=log)
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        options = DaemonOptions(poll_seconds=POLL_SECONDS, settle_seconds=SETTLE_SECONDS, grace_seconds=GRACE_SECONDS,
                                warm=False)  # fmt: skip
        daemon = Daemon(root, options=options, check=check)
        worker = ForkingWorker(root, grace_seconds=options.grace_seconds, warm=False)
        for part in (daemon, daemon._orders, daemon._guards):
            part._worker = worker
        with daemon:
            daemon.run()
            status = daemon.exit_status
    finally:
        os._exit(status)


def main(root: str) -> int:
    for name in WARM:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # daemons that were killed are reaped by the kernel
    print("ready", flush=True)
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            serve(DataRoot(Path(root)))
        print(pid, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

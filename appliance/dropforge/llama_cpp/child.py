"""Run one of llama.cpp's programs: its output kept for the error message, its life bound to ours."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dropforge.errors import ExportError

PR_SET_PDEATHSIG = 1
TAIL_LINES = 12
TAIL_CHARACTERS = 2000


def death_signal() -> Callable[[], None]:
    """Function for `preexec_fn`: the kernel kills the child when its parent dies, even by SIGKILL (Linux only)."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def bind() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    return bind


def environment(**more: str) -> dict[str, str]:
    """Our environment for a child, without LLAMA_* variables, which would change settings that checks rely on."""
    return {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_")} | more


def tail(text: str) -> str:
    """The last lines of a program's output, short enough for an error message."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-TAIL_LINES:])[-TAIL_CHARACTERS:]


def run_tool(
    command: Sequence[str | Path], *, what: str, code: str, fix: str = "", env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:  # fmt: skip
    """Run `command` to its end and return its output (stdout and stderr together).

    Raises ExportError with `code` and the last lines of output when it exits with anything but 0.
    """
    done = subprocess.run(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(**(env or {})),
        cwd=cwd,
        preexec_fn=death_signal(),
        check=False,
    )
    output = done.stdout.decode("utf-8", errors="replace")
    if done.returncode != 0:
        raise ExportError(
            what,
            code=code,
            where=Path(command[0]).name,
            why=f"exit status {done.returncode}; it said last:\n{tail(output)}",
            fix=fix,
        )
    return output

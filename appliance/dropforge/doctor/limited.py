"""Run a program for a limited time. What a broken GPU holds in the kernel cannot be killed, and is not waited for."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dropforge.llama_cpp.child import environment

GRACE = 3.0
"""Seconds that a killed process gets to disappear before it is left behind."""
PCI_ORDER = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
"""Makes CUDA number the GPUs as nvidia-smi does; its own order starts with the fastest."""


@dataclass(frozen=True, kw_only=True)
class Ran:
    """`status`: the exit status, negative for a signal; None when the time was over."""

    status: int | None
    stdout: str
    stderr: str


def run_limited(words: Sequence[str | Path], *, seconds: float, env: Mapping[str, str] = PCI_ORDER) -> Ran:
    """Run `words` with `env` added to the environment; at the end of the time kill it and all it started.

    Raises OSError when the program cannot be started.
    """
    process = subprocess.Popen(
        [str(word) for word in words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment(**env), start_new_session=True,
    )  # fmt: skip
    try:
        stdout, stderr = process.communicate(timeout=seconds)
        return Ran(status=process.returncode, stdout=_text(stdout), stderr=_text(stderr))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    try:
        stdout, stderr = process.communicate(timeout=GRACE)
    except subprocess.TimeoutExpired as late:
        stdout, stderr = late.stdout or b"", late.stderr or b""
        for pipe in (process.stdout, process.stderr):
            if pipe:
                pipe.close()
        process.poll()
    return Ran(status=None, stdout=_text(stdout), stderr=_text(stderr))


def _text(content: bytes) -> str:
    return content.decode("utf-8", "replace")

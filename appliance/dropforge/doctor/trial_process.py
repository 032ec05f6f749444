"""Runs one kind of trial in a process of its own, for a limited time, and reads what it says."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dropforge.doctor.limited import run_limited

SECONDS = 100.0
"""The first kernel on a new machine is compiled, and vLLM takes a while to import."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """`outcomes`: one mapping with device, ok and text per GPU that was tried. `error`: why the process failed."""

    outcomes: tuple[Mapping[str, Any], ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""


def run_trial(name: str, *, command: Sequence[str] = (), seconds: float = SECONDS) -> Answer:
    """`command`: what to run instead of dropforge.doctor.trials (tests)."""
    words = command or (sys.executable, "-P", "-m", "dropforge.doctor.trials", name)
    done = run_limited(words, seconds=seconds)
    error = ""
    if done.status is None:
        error = f"no answer within {seconds:g} s: the GPU or its driver hangs"
    elif done.status < 0:
        error = f"died of {signal.Signals(-done.status).name}"
    elif done.status > 0:
        error = done.stderr.strip() or f"ended with status {done.status}"
    return read_answer(done.stdout, error=error)


def read_answer(text: str, *, error: str) -> Answer:
    """Lines that are no JSON objects are some library's chatter."""
    lines: list[dict[str, Any]] = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            lines.append(value)
    facts: Mapping[str, Any] = next((line["facts"] for line in lines if "facts" in line), {})
    return Answer(outcomes=tuple(line for line in lines if "device" in line), facts=facts, error=error)

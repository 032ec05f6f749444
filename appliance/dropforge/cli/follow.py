"""Watch one job until it ends: a progress bar in a terminal, plain lines elsewhere. Reads files only."""

from __future__ import annotations

import sys
import time
from typing import Any

from dropforge.daemon.query import JobView, find_job
from dropforge.paths import DataRoot
from dropforge.states import State

POLL_SECONDS = 0.3
LINE_SECONDS = 10.0


def exit_status(state: State) -> int:
    """0 for a full success, 1 for every other end."""
    return 0 if state is State.SUCCEEDED else 1


def follow(root: DataRoot, job_id: str) -> JobView:
    """Show the job until it ends or is held. Returns its last view."""
    with Follower() as show:
        while True:
            job = find_job(root, job_id)
            show.update(job)
            if job.state.ended or job.state is State.HELD:
                return job
            time.sleep(POLL_SECONDS)


class Follower:
    """Shows one job while entered: a bar in a terminal, lines elsewhere, all on standard error."""

    def __enter__(self) -> Follower:
        self._show: _Bar | _Lines = _Bar() if sys.stderr.isatty() else _Lines()
        return self

    def __exit__(self, *exception: object) -> None:
        self._show.close()

    def update(self, job: JobView) -> None:
        self._show.update(job)


def progress_text(status: dict[str, Any]) -> str:
    """`step 12/240  loss 1.234  56 tokens/s`; empty before the first step."""
    if not status.get("total_steps"):
        return ""
    parts = [f"step {status.get('step', 0)}/{status['total_steps']}"]
    if isinstance(status.get("loss"), float):
        parts.append(f"loss {status['loss']:.4f}")
    if status.get("tokens_per_second"):
        parts.append(f"{status['tokens_per_second']:,.0f} tokens/s")
    elif status.get("trained_tokens_per_second"):
        parts.append(f"{status['trained_tokens_per_second']:.0f} trained tokens/s")
    if status.get("eta_seconds") is not None:
        parts.append(f"{status['eta_seconds']} s left")
    return "  ".join(parts)


class _Lines:
    """One line per change of state, and one every ten seconds while steps advance."""

    def __init__(self) -> None:
        self._state: State | None = None
        self._last = 0.0

    def update(self, job: JobView) -> None:
        now = time.monotonic()
        changed = job.state is not self._state
        training = job.state is State.TRAINING and now - self._last >= LINE_SECONDS
        if changed or training:
            text = progress_text(job.status) if job.state is State.TRAINING else job.waiting_for or job.message
            print(f"{job.id}: {job.state.value}  {text}".rstrip(), file=sys.stderr, flush=True)
            self._state, self._last = job.state, now

    def close(self) -> None:
        return


class _Bar:
    """A progress bar for people."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task("waiting", total=None, text="")
        self._progress.start()

    def update(self, job: JobView) -> None:
        total = job.status.get("total_steps") or None
        text = progress_text(job.status) or job.waiting_for
        self._progress.update(
            self._task, description=job.state.value, total=total, completed=job.status.get("step") or 0, text=text
        )

    def close(self) -> None:
        self._progress.stop()

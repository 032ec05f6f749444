"""What a job says while it runs: status.json (replaced), events.jsonl and metrics.jsonl (appended).

One process writes at a time: the runner while it lives, the daemon before and after. Readers may look at any moment.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dropforge.files import append_json_line, read_json, write_json
from dropforge.paths import RunFolder
from dropforge.states import State

STATUS_SCHEMA = 1
STATUS_INTERVAL_SECONDS = 1.0
MAX_BYTES = 16 << 20
"""Of events.jsonl and metrics.jsonl; a longer one becomes events.1.jsonl and a new one begins."""


def utc_now() -> str:
    """UTC, ISO 8601, whole seconds. For people; nothing is decided by it."""
    return datetime.now(UTC).replace(microsecond=0).isoformat()


class RunLog:
    """Writer of one run's status, events and metrics.

    `status` keeps every field it was ever given; a progress update is written at most once a second, a change of state
    at once. A field set to None is written as null, so that readers always find the same keys once they were there.
    """

    def __init__(
        self, run: RunFolder, *, clock: Callable[[], float] = time.monotonic,
        clean: Callable[[Any], Any] = lambda value: value,
    ) -> None:  # fmt: skip
        """`clean` is applied to everything that is written: the runner takes secrets out."""
        self.run = run
        self._clean = clean
        self._clock = clock
        self._last_write = float("-inf")
        self.fields: dict[str, Any] = {"schema": STATUS_SCHEMA, "id": run.id}
        if run.status.exists():
            self.fields.update(read_json(run.status))

    def _append(self, path: Path, line: dict[str, Any]) -> None:
        if _size(path) > MAX_BYTES:
            path.replace(path.with_name(f"{path.stem}.1{path.suffix}"))
        append_json_line(path, self._clean(line))

    def event(self, action: str, **details: Any) -> None:
        """Append one line: `action` is machine-readable and listed in docs/reference/folder-contract.md."""
        self._append(self.run.events, {"time": utc_now(), "action": action, **details})

    def state(self, state: State, *, reason: str | None = None, message: str = "", **fields: Any) -> None:
        """Enter a state: one event, and status.json replaced at once."""
        previous = self.fields.get("state")
        self.fields.update(state=state.value, reason=reason, message=message, **fields)
        if previous != state.value or reason:
            self.event("state", state=state.value, reason=reason, message=message)
        self.flush()

    def progress(self, **fields: Any) -> None:
        """Update fields of status.json, written at most once a second."""
        self.fields.update(fields)
        if self._clock() - self._last_write >= STATUS_INTERVAL_SECONDS:
            self.flush()

    def metrics(self, **values: Any) -> None:
        """Append one line of numbers: step, loss, learning_rate, grad_norm, tokens_per_second ..."""
        self._append(self.run.metrics, {"time": utc_now(), **values})

    def flush(self) -> None:
        self.fields["updated"] = utc_now()
        write_json(self.run.status, self._clean(self.fields))
        self._last_write = self._clock()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0

"""A request to stop that one thread makes and the training loop reads at every step."""

from __future__ import annotations

import threading

from dropforge.errors import JobStopped, Reason


class StopSignal:
    """Set once by a signal handler or the daemon; polled by the job."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._save_now = threading.Event()
        self.reason = Reason.USER
        self.save = True

    def request(self, reason: Reason, *, save: bool = True) -> None:
        """Ask the job to end; with `save` it writes a checkpoint first. A later request does not undo an earlier."""
        if not self._event.is_set():
            self.reason, self.save = reason, save
            self._event.set()

    def request_checkpoint(self) -> None:
        """Ask for a checkpoint at the next step; the job goes on."""
        self._save_now.set()

    def take_checkpoint_request(self) -> bool:
        """True once per request."""
        asked = self._save_now.is_set()
        self._save_now.clear()
        return asked

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def raise_if_requested(self) -> None:
        """Called between the stages of a job. Raises JobStopped."""
        if self.requested:
            raise JobStopped("the job was asked to stop", code="job-stopped", reason=self.reason)

"""Tells somebody that a job has ended: one POST per job, from a thread, tried a few times, never in a job's way.

    webhook   JSON: schema, event, id, name, state, reason, message, result, time
    ntfy      the message as text, with Title, Priority and Tags (https://docs.ntfy.sh/publish/)

The address may carry a secret itself, so only its host is ever shown.
"""

from __future__ import annotations

import http.client
import json
import logging
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

from dropforge.daemon.names import printable
from dropforge.daemon.queue import Ticket
from dropforge.daemon.redact import redact, secret_values
from dropforge.daemon.verdict import Verdict
from dropforge.errors import EnvironmentFault
from dropforge.events import utc_now
from dropforge.paths import DataRoot
from dropforge.states import State

log = logging.getLogger("dropforge.daemon")

FORMATS = ("webhook", "ntfy")
DELAYS_SECONDS = (2.0, 10.0, 60.0, 300.0)
"""Between the tries; after the last one the message is given up."""
TIMEOUT_SECONDS = 10.0
WAITING_MESSAGES = 1000
TOKEN_NAME = "NOTIFY_TOKEN"
URL_NAME = "NOTIFY_URL"
_TAGS = {State.SUCCEEDED: "white_check_mark", State.PARTIAL: "warning", State.HELD: "raised_hand", State.FAILED: "x"}


@dataclass(frozen=True, kw_only=True)
class Message:
    """What is told about one job."""

    id: str
    name: str
    state: str
    reason: str | None
    message: str
    result: str | None
    """Path of its results, relative to the data root."""
    time: str
    """UTC."""


def message_about(root: DataRoot, ticket: Ticket, verdict: Verdict) -> Message:
    result = root.result(ticket.slug, ticket.id).path
    return Message(
        id=ticket.id, name=printable(ticket.name), state=verdict.state.value,
        reason=verdict.reason.value if verdict.reason else None, message=verdict.message,
        result=str(result.relative_to(root.path)) if result.is_dir() else None, time=utc_now(),
    )  # fmt: skip


class Notifier:
    """Sends messages in the order in which they were told. Without a URL it does nothing.

    Raises EnvironmentFault (notify-url, notify-format) for settings that cannot work.
    """

    def __init__(
        self, root: DataRoot, *, url: str = "", form: str = "webhook", delays: Sequence[float] = DELAYS_SECONDS
    ) -> None:
        self._root = root
        self._url = url or _secret(root, URL_NAME)
        self._form = form
        self._delays = delays
        self._messages: queue.Queue[Message | None] = queue.Queue(WAITING_MESSAGES)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        if self._url:
            _refuse_bad_settings(self._url, form)

    def tell(self, message: Message) -> None:
        """Never waits and never raises."""
        if not self._url:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="notify", daemon=True)
            self._thread.start()
        try:
            self._messages.put_nowait(message)
        except queue.Full:
            log.warning("a notification was dropped: %d wait already", WAITING_MESSAGES, extra={"action": "notify"})

    def close(self, *, seconds: float = 3.0) -> None:
        """Give what waits a last short chance; no further retries."""
        self._ended.set()
        if self._thread is not None:
            self._messages.put(None)
            self._thread.join(seconds)

    def _run(self) -> None:
        while (message := self._messages.get()) is not None:
            self._deliver(message)

    def _deliver(self, message: Message) -> None:
        fault = ""
        for delay in (0.0, *self._delays):
            if delay and self._ended.wait(delay):
                break
            try:
                request = self._request(message)
                with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):
                    return
            except (OSError, http.client.HTTPException, ValueError) as error:
                # An HTTP status, a refused connection or a damaged answer; its text may repeat the address.
                fault = f"HTTP {error.code}" if isinstance(error, urllib.error.HTTPError) else type(error).__name__
        host = urlsplit(self._url).hostname
        log.warning("%s: %s could not be notified (%s)", message.id, host, fault, extra={"action": "notify"})

    def _request(self, message: Message) -> urllib.request.Request:
        secrets = [*secret_values(self._root), self._url]
        told = {key: redact(value, secrets) if value else value for key, value in asdict(message).items()}
        headers = {"User-Agent": "dropforge"}
        if token := _secret(self._root, TOKEN_NAME):
            headers["Authorization"] = f"Bearer {token}"
        if self._form == "webhook":
            body = {"schema": 1, "event": "job", **told}
            headers["Content-Type"] = "application/json"
            return urllib.request.Request(self._url, json.dumps(body).encode(), headers, method="POST")
        state = State(message.state)
        headers |= {"Title": f"{told['id']}: {told['state']}", "Tags": _TAGS.get(state, "information_source"),
                    "Priority": "high" if state in (State.FAILED, State.HELD) else "default"}  # fmt: skip
        text = "\n".join(filter(None, (told["name"], told["message"], told["result"])))
        return urllib.request.Request(self._url, text.encode(), headers, method="POST")


def _secret(root: DataRoot, name: str) -> str:
    try:
        return (root.secrets / name).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _refuse_bad_settings(url: str, form: str) -> None:
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise EnvironmentFault("the address for notifications is not an http or https URL", code="notify-url",
                               where=f"DROPFORGE_NOTIFY_URL or secrets/{URL_NAME}",
                               fix="use an address such as https://ntfy.sh/TOPIC")  # fmt: skip
    if form not in FORMATS:
        raise EnvironmentFault(f"{form!r} is not a format for notifications", code="notify-format",
                               where="DROPFORGE_NOTIFY_FORMAT", fix=f"one of: {', '.join(FORMATS)}")  # fmt: skip

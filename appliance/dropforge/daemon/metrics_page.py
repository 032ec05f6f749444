"""Numbers for Prometheus on http://127.0.0.1:PORT/metrics, in its text format (version 0.0.4).

The loop writes the page, a thread hands it out: a slow or hostile reader touches nothing of the queue.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PATH = "/metrics"
HOST = "127.0.0.1"
_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_OWN_NAMES = frozenset({"127.0.0.1", "localhost"})
_READ_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """One moment of the daemon."""

    jobs: Mapping[str, int]
    """Folder (queue, running, held) to its number of tickets."""
    ended: Mapping[str, int]
    """State to the number of attempts that led to it, since the daemon started."""
    inbox: int
    problems: int
    disk_free: int
    memory_available: int | None
    running: Sequence[Mapping[str, Any]]
    """status.json of each running job."""


def as_text(numbers: Numbers) -> str:
    """The page. Labels are escaped as the format asks; a number nobody knows is left out."""
    lines: list[str] = []

    def metric(name: str, kind: str, meaning: str, rows: Iterable[tuple[Mapping[str, str], Any]]) -> None:
        samples = [f"dropforge_{name}{_labels(labels)} {value}" for labels, value in rows if _is_number(value)]
        if samples:
            lines.extend([f"# HELP dropforge_{name} {meaning}", f"# TYPE dropforge_{name} {kind}", *samples])

    metric("up", "gauge", "1 while the daemon serves its data root.", [({}, 1)])
    metric("jobs", "gauge", "Tickets by folder.", (({"folder": k}, v) for k, v in numbers.jobs.items()))
    metric("jobs_ended_total", "counter", "Ends of attempts by the state they led to, since the daemon started.",
           (({"state": k}, v) for k, v in numbers.ended.items()))  # fmt: skip
    metric("inbox_files", "gauge", "Files in the inbox that are no job yet.", [({}, numbers.inbox)])
    metric("problems", "gauge", "Standing problems of the daemon.", [({}, numbers.problems)])
    metric("disk_free_bytes", "gauge", "Free space of the data root.", [({}, numbers.disk_free)])
    metric("memory_available_bytes", "gauge", "Memory that can still be had.", [({}, numbers.memory_available)])
    for key, meaning in _OF_A_JOB.items():
        metric(f"job_{key}", "gauge", meaning, (({"id": str(s.get("id", ""))}, s.get(key)) for s in numbers.running))
    return "\n".join(lines) + "\n"


_OF_A_JOB = {
    "step": "Optimizer steps done.", "total_steps": "Optimizer steps in all.", "epoch": "Epochs done.",
    "loss": "Latest training loss.", "learning_rate": "Latest learning rate.",
    "trained_tokens_per_second": "Tokens that count in the loss, per second.",
    "eta_seconds": "Seconds until training ends, estimated.", "attempt": "Number of the attempt.",
}  # fmt: skip


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _labels(labels: Mapping[str, str]) -> str:
    escaped = (f'{key}="{_escape(value)}"' for key, value in labels.items())
    return "{" + ",".join(escaped) + "}" if labels else ""


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class MetricsServer:
    """Serves the latest page while entered. Port 0 means off; raises OSError when the port is taken."""

    def __init__(self, *, port: int) -> None:
        self._port = port
        self._server: ThreadingHTTPServer | None = None
        self.page = ""

    @property
    def on(self) -> bool:
        return self._server is not None

    def start(self) -> None:
        if not self._port or self._server is not None:
            return
        self._server = ThreadingHTTPServer((HOST, self._port), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


def _handler(source: MetricsServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _READ_TIMEOUT_SECONDS

        def do_GET(self) -> None:
            # A page in somebody's browser could reach loopback under a name of its own (DNS rebinding).
            if self.headers.get("Host", "").partition(":")[0] not in _OWN_NAMES:
                self.send_error(403)
            elif self.path != PATH:
                self.send_error(404)
            else:
                body = source.page.encode()
                self.send_response(200)
                self.send_header("Content-Type", _CONTENT_TYPE)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Scrapes are not worth a line."""

    return Handler

"""The page /dropforge/ behind Jupyter's login: what the daemon last wrote to queue.json, to be read only.

A Jupyter server extension, so that the server's own login, cookies and headers guard it; it listens on no port of its
own. /dropforge/queue.json is the file itself, for programs with a token-free session.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jupyter_server.base.handlers import JupyterHandler
from jupyter_server.utils import url_path_join
from tornado import web

FACTS = Path("/run/dropforge/facts.json")
LARGEST_BYTES = 8 << 20
STALE_SECONDS = 15.0
"""The daemon writes every 2 s."""
REFRESH_SECONDS = 5
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em;color:#222;background:#fff}"
    "table{border-collapse:collapse;width:100%;margin-bottom:1.5em}td,th{text-align:left;padding:.3em .8em .3em 0;"
    "border-bottom:1px solid #ddd;vertical-align:top;overflow-wrap:anywhere}.bad{color:#b00020;font-weight:600}"
    "@media(prefers-color-scheme:dark){body{color:#ddd;background:#161616}td,th{border-color:#444}.bad{color:#ff6b7a}}"
)


class StaleError(Exception):
    """There is nothing to show. The message says why."""


def read_queue(data: Path) -> dict[str, Any]:
    """Raises StaleError when the daemon has not written the file, or wrote something else than it should."""
    path = data / "queue.json"
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise StaleError(f"{path} is larger than {LARGEST_BYTES >> 20} MiB")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StaleError("the daemon has written no status yet") from None
    except (OSError, ValueError) as error:
        raise StaleError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict) or value.get("schema") != 1:
        raise StaleError(f"{path} is not a status page of this release")
    return value


def page(queue: dict[str, Any], *, now: datetime) -> str:
    """HTML without scripts; every text of a job is escaped."""
    age = (now - datetime.fromisoformat(queue["updated"])).total_seconds()
    daemon = f"the daemon is {queue['daemon']}"
    parts = [f"<p>{html.escape(daemon)}; written {max(age, 0):.0f} s ago</p>"]
    if age > STALE_SECONDS or queue["daemon"] == "stopped":
        parts = [
            f'<p class="bad">{html.escape(daemon)}, and has written nothing for {age:.0f} s: what follows is old</p>'
        ]
    parts += [f'<p class="bad">{html.escape(problem)}</p>' for problem in queue["problems"]]
    parts += [
        table("Running", ("job", "state", "step", "loss", "seconds left"),
              [(j["id"], j["state"], progress(j), j.get("loss"), j.get("eta_seconds")) for j in queue["running"]]),
        table("Queue", ("job", "priority", "waits for"),
              [(j["id"], j["priority"], j["waiting_for"]) for j in queue["queued"]]),
        table("Held: these need you", ("job", "reason", "message"),
              [(j["id"], j["reason"], j["message"]) for j in queue["held"]]),
        table("Inbox", ("file", "", ""), [(e["file"], e["stage"], e["message"]) for e in queue["inbox"]]),
        table("Lately ended", ("job", "state", "message"),
              [(j["id"], j["state"], j["message"]) for j in queue["ended"]]),
    ]  # fmt: skip
    if queue["queued_more"]:
        parts.append(f"<p>... and {int(queue['queued_more'])} more in the queue</p>")
    if not any(queue[kind] for kind in ("running", "queued", "held", "inbox", "ended")):
        parts.append("<p>Nothing to do. Drop a job into <code>inbox/</code>.</p>")
    return document("".join(parts))


def progress(job: dict[str, Any]) -> str | None:
    step, total = job.get("step"), job.get("total_steps")
    return None if step is None else f"{step} of {total}" if total else str(step)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return ""
    lines = ["".join(f"<td>{html.escape('' if cell is None else str(cell))}</td>" for cell in row) for row in rows]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    return f"<h2>{html.escape(title)}</h2><table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def document(body: str) -> str:
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="{REFRESH_SECONDS}">'
        f"<title>Dropforge</title><style>{STYLE}</style><h1>Dropforge</h1>{body}"
        "<p>To be read only. Cancel, retry and the rest: <code>dropforge --help</code> in a terminal.</p></html>"
    )


class Status(JupyterHandler):
    """GET /dropforge/, logged in. 503 with the reason while there is nothing to show."""

    def initialize(self, *, data: Path) -> None:
        self._data = data

    @web.authenticated
    def get(self) -> None:
        self.set_header("Content-Type", "text/html; charset=utf-8")
        self.set_header("Cache-Control", "no-store")
        try:
            self.finish(page(read_queue(self._data), now=datetime.now(UTC)))
        except StaleError as why:
            self.set_status(503)
            self.finish(document(f'<p class="bad">{html.escape(str(why))}</p>'))


class Queue(Status):
    """GET /dropforge/queue.json, logged in."""

    @web.authenticated
    def get(self) -> None:
        self.set_header("Content-Type", "application/json")
        self.set_header("Cache-Control", "no-store")
        try:
            self.finish(json.dumps(read_queue(self._data)))
        except StaleError as why:
            self.set_status(503)
            self.finish(json.dumps({"error": str(why)}))


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    return [{"module": "status_route"}]


def _load_jupyter_server_extension(server: Any) -> None:
    data = Path(json.loads(FACTS.read_text(encoding="utf-8"))["data"])
    base = server.web_app.settings["base_url"]
    server.web_app.add_handlers(".*$", [
        (url_path_join(base, "dropforge"), web.RedirectHandler, {"url": url_path_join(base, "dropforge/")}),
        (url_path_join(base, "dropforge/"), Status, {"data": data}),
        (url_path_join(base, "dropforge/queue.json"), Queue, {"data": data}),
    ])  # fmt: skip

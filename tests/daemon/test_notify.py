"""Telling of ended jobs, against a real HTTP server on loopback."""

from __future__ import annotations

import base64
import json
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from daemon_harness import FAST, Harness, drop, spec_text, wait_until
from dropforge.daemon.notify import Message, Notifier
from dropforge.errors import EnvironmentFault
from dropforge.paths import DataRoot

SECRET = "hunter2-hunter2"


@dataclass
class Receiver:
    url: str = ""
    fail_first: int = 0
    received: list[tuple[dict, bytes]] = field(default_factory=list)


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    box = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            box.received.append((dict(self.headers), body))
            self.send_response(500 if len(box.received) <= box.fail_first else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args) -> None:
            pass

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        box.url = f"http://127.0.0.1:{server.server_port}/topic-{SECRET}"
        yield box
        server.shutdown()


def message(**changes) -> Message:
    fields = {"id": "000001-a-00000000", "name": "a", "state": "failed", "reason": "crash", "message": "broke",
              "result": None, "time": "2026-01-01T00:00:00+00:00"}  # fmt: skip
    return Message(**{**fields, **changes})


def test_an_ended_job_is_told_once_as_json(root: DataRoot, receiver: Receiver) -> None:
    with Harness(root, options=replace(FAST, notify_url=receiver.url)) as harness:
        drop(root, "a.yaml", spec_text("crash-at-1"))
        harness.until_in("failed")
        wait_until(lambda: receiver.received)
    ((headers, body),) = receiver.received
    told = json.loads(body)
    assert headers["Content-Type"] == "application/json"
    assert (told["schema"], told["event"], told["name"]) == (1, "job", "crash-at-1")
    assert (told["state"], told["reason"]) == ("failed", "crash")
    assert "RuntimeError" in told["message"]


def test_ntfy(root: DataRoot, receiver: Receiver) -> None:
    notifier = Notifier(root, url=receiver.url, form="ntfy")
    notifier.tell(message(name="Bär", message="kaputt"))
    notifier.close()
    ((headers, body),) = receiver.received
    assert body.decode() == "Bär\nkaputt"
    assert (headers["Title"], headers["Priority"], headers["Tags"]) == ("000001-a-00000000: failed", "high", "x")


def test_it_is_tried_again_and_then_given_up(
    root: DataRoot, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.fail_first = 2
    notifier = Notifier(root, url=receiver.url, delays=(0.01, 0.01))
    notifier.tell(message())
    wait_until(lambda: len(receiver.received) == 3)
    receiver.fail_first = 1000
    notifier.tell(message())
    wait_until(lambda: len(receiver.received) == 6)
    notifier.close()
    assert "HTTP 500" in caplog.text
    assert SECRET not in caplog.text, "the address is not shown"


def test_secrets_are_taken_out_in_every_form_and_the_token_is_sent(root: DataRoot, receiver: Receiver) -> None:
    (root.secrets / "HF_TOKEN").write_text("hf_abc/def+ghi\n")
    (root.secrets / "NOTIFY_TOKEN").write_text("tk_12345678\n")
    (root.secrets / "NOTIFY_URL").write_text(receiver.url + "\n")
    encoded = base64.b64encode(b"hf_abc/def+ghi").decode()
    notifier = Notifier(root)
    notifier.tell(message(message=f"hf_abc/def+ghi hf_abc%2Fdef%2Bghi {encoded} {receiver.url} tk_12345678 kept"))
    notifier.close()
    ((headers, body),) = receiver.received
    assert headers["Authorization"] == "Bearer tk_12345678"
    assert json.loads(body)["message"] == " ".join(["[redacted]"] * 5) + " kept"


def test_an_address_nobody_answers_at_does_not_hold_up_the_queue(
    root: DataRoot, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    began = time.monotonic()
    with Harness(root, options=replace(FAST, notify_url="http://127.0.0.1:9/x")) as harness:
        drop(root, "a.yaml")
        harness.until_in("done")
    assert time.monotonic() - began < 15
    assert "could not be notified" in caplog.text


@pytest.mark.parametrize(("url", "form", "code"), [("file:///etc/passwd", "webhook", "notify-url"),
                                                   ("topic", "ntfy", "notify-url"), ("http://h/x", "sms", "notify-format")])  # fmt: skip
def test_settings_that_cannot_work_are_refused_at_the_start(root: DataRoot, url: str, form: str, code: str) -> None:
    with pytest.raises(EnvironmentFault) as caught:
        Notifier(root, url=url, form=form)
    assert caught.value.code == code

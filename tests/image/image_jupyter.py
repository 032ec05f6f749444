"""A browser's part in using Jupyter: log in through the form, keep cookies, call the API, talk to a kernel's websocket."""

from __future__ import annotations

import base64
import http.client
import http.cookies
import json
import os
import socket
import struct
import uuid
from typing import Any
from urllib.parse import urlencode


class Browser:
    """One visitor with a cookie jar."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.cookies: dict[str, str] = {}

    def ask(
        self, method: str, path: str, *, form: dict[str, str] | None = None, body: Any = None,
        headers: dict[str, str] | None = None,
    ) -> http.client.HTTPResponse:  # fmt: skip
        """One request; the answer has been read, its text is in `.text`."""
        sent = {"Cookie": self._cookie_header(), **(headers or {})}
        data = None
        if form is not None:
            data, sent["Content-Type"] = urlencode(form).encode(), "application/x-www-form-urlencoded"
        elif body is not None:
            data, sent["Content-Type"] = json.dumps(body).encode(), "application/json"
            sent["X-XSRFToken"] = self.cookies.get("_xsrf", "")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, body=data, headers=sent)
        answer = connection.getresponse()
        answer.text = answer.read().decode("utf-8", errors="replace")  # type: ignore[attr-defined]
        for line in answer.headers.get_all("Set-Cookie") or []:
            for name, morsel in http.cookies.SimpleCookie(line).items():
                self.cookies[name] = morsel.value
        connection.close()
        return answer

    def login(self, password: str) -> int:
        """Post the login form. 302: logged in; 401: wrong password; 429: closed for a while."""
        self.ask("GET", "/login")
        return self.ask("POST", "/login", form={"_xsrf": self.cookies["_xsrf"], "password": password}).status

    def api(self, path: str, *, method: str = "GET", body: Any = None) -> Any:
        answer = self.ask(method, path, body=body)
        assert answer.status in (200, 201), f"{method} {path}: {answer.status} {answer.text}"
        return json.loads(answer.text)

    def _cookie_header(self) -> str:
        return "; ".join(f"{name}={value}" for name, value in self.cookies.items())

    def websocket(self, path: str) -> WebSocket:
        """Raises ConnectionRefusedError with the status when the server does not upgrade."""
        return WebSocket(self.port, path, self._cookie_header())

    def run_cell(self, code: str) -> str:
        """Start a kernel, run `code`, return what it printed; errors as text."""
        kernel = self.api("/api/kernels", method="POST", body={"name": "python3"})
        channel = self.websocket(f"/api/kernels/{kernel['id']}/channels")
        message = uuid.uuid4().hex
        header = {
            "msg_id": message, "username": "test", "session": uuid.uuid4().hex, "msg_type": "execute_request",
            "version": "5.3", "date": "2026-01-01T00:00:00Z",
        }  # fmt: skip
        content = {"code": code, "silent": False, "store_history": False, "user_expressions": {}, "allow_stdin": False}
        channel.send(
            json.dumps({"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"})
        )
        printed, idle, replied = "", False, False
        while not (idle and replied):
            reply = json.loads(channel.receive())
            if reply["parent_header"].get("msg_id") != message:
                continue
            kind, said = reply["msg_type"], reply["content"]
            printed += said["text"] if kind == "stream" else ""
            printed += "\n".join(said["traceback"]) if kind == "error" else ""
            idle |= kind == "status" and said["execution_state"] == "idle"
            replied |= kind == "execute_reply"
        channel.close()
        self.ask("DELETE", f"/api/kernels/{kernel['id']}", headers={"X-XSRFToken": self.cookies["_xsrf"]})
        return printed


class WebSocket:
    """RFC 6455, as much as a client of Jupyter needs: text frames out, text and binary frames in."""

    def __init__(self, port: int, path: str, cookie: str) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\nCookie: {cookie}\r\n\r\n".encode()
        )
        self._stream = self._socket.makefile("rb")
        status = self._stream.readline().decode().split()[1]
        while self._stream.readline().strip():
            pass
        if status != "101":
            self.close()
            raise ConnectionRefusedError(status)

    def send(self, text: str) -> None:
        self._send(0x81, text.encode())

    def _send(self, first: int, data: bytes) -> None:
        mask, size = os.urandom(4), len(data)
        head = bytes([first]) + (bytes([0x80 | size]) if size < 126 else b"\xfe" + struct.pack("!H", size) if size < 65536
                          else b"\xff" + struct.pack("!Q", size))  # fmt: skip
        self._socket.sendall(head + mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(data)))

    def receive(self) -> str:
        """The next message, put together from its frames."""
        message = b""
        while True:
            first, second = self._read(2)
            size = second & 0x7F
            if size == 126:
                (size,) = struct.unpack("!H", self._read(2))
            elif size == 127:
                (size,) = struct.unpack("!Q", self._read(8))
            data = self._read(size)
            if first & 0x0F == 8:
                raise ConnectionResetError("the server closed the websocket")
            if first & 0x0F == 9:  # a ping; Jupyter closes on those who do not answer, during a long cell
                self._send(0x8A, data)
            if first & 0x0F in (9, 10):
                continue
            message += data
            if first & 0x80:
                return message.decode("utf-8")

    def _read(self, size: int) -> bytes:
        data = self._stream.read(size)
        if len(data) < size:
            raise ConnectionResetError("the websocket ended")
        return data

    def close(self) -> None:
        self._stream.close()
        self._socket.close()

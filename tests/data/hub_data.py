"""A small stand-in of the hub's HTTP API for reading data sets, on the loopback address: revisions, trees, files."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


def commit_of(files):
    """A commit id made of the content."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class DataHub:
    """One data set: {branch or tag: {path: bytes}}. `requests` are the paths that were asked for."""

    def __init__(self, name, revisions):
        self.name, self.revisions, self.requests = name, revisions, []

    def files(self, revision):
        """The commit and files of a branch, a tag or a commit; None when there is none."""
        for name, files in self.revisions.items():
            if revision in (name, commit_of(files)):
                return commit_of(files), files
        return None

    @contextmanager
    def running(self):
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: DataHub

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self._answer()

    def do_HEAD(self):
        self._answer(body=False)

    def do_POST(self):
        sent = self.rfile.read(int(self.headers.get("content-length", 0))).decode()
        asked = json.loads(sent) if sent.startswith("{") else parse_qs(sent)
        self._answer(wanted=asked.get("paths", []))

    def _answer(self, *, body=True, wanted=None):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(path)
        name = re.escape(self.hub.name)
        if found := re.fullmatch(rf"/api/datasets/{name}(?:/revision/(.+))?", path):
            return self._info(found[1] or "main", body)
        if found := re.fullmatch(rf"/api/datasets/{name}/(tree|paths-info)/([^/]+)(?:/(.*))?", path):
            return self._tree(found[2], found[3] or "", wanted, body)
        if found := re.fullmatch(rf"/datasets/{name}/resolve/([^/]+)/(.+)", path):
            return self._file(found[1], found[2], body)
        return self._send(404, b"{}", {"x-error-code": "RepoNotFound"}, body)

    def _info(self, revision, body):
        found = self.hub.files(revision)
        if found is None:
            return self._send(404, b"{}", {"x-error-code": "RevisionNotFound"}, body)
        commit, files = found
        info = {
            "id": self.hub.name, "sha": commit, "private": False, "gated": False, "disabled": False, "downloads": 0,
            "likes": 0, "tags": [], "siblings": [{"rfilename": name} for name in files],
        }  # fmt: skip
        return self._send(200, json.dumps(info).encode(), {}, body)

    def _tree(self, revision, folder, wanted, body):
        found = self.hub.files(revision)
        if found is None:
            return self._send(404, b"{}", {"x-error-code": "RevisionNotFound"}, body)
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in found[1].items()
            if name.startswith(folder) and (wanted is None or name in wanted)
        ]
        return self._send(200, json.dumps(entries).encode(), {}, body)

    def _file(self, revision, name, body):
        found = self.hub.files(revision)
        if found is None or name not in found[1]:
            return self._send(404, b"", {"x-error-code": "EntryNotFound"}, body)
        content = found[1][name]
        etag = {"etag": f'"{hashlib.sha1(content).hexdigest()}"', "x-repo-commit": found[0]}
        return self._send(200, content, etag, body)

    def _send(self, status, content, headers, body):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

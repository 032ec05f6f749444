"""A small stand-in of the hub's HTTP API on the loopback address: create, preupload, LFS, commit, list.

It cannot be confused with the real hub: it listens on 127.0.0.1 only, on a port of its own, knows one token that the
real hub would refuse, and `only_loopback` makes every connection to anywhere else fail.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_stand_in_0000"


@contextmanager
def only_loopback(monkeypatch):
    """Connections to anything but 127.0.0.1 and Unix sockets fail with an assertion."""
    real = socket.socket.connect

    def connect(self, address):
        if self.family != socket.AF_UNIX:
            assert address[0] in ("127.0.0.1", "localhost"), f"a test wanted to connect to {address}"
        return real(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    yield


class StandIn:
    """Repositories by name: {"private": bool, "files": {path: bytes}, "commits": [message]}."""

    def __init__(self):
        self.repos = {}
        self.stored = {}
        self.requests = []
        self.fail = None
        """(pattern of a path, status): requests for it are answered with the status."""

    @contextmanager
    def running(self):
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        self.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, value=None):
        body = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_any(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self.chunked()
        path = self.path.split("?")[0]
        self.hub.requests.append((self.command, path))
        if self.hub.fail and re.search(self.hub.fail[0], path):
            return self.answer(self.hub.fail[1], {"error": "as the test wanted"})
        if not path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        for method, pattern, function in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command:
                return function(self, body, *match.groups())
        return self.answer(404, {"error": f"the stand-in does not know {self.command} {path}"})

    def chunked(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    do_GET = do_POST = do_PUT = do_HEAD = handle_any  # noqa: N815  (http.server's names)

    def create(self, body):
        asked = json.loads(body)
        name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
        if name in self.hub.repos:
            return self.answer(409, {"error": "You already created this model repo", "url": self.url(name)})
        private = asked.get("private", asked.get("visibility") == "private")
        self.hub.repos[name] = {"private": private, "files": {}, "commits": []}
        return self.answer(200, {"url": self.url(name), "name": name, "id": name})

    def url(self, name):
        return f"{self.hub.endpoint}/{name}"

    def validate(self, body):
        """The metadata header of a model card, as strict as the hub about the fields we write."""
        match = re.match(r"---\n(.*?)\n---", json.loads(body)["content"], re.DOTALL)
        fields = dict(line.split(": ", 1) for line in match[1].splitlines()) if match else {}
        errors = []
        if "base_model" in fields and not re.fullmatch(r"[\w.-]+/[\w.-]+", fields["base_model"]):
            errors.append({"message": '"base_model" must be a model id'})
        if fields.get("base_model_relation", "adapter") not in ("adapter", "finetune", "quantized", "merge"):
            errors.append({"message": '"base_model_relation" is unknown'})
        return self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, body, repo, revision):
        files = [
            {
                "path": file["path"], "shouldIgnore": False,
                "uploadMode": "lfs" if file["path"].endswith((".gguf", ".safetensors", ".model")) else "regular",
            }
            for file in json.loads(body)["files"]
        ]  # fmt: skip
        return self.answer(200, {"files": files})

    def batch(self, body, repo):
        objects = []
        for entry in json.loads(body)["objects"]:
            found = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.hub.stored:
                found["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{entry['oid']}"}}
            objects.append(found)
        return self.answer(200, {"transfer": "basic", "objects": objects})

    def store(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, {"error": "the content is not what its hash says"})
        self.hub.stored[oid] = body
        return self.answer(200)

    def commit(self, body, repo, revision):
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        files = self.hub.repos[repo]["files"]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.repos[repo]["commits"].append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            else:
                raise AssertionError(line["key"])
        oid = hashlib.sha1(body).hexdigest()
        return self.answer(
            200, {"commitUrl": f"{self.url(repo)}/commit/{oid}", "commitOid": oid, "pullRequestUrl": None}
        )

    def info(self, body, repo, revision=None):
        if repo not in self.hub.repos:
            return self.answer(404, {"error": "Repository not found"})
        files = self.hub.repos[repo]["files"]
        siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
        value = {"_id": "0", "id": repo, "modelId": repo, "sha": "0" * 40, "private": True, "siblings": siblings}
        return self.answer(200, value)

    def tree(self, body, repo, revision):
        files = self.hub.repos[repo]["files"]
        return self.answer(
            200,
            [{"type": "file", "path": name, "size": len(content), "oid": "0" * 40} for name, content in files.items()],
        )


_REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", f"/api/models/{_REPO}/preupload/([^/]+)", _Handler.preupload),
    ("POST", f"/{_REPO}\\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/lfs/([0-9a-f]{64})", _Handler.store),
    ("POST", f"/api/models/{_REPO}/commit/([^/]+)", _Handler.commit),
    ("GET", f"/api/models/{_REPO}/tree/([^/]+)", _Handler.tree),
    ("GET", f"/api/models/{_REPO}/revision/([^/]+)", _Handler.info),
    ("GET", f"/api/models/{_REPO}", _Handler.info),
)

"""Models given to a running Ollama, against a stand-in of its HTTP API on the loopback address."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from dropforge.errors import EnvironmentFault, ExportError
from dropforge.export.modelfile import Modelfile
from dropforge.export.ollama_push import push_to_ollama
from hub_stand_in import only_loopback


class Ollama:
    """Blobs by digest, models by name, as /api/create got them."""

    def __init__(self):
        self.version, self.blobs, self.models, self.requests = "0.31.2", {}, {}, []
        self.shows = {}
        """What /api/show says instead of what it was given."""


class Handler(BaseHTTPRequestHandler):
    ollama: Ollama

    def log_message(self, *args):
        pass

    def answer(self, status, value=None):
        body = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self):
        self.ollama.requests.append(("HEAD", self.path))
        self.answer(200 if self.path.rpartition("/")[2] in self.ollama.blobs else 404)

    def do_GET(self):
        self.answer(200, {"version": self.ollama.version}) if self.path == "/api/version" else self.answer(404)

    def do_POST(self):
        self.ollama.requests.append(("POST", self.path))
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.startswith("/api/blobs/sha256:"):
            digest = self.path.rpartition("/")[2]
            if f"sha256:{hashlib.sha256(body).hexdigest()}" != digest:
                return self.answer(400, {"error": "digest mismatch"})
            self.ollama.blobs[digest] = body
            return self.answer(201)
        asked = json.loads(body)
        if self.path == "/api/create":
            missing = [d for d in asked["files"].values() if d not in self.ollama.blobs]
            self.ollama.models[asked["model"]] = asked
            return self.answer(200, {"status": "error" if missing else "success"})
        if self.path == "/api/show":
            model = self.ollama.models[asked["model"]]
            return self.answer(
                200, {"template": model.get("template"), "system": model.get("system"), **self.ollama.shows}
            )
        return self.answer(404, {"error": "unknown"})


@pytest.fixture
def ollama(monkeypatch):
    ollama = Ollama()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"ollama": ollama}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    ollama.url = f"http://127.0.0.1:{server.server_address[1]}"
    with only_loopback(monkeypatch):
        yield ollama
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def gguf(tmp_path):
    path = tmp_path / "x-Q8_0.gguf"
    path.write_bytes(b"GGUF" + bytes(1000))
    return path


MODEL = Modelfile(
    gguf="./gguf/x-Q8_0.gguf", system="Be brief.", stops=("<|im_end|>", "</s>"), context=4096, license="mit"
)


def test_everything_of_the_modelfile_arrives(ollama, gguf):
    log = []
    done = push_to_ollama(MODEL, (gguf,), name="sums", url=ollama.url, log=log.append)
    assert done == {"name": "sums", "version": "0.31.2", "uploaded": True, "run": "ollama run sums"}
    made = ollama.models["sums"]
    assert ollama.blobs[made["files"]["x-Q8_0.gguf"]] == gguf.read_bytes()
    assert made["system"] == "Be brief." and made["license"] == "mit" and "template" not in made
    assert made["parameters"] == {"stop": ["<|im_end|>", "</s>"], "num_ctx": 4096}
    again = push_to_ollama(MODEL, (gguf,), name="sums", url=ollama.url, log=log.append)
    assert not again["uploaded"]
    assert len([path for method, path in ollama.requests if method == "POST" and "blobs" in path]) == 1
    assert len(log) == 3


def test_a_projector_goes_along_and_needs_a_new_ollama(ollama, gguf, tmp_path):
    projector = tmp_path / "x-mmproj-F16.gguf"
    projector.write_bytes(b"GGUF" + bytes(500))
    model = Modelfile(gguf="x", projector="y", template="{{ .Prompt }}")
    push_to_ollama(model, (gguf, projector), name="sums", url=ollama.url, log=print)
    files = ollama.models["sums"]["files"]
    assert {name: ollama.blobs[digest] for name, digest in files.items()} == {
        path.name: path.read_bytes() for path in (gguf, projector)
    }
    ollama.version = "0.29.9"
    with pytest.raises(ExportError, match=r"0\.29\.9"):
        push_to_ollama(model, (gguf, projector), name="sums", url=ollama.url, log=print)


def test_an_old_ollama_gets_only_models_with_a_template(ollama, gguf):
    ollama.version = "0.29.9"
    with pytest.raises(ExportError, match=r"0\.29\.9") as error:
        push_to_ollama(MODEL, (gguf,), name="sums", url=ollama.url, log=print)
    assert error.value.code == "ollama-refused" and ollama.models == {}
    text = "{{ range .Messages }}{{ .Content }}{{ end }}"
    push_to_ollama(Modelfile(gguf="x", template=text), (gguf,), name="sums", url=ollama.url, log=print)
    assert ollama.models["sums"]["template"] == text


def test_another_understanding_is_noticed(ollama, gguf):
    ollama.shows = {"system": "Be long."}
    with pytest.raises(ExportError, match="another system text"):
        push_to_ollama(MODEL, (gguf,), name="sums", url=ollama.url, log=print)


def test_nobody_there(gguf):
    with pytest.raises(EnvironmentFault) as error:
        push_to_ollama(MODEL, (gguf,), name="sums", url="http://127.0.0.1:9", log=print)
    assert error.value.code == "ollama-unreachable"


def test_the_export_pushes_when_one_is_configured(ollama, llama, llama_cpp, tmp_path, monkeypatch):
    from dropforge.export import export_one
    from dropforge.export.stage import Stage
    from dropforge.paths import ResultFolder
    from dropforge.settings import settings

    result = ResultFolder(tmp_path / "result")
    result.path.mkdir()
    stage = Stage(llama.request(("ollama",), result=result, work=tmp_path / "work"), log=llama.log.append)
    stage._results = {"merged": llama.stage.merged, "base gguf": llama.stage.base_gguf}
    assert export_one(stage, "gguf:q8_0").ok
    monkeypatch.setenv("DROPFORGE_OLLAMA_URL", ollama.url)
    settings.cache_clear()
    try:
        report = export_one(stage, "ollama")
    finally:
        monkeypatch.undo()
        settings.cache_clear()
    assert report.ok, report.problem
    assert report.checks["pushed"]["name"] == "test-model"
    assert report.checks["create"] == "ollama create test-model -f Modelfile"
    made = ollama.models["test-model"]
    assert made["template"] == stage.ollama_template.text
    assert ollama.blobs[made["files"]["test-model-Q8_0.gguf"]][:4] == b"GGUF"

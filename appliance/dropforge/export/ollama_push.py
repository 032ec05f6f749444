"""Give a finished GGUF and its Modelfile to a running Ollama, through its HTTP API.

    HEAD /api/blobs/sha256:...   does it have the file?      POST the same: upload it
    POST /api/create             make the model of it        POST /api/show: what it understood
(Ollama, docs/api.md.) The address is the operator's (DROPFORGE_OLLAMA_URL), never a job's.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dropforge.errors import EnvironmentFault, ExportError, Reason
from dropforge.export.modelfile import JINJA_VERSION, Modelfile
from dropforge.files import sha256_file

SECONDS = 600.0


def push_to_ollama(
    model: Modelfile, files: tuple[Path, ...], *, name: str, url: str, log: Callable[[str], None]
) -> dict[str, Any]:  # fmt: skip
    """Create `name` of these GGUF files in the Ollama at `url` (http://host:port); returns what was done.

    Raises EnvironmentFault ollama-unreachable; ExportError ollama-refused when it does not take the model, is too old
    for one without a TEMPLATE, or understood something else than the Modelfile says.
    """
    version = str(_ask(url, "GET", "/api/version").get("version", ""))
    if (model.template is None or model.projector) and _number(version) < _number(JINJA_VERSION):
        why = "its projector runs in llama-server" if model.projector else "its chat template is Jinja"
        raise _refused(f"this Ollama is version {version}, and the model needs {JINJA_VERSION}", why=why)
    digests = {gguf.name: f"sha256:{sha256_file(gguf)}" for gguf in files}
    uploaded = False
    for gguf in files:
        if not _has(url, digests[gguf.name]):
            log(f"uploading {gguf.name} to Ollama")
            _upload(url, digests[gguf.name], gguf)
            uploaded = True
    log(f"creating {name} in Ollama")
    parameters: dict[str, Any] = {"stop": list(model.stops)} if model.stops else {}
    if model.context is not None:
        parameters["num_ctx"] = model.context
    wanted = {
        "model": name, "files": digests, "stream": False, "template": model.template,
        "system": model.system, "license": model.license or None, "parameters": parameters or None,
    }  # fmt: skip
    status = _ask(url, "POST", "/api/create", {key: value for key, value in wanted.items() if value is not None})
    if status.get("status") != "success":
        raise _refused("Ollama did not create the model", why=json.dumps(status)[:300])
    shown = _ask(url, "POST", "/api/show", {"model": name})
    if model.template is not None and shown.get("template") != model.template:
        raise _refused("Ollama has another template than the Modelfile", why=str(shown.get("template"))[:300])
    if model.system is not None and shown.get("system") != model.system:
        raise _refused("Ollama has another system text than the Modelfile", why=str(shown.get("system"))[:300])
    return {"name": name, "version": version, "uploaded": uploaded, "run": f"ollama run {name}"}


def _ask(url: str, method: str, path: str, body: Any = None) -> dict[str, Any]:
    payload = None if body is None else json.dumps(body).encode()
    status, text = _send(url, method, path, payload, {"Content-Type": "application/json"})
    if status != http.client.OK:
        raise _refused(f"Ollama answered {status} to {path}", why=text[:300])
    # Without a stream the answer is one object; older versions send one per line all the same.
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        answer: dict[str, Any] = json.loads(text) if len(lines) <= 1 else json.loads(lines[-1])
    except json.JSONDecodeError:
        answer = json.loads(text)
    return answer


def _has(url: str, digest: str) -> bool:
    status, _ = _send(url, "HEAD", f"/api/blobs/{digest}", None, {})
    return status == http.client.OK


def _upload(url: str, digest: str, path: Path) -> None:
    with path.open("rb") as stream:
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(path.stat().st_size)}
        status, text = _send(url, "POST", f"/api/blobs/{digest}", stream, headers)
    if status not in (http.client.OK, http.client.CREATED):
        raise _refused(f"Ollama answered {status} to the upload of {path.name}", why=text[:300])


def _send(url: str, method: str, path: str, body: Any, headers: dict[str, str]) -> tuple[int, str]:
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "localhost", parts.port, timeout=SECONDS)
    try:
        connection.request(method, path, body, headers)
        reply = connection.getresponse()
        return reply.status, reply.read().decode("utf-8", errors="replace")
    except (OSError, http.client.HTTPException) as error:
        raise EnvironmentFault(
            "Ollama cannot be reached", code="ollama-unreachable", where="DROPFORGE_OLLAMA_URL", why=str(error),
            fix="start `ollama serve`, or unset the variable; the Modelfile is made without it", reason=Reason.OFFLINE,
        ) from error  # fmt: skip
    finally:
        connection.close()


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.partition("-")[0].split(".") if part.isdigit())


def _refused(what: str, *, why: str) -> ExportError:
    return ExportError(
        what, code="ollama-refused", where="Ollama", why=why,
        fix="look at Ollama's own log; the GGUF and the Modelfile are in the result",
    )  # fmt: skip

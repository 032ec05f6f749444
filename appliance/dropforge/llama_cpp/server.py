"""llama-server for one GGUF, spoken to over a private Unix socket: no port to guess, nobody else can connect."""

from __future__ import annotations

import base64
import http.client
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from dropforge.errors import ExportError
from dropforge.llama_cpp.child import death_signal, environment, tail
from dropforge.llama_cpp.devices import device_arguments
from dropforge.llama_cpp.locate import LlamaCpp, find_llama_cpp

START_SECONDS = 600.0
REQUEST_SECONDS = 3600.0
MAX_THREADS = 16
SMALL_FILE_BYTES = 200 * 2**20
SMALL_PROJECTOR_BYTES = 10 * 2**20


class LlamaServer:
    """Context manager around one llama-server process.

    `exact=True` keeps the KV cache in f32 and turns flash attention off, so that differences to another runtime come
    from the file alone. `lora` is a GGUF adapter that is applied at run time, `projector` the GGUF of the part that
    reads pictures. Raises ExportError (gguf-load) when a file does not load.
    """

    def __init__(
        self, model: Path, *, tools: LlamaCpp | None = None, context: int = 4096, exact: bool = False,
        threads: int | None = None, lora: Path | None = None, projector: Path | None = None,
    ) -> None:  # fmt: skip
        self.model = model.absolute()
        self._tools = tools or find_llama_cpp()
        self._context = context
        self._exact = exact
        self._lora = lora.absolute() if lora else None
        self._projector = projector.absolute() if projector else None
        self._threads = threads or _threads_for(model, projector)
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> LlamaServer:
        self._folder = Path(tempfile.mkdtemp(prefix="dropforge-llama-"))
        try:
            self._start(self._folder)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the process and remove its folder. May be called twice."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    @property
    def socket(self) -> Path:
        """The Unix socket the process listens on. Only inside the with block."""
        assert self._folder is not None, "LlamaServer is used outside of its with block"
        return self._folder / "llama.sock"

    def _start(self, folder: Path) -> None:
        command = [
            str(self._tools.tool("llama-server")), "--model", str(self.model), "--host", str(self.socket),
            "--ctx-size", str(self._context), "--parallel", "1", "--threads", str(self._threads), "--jinja",
            "--no-ui", "--no-slots", "--no-warmup", "--fit", "off", "--reasoning-format", "none", "--offline",
            *device_arguments(self._tools.root),
        ]  # fmt: skip
        if self._exact:
            # No repacking: it would put a second copy of the weights into memory.
            command += ["--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off", "--no-repack"]
        if self._lora is not None:
            command += ["--lora", str(self._lora)]
        if self._projector is not None:
            command += ["--mmproj", str(self._projector)]
        with (folder / "log.txt").open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=folder,
                env=environment(), preexec_fn=death_signal(),
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise self._failure("the GGUF does not load in llama.cpp", code="gguf-load")
            try:
                self._request("GET", "/health", None, timeout=5.0)
            except (OSError, _NotReady):
                time.sleep(0.02)
            else:
                return
        raise self._failure(f"llama-server was not ready after {START_SECONDS:.0f} s", code="gguf-load")

    def _failure(self, what: str, *, code: str) -> ExportError:
        log = self._folder / "log.txt" if self._folder else None
        said = log.read_text(encoding="utf-8", errors="replace") if log and log.exists() else ""
        return ExportError(what, code=code, where=self.model.name, why=f"llama-server said last:\n{tail(said)}")

    def _request(self, method: str, path: str, body: Any, *, timeout: float = REQUEST_SECONDS) -> Any:
        connection = _UnixConnection(str(self.socket), timeout)
        try:
            payload = None if body is None else json.dumps(body).encode()
            connection.request(method, path, payload, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            text = reply.read().decode("utf-8", errors="replace")
        finally:
            connection.close()
        if reply.status == http.client.SERVICE_UNAVAILABLE:
            raise _NotReady(text)
        if reply.status != http.client.OK:
            raise ExportError(
                f"llama-server refused {path}", code="llama-server", where=self.model.name, why=text[:500]
            )
        return json.loads(text)

    def properties(self) -> dict[str, Any]:
        """What the runtime read from the file: chat_template, bos_token, eos_token, default settings ..."""
        result: dict[str, Any] = self._request("GET", "/props", None)
        return result

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool = True) -> list[int]:
        """Token ids of `text`; `add_special` lets the file's own BOS and EOS rules act."""
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        tokens: list[int] = self._request("POST", "/tokenize", body)["tokens"]
        return tokens

    def apply_template(self, messages: list[dict[str, str]]) -> str:
        """The conversation as text, rendered by the chat template inside the file, ready for the next answer."""
        prompt: str = self._request("POST", "/apply-template", {"messages": messages})["prompt"]
        return prompt

    def continue_greedily(self, tokens: list[int], *, max_tokens: int) -> list[int]:
        """Ids of the likeliest continuation; an end token is the last one."""
        body = {
            "prompt": tokens, "n_predict": max_tokens, "temperature": 0.0, "samplers": ["temperature"],
            "cache_prompt": False, "return_tokens": True,
        }  # fmt: skip
        result: list[int] = self._request("POST", "/completion", body)["tokens"]
        return result

    def next_logprobs(self, tokens: list[int], *, listed: int, plain_token: int) -> dict[int, float]:
        """Natural log-probabilities of the `listed` likeliest next tokens, from the logits before any sampler.

        The server reports nothing when it samples half a character, so sampling is forced to `plain_token` (any token
        that is plain text); the reported values are not touched by that. Values below e^-103 are left out (float32).
        """
        body = {
            "prompt": tokens, "n_predict": 1, "n_probs": listed, "temperature": 0.0, "samplers": ["temperature"],
            "cache_prompt": True, "post_sampling_probs": False, "logit_bias": [[plain_token, 1e6]],
        }  # fmt: skip
        steps = self._request("POST", "/completion", body)["completion_probabilities"]
        return _listed(steps[0])

    def look(
        self, picture: bytes, *, before: str, after: str, max_tokens: int, listed: int, plain_token: int | None = None
    ) -> Sight:
        """Read `before`, the picture (a PNG or JPEG file) and `after`, and go on greedily.

        `plain_token` as for next_logprobs: the first token is then always reported.
        """
        marker = self.properties()["media_marker"]
        prompt = {
            "prompt_string": f"{before}{marker}{after}", "multimodal_data": [base64.b64encode(picture).decode("ascii")],
        }  # fmt: skip
        body = {
            "prompt": prompt, "n_predict": max_tokens, "n_probs": listed, "temperature": 0.0,
            "samplers": ["temperature"], "cache_prompt": True, "post_sampling_probs": False, "return_tokens": True,
            "logit_bias": [] if plain_token is None else [[plain_token, 1e6]],
        }  # fmt: skip
        reply = self._request("POST", "/completion", body)
        tokens, steps = reply["tokens"], []
        for token, step in zip(tokens, reply["completion_probabilities"], strict=False):
            if step["id"] != token:
                break  # half a character: nothing is reported before its other half
            steps.append(_listed(step))
        return Sight(read=reply["tokens_evaluated"], tokens=tokens, steps=steps)

    def chat(self, messages: list[dict[str, Any]], *, max_tokens: int, temperature: float = 0.0) -> str:
        """The assistant's answer, rendered with the chat template inside the file.

        A turn's content is its text, or a list of parts as the OpenAI interface has them (see picture_part).
        """
        body = {"messages": messages, "max_tokens": max_tokens, "temperature": temperature}
        reply = self._request("POST", "/v1/chat/completions", body)
        content: str = reply["choices"][0]["message"]["content"] or ""
        return content


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What the runtime made of a text with a picture in it."""

    read: int
    """Tokens and pieces of the picture that were read."""
    tokens: list[int]
    """The greedy continuation."""
    steps: list[dict[int, float]]
    """Natural log-probabilities of the likeliest tokens at the first of its steps."""


def picture_part(picture: bytes) -> dict[str, Any]:
    """A PNG or JPEG file as a part of a turn's content."""
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    text = base64.b64encode(picture).decode("ascii")
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{text}"}}


def _listed(step: dict[str, Any]) -> dict[int, float]:
    """Token -> log-probability; NaN where the runtime has none. Values below e^-103 are left out (float32)."""
    found = {item["id"]: item["logprob"] for item in step["top_logprobs"]}
    return {
        token: float("nan") if value is None else value
        for token, value in found.items()
        if value is None or value > -200
    }


def usable_threads() -> int:
    """Cores this process may use, at most 16: more does not help generation."""
    return min(len(os.sched_getaffinity(0)), MAX_THREADS)


def _threads_for(model: Path, projector: Path | None) -> int:
    """One thread for small files: waiting for each other costs more than a second thread brings.

    A projector has more work than its size says, because a picture is read whole at once.
    """
    large = model.exists() and model.stat().st_size > SMALL_FILE_BYTES
    return usable_threads() if large or (projector and projector.stat().st_size > SMALL_PROJECTOR_BYTES) else 1


class _NotReady(Exception):  # noqa: N818  (a state of the server, seen only in this file)
    """The model is still loading."""


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)

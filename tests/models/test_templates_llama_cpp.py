"""llama.cpp's Jinja writes every chat template like transformers does: what is served is what was trained."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest
from dropforge.cli import main
from dropforge.llama_cpp.locate import find_llama_cpp
from dropforge.models.builtin import build_builtin
from dropforge.models.templates import TEMPLATES, parse_custom
from dropforge.models.templates.apply import apply_custom, apply_template
from dropforge.settings import settings
from transformers import AutoTokenizer

pytestmark = pytest.mark.slow
SHARED = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
EXAMPLE = "{SYSTEM}\nQ: {INPUT}\nA: {OUTPUT}\nQ: {INPUT}\nA: {OUTPUT}"
CONVERSATIONS = [
    [("user", "Hi")],
    [("system", "Be brief."), ("user", "  Hi \n"), ("assistant", " a \n"), ("user", "Bye")],
]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DROPFORGE_DATA", str(folder / "data"))
        settings.cache_clear()
        (folder / "a.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
        (folder / "j.yaml").write_text(
            "version: 1\nname: t\nmodel: builtin:tiny-llama\ndata: a.jsonl\ntrain: {max_steps: 1}\nexport: [gguf:f16]\n"
        )
        assert main(["run", str(folder / "j.yaml")]) == 0
    settings.cache_clear()
    return next((folder / "data" / "results").rglob("*.gguf"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    build_builtin("tiny-llama", folder)
    return folder


def written(gguf, template, conversations, folder):
    """What llama-server makes of the conversations with this template."""
    (folder / "t.jinja").write_text(template, encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        find_llama_cpp().tool("llama-server"),
        "-m",
        gguf,
        "--port",
        port,
        "--jinja",
        "--chat-template-file",
        folder / "t.jinja",
    ]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([*map(str, command), "-c", "512", "--no-warmup"], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
                time.sleep(0.2)
        found = []
        for messages in conversations:
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/apply-template",
                json.dumps({"messages": messages}).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                found.append(json.load(answer)["prompt"])
        return found
    finally:
        server.terminate()
        server.wait()


@pytest.mark.parametrize("name", [*sorted(TEMPLATES), "an example", "other key names", "a system text"])
def test_llama_cpp_writes_the_same(gguf, folder, tmp_path, name):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if name == "an example":
        apply_custom(tokenizer, parse_custom(EXAMPLE), system='a "b"')
    elif name == "other key names":
        apply_template(tokenizer, TEMPLATES["llama-3.1"], mapping=SHARED)
    elif name == "a system text":
        apply_template(tokenizer, TEMPLATES["llama-3.1"], system='a "b"\n')
    else:
        apply_template(tokenizer, TEMPLATES[name])
    conversations = [[{"role": role, "content": text} for role, text in turns] for turns in CONVERSATIONS]
    expected = [
        tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=True)
        for turns in conversations
    ]
    # The server leaves the begin token to its tokenizer.
    found = written(gguf, tokenizer.chat_template, conversations, tmp_path)
    assert found == [text.removeprefix("<s>") for text in expected]

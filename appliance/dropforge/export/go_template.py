"""Ollama's TEMPLATE: written for simple chat templates, and proven to render the same text as the Jinja template.

Ollama renders a TEMPLATE with Go's text/template. The subset written here (range over .Messages, if / else if with eq,
fields, string literals, plain text) is rendered again by `go_render.render_go`, and a TEMPLATE counts only when every
probe conversation comes out equal. No TEMPLATE covers two turns of one role in a row: Ollama joins them beforehand.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from dropforge.export.chat_format import render
from dropforge.export.go_render import render_go
from dropforge.export.probes import RENDERED
from dropforge.export.request import Message

_CONTENT = "\ue000content\ue001"


@dataclass(frozen=True, kw_only=True)
class OllamaTemplate:
    """`text` is None when no TEMPLATE could be proven; `reason` says why in a sentence."""

    text: str | None
    reason: str
    conversations: int = 0


def ollama_template(tokenizer: Any) -> OllamaTemplate:
    """The TEMPLATE for a tokenizer's chat template, proven on the probe conversations, or why there is none."""
    if tokenizer.chat_template is None:
        return OllamaTemplate(text=None, reason="the model has no chat template")
    text = _candidate(tokenizer)
    if text is None:
        return OllamaTemplate(text=None, reason="the chat template is more than a marker before and after each turn")
    bos = tokenizer.bos_token or ""
    proven = 0
    for messages in RENDERED:
        wanted = render(tokenizer, messages)
        if wanted is None:
            return OllamaTemplate(text=None, reason="the chat template refuses some conversations")
        if render_go(text, messages) != wanted.removeprefix(bos):
            return OllamaTemplate(
                text=None, reason="a Go template cannot write every conversation as the chat template does"
            )
        proven += 1
    return OllamaTemplate(
        text=text, reason="renders every probe conversation like the chat template", conversations=proven
    )


def _candidate(tokenizer: Any) -> str | None:
    """Read the markers off three renderings and write them as a Go template."""
    bos = tokenizer.bos_token or ""
    user: tuple[Message, ...] = ({"role": "user", "content": _CONTENT},)
    opened, closed = render(tokenizer, user), render(tokenizer, user, generation=False)
    if opened is None or closed is None or not opened.startswith(closed):
        return None
    generation = opened.removeprefix(closed)
    turns: dict[str, tuple[str, str]] = {}
    turns["user"] = _around(closed.removeprefix(bos))
    answered = render(tokenizer, (*user, {"role": "assistant", "content": _CONTENT}), generation=False)
    asked = render(tokenizer, ({"role": "system", "content": _CONTENT}, *user), generation=False)
    if answered is None or asked is None or not answered.startswith(closed):
        return None
    turns["assistant"] = _around(answered.removeprefix(closed))
    if not asked.endswith(closed.removeprefix(bos)):
        return None
    turns["system"] = _around(asked.removesuffix(closed.removeprefix(bos)).removeprefix(bos))
    if any(_CONTENT in part for pair in turns.values() for part in pair):
        return None
    return _write(turns, generation)


def _around(text: str) -> tuple[str, str]:
    before, found, after = text.partition(_CONTENT)
    return (before, after) if found else (_CONTENT, _CONTENT)


def _write(turns: dict[str, tuple[str, str]], generation: str) -> str:
    """One loop over the turns; the role's own name is used where all roles are written alike."""
    shapes = {(before.replace(role, "\0"), after) for role, (before, after) in turns.items()}
    if len(shapes) == 1:
        before, after = shapes.pop()
        if before.count("\0") == 1:
            first, last = before.split("\0")
            body = f"{_literal(first)}{{{{ .Role }}}}{_literal(last)}{{{{ .Content }}}}{_literal(after)}"
            return f"{{{{- range .Messages }}}}{body}{{{{ end }}}}{_literal(generation)}"
    branches = ""
    for index, role in enumerate(("system", "user", "assistant")):
        before, after = turns[role]
        word = "if" if index == 0 else "else if"
        branches += f'{{{{ {word} eq .Role "{role}" }}}}{_literal(before)}{{{{ .Content }}}}{_literal(after)}'
    return f"{{{{- range .Messages }}}}{branches}{{{{ end }}}}{{{{ end }}}}{_literal(generation)}"


def _literal(text: str) -> str:
    """Plain text, or a Go string constant where braces or quotes would be read as something else."""
    if not text or not re.search(r'{{|}}|"', text):
        return text
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}"

"""Render the subset of Go's text/template that our TEMPLATEs use, as Ollama would: .Messages with .Role and .Content.

Understood: text, {{- and -}} trimming, range .Messages, if / else if / else with `eq .Role "name"`, .Role, .Content and
string constants. Anything else is a fault of ours and stops with an assertion.
"""

from __future__ import annotations

import json
import re
from typing import Any

from dropforge.export.request import Message

# A string constant may hold braces, so it is taken whole.
_ACTION = re.compile(r'{{-?\s*((?:"(?:[^"\\]|\\.)*"|[^"])*?)\s*-?}}', re.DOTALL)


def render_go(template: str, messages: tuple[Message, ...]) -> str:
    """Render the subset of text/template described above with .Messages as Ollama fills it."""
    nodes, rest = _parse(_tokens(template), ())
    assert not rest, "an action without its range or if"
    return "".join(_render(node, messages, None) for node in nodes)


def _tokens(template: str) -> list[tuple[str, str]]:
    """("text", ...) and ("action", ...) in order; `{{-` and `-}}` trim the white space beside them."""
    tokens: list[tuple[str, str]] = []
    position = 0
    trim = False
    for match in _ACTION.finditer(template):
        text = template[position : match.start()]
        text = text.lstrip() if trim else text
        text = text.rstrip() if match[0].startswith("{{-") else text
        tokens += [("text", text), ("action", match[1])]
        trim, position = match[0].endswith("-}}"), match.end()
    tail = template[position:]
    return [*tokens, ("text", tail.lstrip() if trim else tail)]


def _parse(tokens: list[tuple[str, str]], ends: tuple[str, ...]) -> tuple[list[Any], list[tuple[str, str]]]:
    nodes: list[Any] = []
    while tokens:
        (kind, value), tokens = tokens[0], tokens[1:]
        word = value.split(" ", 1)[0]
        if kind == "text":
            nodes.append(value)
        elif word in ends:
            return nodes, [(kind, value), *tokens]
        elif word == "range":
            body, tokens = _parse(tokens, ("end",))
            nodes.append(("range", body))
            tokens = tokens[1:]
        elif word == "if":
            branches, tokens = _branches(value, tokens)
            nodes.append(("if", branches))
        else:
            nodes.append(("value", value))
    return nodes, tokens


def _branches(value: str, tokens: list[tuple[str, str]]) -> tuple[list[tuple[str, list[Any]]], list[tuple[str, str]]]:
    """The arms of an if: (condition, nodes) each; an else without a condition has the condition ''."""
    branches = []
    condition = value.removeprefix("if ").strip()
    while True:
        body, tokens = _parse(tokens, ("else", "end"))
        branches.append((condition, body))
        word, tokens = tokens[0][1], tokens[1:]
        if word == "end":
            return branches, tokens
        condition = word.removeprefix("else").strip().removeprefix("if").strip()


def _render(node: Any, messages: tuple[Message, ...], message: Message | None) -> str:
    if isinstance(node, str):
        return node
    kind, value = node
    if kind == "range":
        return "".join(_render(child, messages, item) for item in messages for child in value)
    if kind == "if":
        for condition, body in value:
            if not condition or _holds(condition, message):
                return "".join(_render(child, messages, message) for child in body)
        return ""
    if value.startswith('"'):
        return str(json.loads(value))
    assert message is not None and value in {".Role", ".Content"}, value
    return message[value[1:].lower()]


def _holds(condition: str, message: Message | None) -> bool:
    match = re.fullmatch(r'eq \.Role "(\w+)"', condition)
    assert match and message is not None, condition
    return message["role"] == match[1]

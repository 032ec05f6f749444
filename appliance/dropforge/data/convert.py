"""From a row to a conversation or a text.

What cannot be understood is an error with its row; what is empty is dropped and the reason is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dropforge.data.column_template import ColumnTemplate
from dropforge.data.detect import Match
from dropforge.data.rows import Row
from dropforge.data.values import to_text
from dropforge.errors import DataError

Turn = dict[str, str]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "input": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "output": "assistant",
    "chatgpt": "assistant",
}
LATER_ROLES = {"tool", "function", "function_call", "observation", "ipython"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Turns with the roles system, user, assistant and text contents; at least one answer, and no empty one."""

    row: Row
    turns: list[Turn]


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """Plain text to be learnt as it is."""

    row: Row
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """A row that holds nothing to learn, and why."""

    row: Row
    why: str


def convert(
    row: Row, match: Match, *, system: str | None = None, templates: tuple[ColumnTemplate, ColumnTemplate] | None = None
) -> Conversation | Document | Dropped:
    """Read `row` as the format `match` says. `system` is put before conversations without a system turn.

    `templates` (prompt, response) belongs to the format `columns`. Raises DataError with file and row.
    """
    if match.format == "text":
        text = _text(row, match.columns["text"])
        return Document(row=row, text=text) if text.strip() else Dropped(row=row, why="the text is empty")
    if match.format in ("messages", "sharegpt"):
        turns = _turns(row, row.fields.get(match.columns["turns"]), sharegpt=match.format == "sharegpt")
    elif match.format == "columns":
        assert templates is not None
        turns = _pair(_fill(row, templates[0]), _fill(row, templates[1]))
    elif match.format == "alpaca":
        turns = _alpaca(row, match.columns)
    else:
        turns = _prompt_completion(row, match.columns)
    own_system = _text(row, match.columns["system"]) if "system" in match.columns else ""
    if turns and turns[0]["role"] != "system" and (own_system or system):
        turns = [{"role": "system", "content": own_system or system or ""}, *turns]
    return _checked(row, turns)


def _alpaca(row: Row, columns: Mapping[str, str]) -> list[Turn]:
    """The instruction, an empty line and the input make the user's turn."""
    parts = [_text(row, columns["instruction"]), _text(row, columns["input"]) if "input" in columns else ""]
    return _pair("\n\n".join(part for part in parts if part.strip()), _text(row, columns["output"]))


def _prompt_completion(row: Row, columns: Mapping[str, str]) -> list[Turn]:
    """Two texts, or (as TRL has it) two lists of messages."""
    prompt, completion = row.fields.get(columns["prompt"]), row.fields.get(columns["completion"])
    if isinstance(prompt, list) or isinstance(completion, list):
        start = (
            _turns(row, prompt, sharegpt=False)
            if isinstance(prompt, list)
            else _pair(_text(row, columns["prompt"]), "")[:1]
        )
        if isinstance(completion, list):
            return start + _turns(row, completion, sharegpt=False)
        return [*start, {"role": "assistant", "content": _text(row, columns["completion"])}]
    return _pair(_text(row, columns["prompt"]), _text(row, columns["completion"]))


def _pair(prompt: str, answer: str) -> list[Turn]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _turns(row: Row, value: Any, *, sharegpt: bool) -> list[Turn]:
    if value is None:
        return []
    role_key, text_key = ("from", "value") if sharegpt else ("role", "content")
    if not isinstance(value, list):
        raise _bad(row, f"the conversation is a {type(value).__name__}, not a list of turns")
    turns = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, Mapping) or role_key not in turn:
            raise _bad(row, f"turn {number} is not an object with {role_key!r} and {text_key!r}")
        if turn.get("tool_calls"):
            raise _later(row, f"turn {number} calls a tool")
        turns.append({"role": _role(row, turn[role_key], number), "content": _content(row, turn.get(text_key), number)})
    return turns


def _role(row: Row, value: Any, number: int) -> str:
    name = str(value).strip().lower()
    if name in LATER_ROLES:
        raise _later(row, f"turn {number} has the role {name!r}")
    if name not in ROLES:
        raise DataError(
            f"unknown role {value!r}",
            code="data-role-unknown",
            where=row.where,
            why=f"turn {number} has it; known are {', '.join(ROLES)}",
            fix="rename the role",
        )
    return ROLES[name]


def _content(row: Row, value: Any, number: int) -> str:
    """A text, nothing (empty), or a list of text parts."""
    if isinstance(value, list):
        kinds = {part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in value}
        if kinds - {"text"}:
            raise _later(row, f"turn {number} holds {', '.join(sorted(map(str, kinds - {'text'})))}")
        return "".join(to_text(part.get("text")) for part in value)
    try:
        return to_text(value)
    except TypeError as error:
        raise _bad(row, f"turn {number}: {error}") from error


def _text(row: Row, column: str) -> str:
    try:
        return to_text(row.fields.get(column))
    except TypeError as error:
        raise _bad(row, f"column {column!r}: {error}") from error


def _fill(row: Row, template: ColumnTemplate) -> str:
    try:
        return template.fill(row.fields)
    except KeyError as error:
        raise DataError(
            f"there is no column {error.args[0]!r}",
            code="data-column-missing",
            where=row.where,
            why=f"the row has the columns {', '.join(map(repr, row.fields))}",
            fix="correct data.format.columns; names must match in upper and lower case",
        ) from error
    except TypeError as error:
        raise _bad(row, str(error)) from error


def _checked(row: Row, turns: list[Turn]) -> Conversation | Dropped:
    if not turns:
        return Dropped(row=row, why="the conversation is empty")
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    if not answers:
        raise DataError(
            "a conversation has no assistant turn, so there is nothing to learn",
            code="data-no-assistant",
            where=row.where,
            why=f"its roles are {', '.join(turn['role'] for turn in turns)}",
            fix="add the answer, or remove the row",
        )
    if not all(turn["content"].strip() for turn in answers):
        return Dropped(row=row, why="an answer is empty")
    if not any(turn["content"].strip() for turn in turns if turn["role"] == "user"):
        return Dropped(row=row, why="the question is empty")
    return Conversation(row=row, turns=turns)


def _bad(row: Row, why: str) -> DataError:
    return DataError(
        "a row cannot be understood", code="data-row-invalid", where=row.where, why=why, fix="correct the row"
    )


def _later(row: Row, why: str) -> DataError:
    return DataError(
        "a row holds something this release cannot train on",
        code="data-format-later",
        where=row.where,
        why=f"{why}; this release takes system, user and assistant texts",
        fix="remove the row, or wait for the release that brings tools, images and audio",
    )

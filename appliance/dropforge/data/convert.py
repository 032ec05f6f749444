"""From a row to a conversation or a text.

What cannot be understood is an error with its row; what is empty is dropped and the reason is kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dropforge.data.column_template import ColumnTemplate
from dropforge.data.detect import Match
from dropforge.data.rows import Row
from dropforge.data.tools import REASONING, bad_row, read_calls, read_tools
from dropforge.data.values import to_text
from dropforge.errors import DataError

Turn = dict[str, Any]
"""role and content; an assistant's turn may also hold tool_calls and reasoning_content (and `thinking`, the same)."""

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
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}


_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Turns with the roles system, user, assistant, tool; at least one answer, and no empty one."""

    row: Row
    turns: list[Turn]
    tools: list[dict[str, Any]] | None = None
    """Definitions of the tools that may be called, as JSON schemas."""

    @property
    def plain(self) -> bool:
        """Texts of system, user and assistant alone."""
        return self.tools is None and all(len(turn) == 2 and turn["role"] != "tool" for turn in self.turns)


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
    refuse_mixed(row, match)
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
    tools = read_tools(row, row.fields.get(match.columns["tools"])) if "tools" in match.columns else None
    return _checked(row, turns, tools)


def refuse_mixed(row: Row, match: Match) -> None:
    """A row that lacks every column of its file's format but has those of another is another format."""
    if not other_format(row.fields, match):
        return
    raise DataError(
        "a row has another format than the rows before it",
        code="data-format-mixed",
        where=row.where,
        why=f"the file is {match.format} ({match.reason}); this row has the columns {', '.join(map(repr, row.fields))}",
        fix="put rows of one format into one file; a job may name several files",
    )


def other_format(fields: Mapping[str, Any], match: Match) -> bool:
    """Whether a row has none of the columns of the format, but others."""
    if match.format == "columns":
        return False
    for column in match.columns.values():
        if column in fields:
            return False
    return any(fields.values())  # an empty object is an empty row, which is dropped and counted


def refuse_surrogates(row: Row) -> None:
    """Halves of characters, which JSON can write (\\ud83d without its other half) and UTF-8 cannot."""
    found = _SURROGATE.search(json.dumps(row.fields, ensure_ascii=False, default=str))
    if found:
        raise DataError(
            "a row holds half of a character",
            code="data-encoding",
            where=row.where,
            why=f"\\u{ord(found[0]):04x} is one half of a pair that writes one character; the other half is missing",
            fix="remove it; texts are often cut there by a program that counts halves",
        )


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


def read_side(row: Row, value: list[Any]) -> list[Turn]:
    """A list of turns, with role and content or with from and value. Raises DataError data-row-invalid."""
    sharegpt = bool(value) and isinstance(value[0], Mapping) and "role" not in value[0]
    return _turns(row, value, sharegpt=sharegpt)


def _turns(row: Row, value: Any, *, sharegpt: bool) -> list[Turn]:
    if value is None:
        return []
    role_key, text_key = ("from", "value") if sharegpt else ("role", "content")
    if isinstance(value, str):
        value = _from_json(value)
    if not isinstance(value, list):
        raise bad_row(row, f"the conversation is a {type(value).__name__}, not a list of turns")
    turns = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, Mapping) or role_key not in turn:
            raise bad_row(row, f"turn {number} is not an object with {role_key!r} and {text_key!r}")
        turns.append(_turn(row, turn, number, role_key=role_key, text_key=text_key))
    return turns


def _turn(row: Row, turn: Mapping[str, Any], number: int, *, role_key: str, text_key: str) -> Turn:
    role = _role(row, turn[role_key], number)
    if str(turn[role_key]).strip().lower() == "function_call":
        return {"role": role, "content": "", "tool_calls": read_calls(row, turn.get(text_key), number)}
    done: Turn = {"role": role, "content": _content(row, turn.get(text_key), number)}
    if role == "assistant":
        if turn.get("tool_calls"):
            done["tool_calls"] = read_calls(row, turn["tool_calls"], number)
        elif turn.get("function_call"):
            done["tool_calls"] = read_calls(row, turn["function_call"], number)
        reasoning = next((turn[name] for name in REASONING if turn.get(name)), None)
        if reasoning is not None:
            done["reasoning_content"] = done["thinking"] = _content(row, reasoning, number)
    elif role == "tool":
        done |= {key: turn[key] for key in ("name", "tool_call_id") if turn.get(key)}
    return done


def _role(row: Row, value: Any, number: int) -> str:
    name = str(value).strip().lower()
    if name not in ROLES:
        raise DataError(
            f"unknown role {value!r}",
            code="data-role-unknown",
            where=row.where,
            why=f"turn {number} has it; known are {', '.join(ROLES)}",
            fix="rename the role",
        )
    return ROLES[name]


def _from_json(text: str) -> Any:
    """Lists of turns that a CSV or Parquet cell holds as JSON text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


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
        raise bad_row(row, f"turn {number}: {error}") from error


def _text(row: Row, column: str) -> str:
    value = row.fields.get(column)
    if type(value) is str:
        return value
    try:
        return to_text(value)
    except TypeError as error:
        raise bad_row(row, f"column {column!r}: {error}") from error


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
        raise bad_row(row, str(error)) from error


def _checked(row: Row, turns: list[Turn], tools: list[dict[str, Any]] | None) -> Conversation | Dropped:
    if not turns:
        return Dropped(row=row, why="the conversation is empty")
    answers = asked = 0
    empty = False
    for turn in turns:
        role = turn["role"]
        if role == "assistant":
            answers += 1
            empty = empty or not (turn["content"].strip() or "tool_calls" in turn)
        elif role == "user":
            asked += bool(turn["content"].strip())
    if not answers:
        raise DataError(
            "a conversation has no assistant turn, so there is nothing to learn",
            code="data-no-assistant",
            where=row.where,
            why=f"its roles are {', '.join(turn['role'] for turn in turns)}",
            fix="add the answer, or remove the row",
        )
    if empty:
        return Dropped(row=row, why="an answer is empty")
    if not asked:
        return Dropped(row=row, why="the question is empty")
    return Conversation(row=row, turns=turns, tools=tools)


def _later(row: Row, why: str) -> DataError:
    return DataError(
        "a row holds something this release cannot train on",
        code="data-format-later",
        where=row.where,
        why=f"{why}; this release takes texts, tool calls and tool results",
        fix="remove the row, or wait for the release that brings images and audio; a model that reads pictures can be"
        " trained on text, and reads them as before",
    )

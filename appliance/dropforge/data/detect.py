"""Which format a file has, seen from its columns and first rows, with the reason as a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dropforge.errors import DataError

Fields = Mapping[str, Any]

CHAT_COLUMNS = ("messages", "conversations", "conversation", "chat", "dialogue", "dialog")
SYSTEM_COLUMNS = ("system", "system_prompt")
TOOL_COLUMNS = ("tools", "functions")
ANSWER_COLUMNS = ("output", "response", "answer", "completion")
TEXT_COLUMNS = ("text", "content", "document")
# Prompt column and the answer columns that may go with it.
PAIRS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("prompt", ("completion", "response", "answer", "output")),
    ("question", ("answer", "response", "output", "completion")),
    ("query", ("response", "answer", "output")),
    ("input", ("output", "response", "answer", "completion")),
    ("user", ("assistant",)),
)


@dataclass(frozen=True, kw_only=True)
class Match:
    """A format, why, and which column plays which part (`prompt` -> `Question`)."""

    format: str
    reason: str
    columns: Mapping[str, str] = field(default_factory=dict)


class _Columns:
    """Column names looked up without regard to case and blanks."""

    def __init__(self, rows: Sequence[Fields]) -> None:
        names = dict.fromkeys(name for row in rows for name in row)
        self.rows = rows
        self.real = {name.strip().lower(): name for name in names}

    def first(self, wanted: Iterable[str]) -> str | None:
        return next((self.real[name] for name in wanted if name in self.real), None)

    def sample(self, column: str) -> Any:
        """The first value that is there."""
        return next((row[column] for row in self.rows if row.get(column) not in (None, "", [])), None)


def detect(rows: Sequence[Fields], *, file: str, forced: str = "auto") -> Match:
    """The format of `rows` (the first ones of a file). `forced` names the format instead of looking for it.

    Raises DataError data-format-unknown, data-column-missing (a forced format does not fit) or data-format-later.
    """
    columns = _Columns(rows)
    if forced != "auto":
        match = FORMATS[forced](columns)
        if match is None:
            raise DataError(
                f"{file} does not have the columns of the format {forced!r}",
                code="data-column-missing",
                where=file,
                why=f"its columns are {_listed(columns)}; {forced} needs {NEEDS[forced]}",
                fix="rename the columns, or leave data.format out so that the format is detected",
            )
    else:
        match = next((found for look in FORMATS.values() if (found := look(columns))), None)
        if match is None:
            raise DataError(
                f"the format of {file} is not known",
                code="data-format-unknown",
                where=file,
                why=f"its columns are {_listed(columns)}; known are: "
                + "; ".join(f"{name} ({need})" for name, need in NEEDS.items()),
                fix='rename columns, or set data.format: {columns: {prompt: "{COLUMN} ...", response: COLUMN}}',
            )
    if match.format in LATER:
        raise DataError(
            f"{file} holds {match.format} data, which this release cannot train on",
            code="data-format-later",
            where=file,
            why=match.reason,
            fix="give conversations, prompt and completion, or text",
        )
    return match


def _messages(columns: _Columns) -> Match | None:
    return _chat(columns, name="messages", role="role", text="content")


def _sharegpt(columns: _Columns) -> Match | None:
    return _chat(columns, name="sharegpt", role="from", text="value")


def _chat(columns: _Columns, *, name: str, role: str, text: str) -> Match | None:
    for wanted in CHAT_COLUMNS:
        column = columns.first([wanted])
        turns = columns.sample(column) if column else None
        if isinstance(turns, str) and turns.lstrip().startswith("["):
            turns = _json(turns)
        if (
            column
            and isinstance(turns, list)
            and turns
            and isinstance(turns[0], dict)
            and {role, text} <= turns[0].keys()
        ):
            reason = f"column {column!r} holds lists of turns with {role!r} and {text!r}"
            return Match(format=name, reason=reason, columns={"turns": column} | _system(columns))
    return None


def _json(text: str) -> Any:
    """A list of turns that a CSV or Parquet cell holds as JSON text."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _preference(columns: _Columns) -> Match | None:
    if columns.first(["chosen"]) and columns.first(["rejected"]):
        return Match(format="preference", reason="columns 'chosen' and 'rejected': two answers to compare per row")
    return None


def _alpaca(columns: _Columns) -> Match | None:
    instruction, output = columns.first(["instruction"]), columns.first(ANSWER_COLUMNS)
    if not instruction or not output:
        return None
    parts = {"instruction": instruction, "output": output} | _system(columns)
    extra = columns.first(["input", "context"])
    if extra:
        parts["input"] = extra
    return Match(format="alpaca", reason=f"columns {_quoted(parts.values())}: one instruction per row", columns=parts)


def _prompt_completion(columns: _Columns) -> Match | None:
    for prompt_name, answers in PAIRS:
        prompt, answer = columns.first([prompt_name]), columns.first(answers)
        if prompt and answer:
            parts = {"prompt": prompt, "completion": answer} | _system(columns)
            reason = f"columns {prompt!r} and {answer!r}: one question and one answer per row"
            return Match(format="prompt_completion", reason=reason, columns=parts)
    return None


def _text(columns: _Columns) -> Match | None:
    column = columns.first(TEXT_COLUMNS)
    if column is None or isinstance(columns.sample(column), (list, dict)):
        return None
    return Match(format="text", reason=f"column {column!r} holds plain text", columns={"text": column})


def _prompt(columns: _Columns) -> Match | None:
    column = columns.first(["prompt"])
    return Match(format="prompt", reason=f"column {column!r} holds prompts without answers") if column else None


def _system(columns: _Columns) -> dict[str, str]:
    """The columns beside the conversation: a system text per row, and the tools it may call."""
    found = {"system": columns.first(SYSTEM_COLUMNS), "tools": columns.first(TOOL_COLUMNS)}
    return {part: column for part, column in found.items() if column}


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _listed(columns: _Columns) -> str:
    names = list(columns.real.values())
    return _quoted(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") if names else "none"


# Order matters: the more specific format first.
FORMATS: dict[str, Callable[[_Columns], Match | None]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "preference": _preference,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _text,
    "prompt": _prompt,
}
NEEDS = {
    "messages": "a column messages or conversations with lists of {role, content}",
    "sharegpt": "a column conversations with lists of {from, value}",
    "preference": "columns chosen and rejected",
    "alpaca": "columns instruction and output, and perhaps input",
    "prompt_completion": "columns prompt and completion, or question and answer",
    "text": "a column text",
    "prompt": "a column prompt",
}
LATER = {"preference", "prompt"}

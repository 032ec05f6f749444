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
PROMPT_COLUMNS = ("prompt", "question", "query", "problem", "instruction", "input")
CHOSEN_COLUMNS = ("chosen", "chosen_response", "preferred")
REJECTED_COLUMNS = ("rejected", "rejected_response", "dispreferred")
SOLUTION_COLUMNS = ("answer", "solution", "ground_truth", "final_answer", "target")
LEARNT = ("messages", "sharegpt", "alpaca", "prompt_completion", "text")
"""Formats with an answer to learn, or a text."""
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


def detect(rows: Sequence[Fields], *, file: str, forced: str = "auto", kinds: Sequence[str] = LEARNT) -> Match:
    """The format of `rows` (the first ones of a file). `forced` names the format instead of looking for it.

    `kinds` are the formats the caller can learn from; another one is an error that says what was seen.

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
        wanted = {name: look for name, look in FORMATS.items() if name in kinds or kinds is LEARNT}
        match = next((found for look in wanted.values() if (found := look(columns))), None)
        if match is None:
            raise DataError(
                f"the format of {file} is not known",
                code="data-format-unknown",
                where=file,
                why=f"its columns are {_listed(columns)}; known are: "
                + "; ".join(f"{name} ({need})" for name, need in NEEDS.items()),
                fix='rename columns, or set data.format: {columns: {prompt: "{COLUMN} ...", response: COLUMN}}',
            )
    if match.format not in kinds:
        raise DataError(
            f"{file} holds {match.format} data, from which answers cannot be learnt",
            code="data-format-later",
            where=file,
            why=match.reason,
            fix="use a preference or RL method for it, or give conversations, prompt and completion, or text",
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
    chosen, rejected = columns.first(CHOSEN_COLUMNS), columns.first(REJECTED_COLUMNS)
    if not chosen or not rejected:
        return None
    parts = {"chosen": chosen, "rejected": rejected}
    prompt = columns.first(PROMPT_COLUMNS)
    if prompt:
        parts["prompt"] = prompt
    reason = f"columns {chosen!r} and {rejected!r}: two answers to compare per row"
    return Match(format="preference", reason=reason, columns=parts)


def _unpaired(columns: _Columns) -> Match | None:
    prompt, label = columns.first(PROMPT_COLUMNS), columns.first(["label"])
    answer = columns.first(ANSWER_COLUMNS)
    if not prompt or not label or not answer:
        return None
    value = columns.sample(label)
    if not isinstance(value, bool) and str(value).strip().lower() not in ("0", "1", "true", "false"):
        return None
    reason = f"columns {prompt!r}, {answer!r} and {label!r}: one answer and a verdict per row"
    return Match(
        format="unpaired_preference", reason=reason, columns={"prompt": prompt, "completion": answer, "label": label}
    )


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
    column = columns.first(PROMPT_COLUMNS)
    if column is None:
        return None
    answer = columns.first(SOLUTION_COLUMNS)
    reason = f"column {column!r} holds prompts" + (f", {answer!r} the answers to be found" if answer else "")
    return Match(format="prompt", reason=reason, columns={"prompt": column})


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
    "unpaired_preference": _unpaired,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _text,
    "prompt": _prompt,
}
NEEDS = {
    "messages": "a column messages or conversations with lists of {role, content}",
    "sharegpt": "a column conversations with lists of {from, value}",
    "preference": "columns chosen and rejected",
    "unpaired_preference": "columns prompt, completion and label (true or false)",
    "alpaca": "columns instruction and output, and perhaps input",
    "prompt_completion": "columns prompt and completion, or question and answer",
    "text": "a column text",
    "prompt": "a column prompt",
}

"""Tool calls, tool definitions and reasoning in the shapes people have, made one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dropforge.data.rows import Row
from dropforge.errors import DataError

REASONING = ("reasoning_content", "reasoning", "thinking", "thought")
"""Keys of an assistant's turn that hold what it thought before it answered."""


def read_calls(row: Row, value: Any, number: int) -> list[dict[str, Any]]:
    """Calls as [{"type": "function", "function": {"name", "arguments": object}}].

    Takes a list or a single call, nested in "function" or not, arguments as an object or as JSON text. Raises DataError
    data-row-invalid.
    """
    value = _parsed(row, value, f"turn {number}: the tool call")
    calls = value if isinstance(value, list) else [value]
    done = []
    for call in calls:
        inner = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise bad_row(row, f"turn {number}: a tool call needs a name and arguments")
        arguments = inner.get("arguments", inner.get("parameters"))
        arguments = _parsed(row, arguments, f"turn {number}: the arguments of {inner['name']}") if arguments else {}
        if not isinstance(arguments, Mapping):
            raise bad_row(row, f"turn {number}: the arguments of {inner['name']} are not an object")
        entry: dict[str, Any] = {"type": "function", "function": {"name": inner["name"], "arguments": dict(arguments)}}
        if isinstance(call.get("id"), str):
            entry["id"] = call["id"]
        done.append(entry)
    return done


def read_tools(row: Row, value: Any) -> list[dict[str, Any]] | None:
    """Definitions as a list of objects; None when there are none."""
    if value is None or value == "" or value == []:
        return None
    value = _parsed(row, value, "the tools")
    tools = value if isinstance(value, list) else [value]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise bad_row(row, "the tools are not a list of objects")
    return [
        dict(tool) if "function" in tool or "type" in tool else {"type": "function", "function": dict(tool)}
        for tool in tools
    ] or None


def _parsed(row: Row, value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise bad_row(row, f"{what} are not JSON: {error}") from error


def bad_row(row: Row, why: str) -> DataError:
    """The error of a row that is not what its format says."""
    return DataError(
        "a row cannot be understood", code="data-row-invalid", where=row.where, why=why, fix="correct the row"
    )

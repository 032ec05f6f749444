"""Bytes of a spec file to plain values with the line of every key: YAML 1.2 core scalars, JSON, TOML. Executes nothing.

The YAML reader builds its values from parser events, so that anchors, aliases, tags, merge keys, duplicate keys and
deep nesting are refused before anything is built. Call it only inside the limited child of spec_check.py: a hostile
file may still exhaust the parser itself.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from dataclasses import dataclass, field
from typing import Any

from dropforge.errors import Problem, SpecError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 16
MAX_NODES = 5000
SUFFIXES = (".yaml", ".yml", ".json", ".toml")

Path = tuple[str | int, ...]

# YAML 1.2 core schema, section 10.3.2 of the specification: `no`, `on` and 12:30:00 are text, 1e-5 is a number.
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?(\.inf|\.Inf|\.INF)|\.nan|\.NaN|\.NAN")


@dataclass
class ParsedFile:
    """Values as JSON would hold them, and the 1-based line of each key path (empty for TOML)."""

    value: dict[str, Any]
    lines: dict[Path, int] = field(default_factory=dict)


def problem(
    code: str, what: str, *, line: int | None = None, filename: str = "", why: str = "", fix: str = ""
) -> Problem:
    where = f"{filename}, line {line}" if line else filename
    return Problem(code=code, what=what, where=where, why=why, fix=fix)


def refuse(code: str, what: str, **details: Any) -> SpecError:
    return SpecError.of([problem(code, what, **details)])


def parse(raw: bytes, *, filename: str) -> ParsedFile:
    """Parse by the file name's ending. Raises SpecError with codes spec-encoding, spec-syntax, spec-* (docs)."""
    if len(raw) > MAX_BYTES:
        raise refuse(
            "spec-too-large",
            f"the spec has {len(raw)} bytes, more than {MAX_BYTES}",
            filename=filename,
            fix="put data into its own file and name it in `data`",
        )
    text = _decode(raw, filename)
    if not text.strip():
        raise refuse(
            "spec-empty",
            "the spec is empty",
            filename=filename,
            fix="write at least version, name, model, data, export",
        )
    if filename.endswith(".json"):
        parsed = _parse_json(text, filename)
    elif filename.endswith(".toml"):
        parsed = _parse_toml(text, filename)
    elif filename.endswith((".yaml", ".yml")):
        parsed = _YamlReader(filename).read(text)
    else:
        raise refuse(
            "spec-suffix",
            f"{filename!r} does not end in {', '.join(SUFFIXES)}",
            filename=filename,
            fix="rename the file",
        )
    if not isinstance(parsed.value, dict):
        raise refuse(
            "spec-not-a-mapping",
            "the spec must be a mapping of keys to values",
            filename=filename,
            why=f"it is a {type(parsed.value).__name__}",
        )
    return parsed


def _decode(raw: bytes, filename: str) -> str:
    fix = "save the file as UTF-8"
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise refuse("spec-encoding", "the spec is UTF-16, not UTF-8", filename=filename, fix=fix)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise refuse(
            "spec-encoding",
            f"byte 0x{raw[error.start]:02x} is not UTF-8; the file may be Latin-1 or binary",
            filename=filename,
            line=line,
            fix=fix,
        ) from None
    bad = re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", text)
    if bad:
        raise refuse(
            "spec-binary",
            f"character 0x{ord(bad[0]):02x} does not belong in a text file",
            filename=filename,
            line=text.count("\n", 0, bad.start()) + 1,
            why="the file is binary or damaged",
            fix=fix,
        )
    return text


def _parse_json(text: str, filename: str) -> ParsedFile:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in items:
            if key in seen:
                raise refuse(
                    "spec-duplicate-key", f"key {key!r} stands twice", filename=filename, fix="keep one of them"
                )
            seen[key] = value
        return seen

    def constant(name: str) -> Any:
        raise refuse("spec-not-finite", f"{name} is not a number a job can use", filename=filename)

    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise refuse("spec-syntax", f"not valid JSON: {error.msg}", filename=filename, line=error.lineno) from None
    except RecursionError:
        raise _too_deep(filename, None) from None
    _check_size(value, filename)
    return ParsedFile(value)


def _parse_toml(text: str, filename: str) -> ParsedFile:
    try:
        value = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise refuse("spec-syntax", f"not valid TOML: {error}", filename=filename) from None
    except RecursionError:
        raise _too_deep(filename, None) from None
    _check_size(value, filename)
    try:
        return ParsedFile(json.loads(json.dumps(value, allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise refuse("spec-value", f"a value has a type that a spec cannot hold: {error}", filename=filename) from None


def _too_deep(filename: str, line: int | None) -> SpecError:
    return refuse("spec-too-deep", f"nested deeper than {MAX_DEPTH} levels", filename=filename, line=line)


def _too_many(filename: str) -> SpecError:
    return refuse(
        "spec-too-many-nodes",
        f"more than {MAX_NODES} values",
        filename=filename,
        fix="put data into its own file and name it in `data`",
    )


def _joined_surrogates(text: str, filename: str, line: int | None = None) -> str:
    """`\\ud83d\\ude00` is one character in JSON; half of such a pair is none and cannot be written as UTF-8."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise refuse(
            "spec-encoding", "a \\u escape is half of a surrogate pair", filename=filename, line=line
        ) from None


def _check_size(value: Any, filename: str) -> None:
    stack, nodes = [(value, 1)], 0
    while stack:
        item, depth = stack.pop()
        nodes += 1
        if depth > MAX_DEPTH:
            raise _too_deep(filename, None)
        if nodes > MAX_NODES:
            raise _too_many(filename)
        if isinstance(item, str):
            _joined_surrogates(item, filename)
        children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        stack.extend((child, depth + 1) for child in children)


class _YamlReader:
    """Builds plain values from YAML parser events, one pass, no recursion."""

    def __init__(self, filename: str) -> None:
        self.filename = filename
        self.lines: dict[Path, int] = {}

    def read(self, text: str) -> ParsedFile:
        from ruamel.yaml import YAML
        from ruamel.yaml.error import MarkedYAMLError, YAMLError

        yaml = YAML(typ="safe", pure=True)
        try:
            value = self._build(yaml.parse(text))
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else None
            raise refuse(
                "spec-syntax",
                f"not valid YAML: {error.problem or error.context}",
                filename=self.filename,
                line=line,
                fix="check indentation, quotes and brackets on this line and above",
            ) from None
        except YAMLError as error:
            raise refuse("spec-syntax", f"not valid YAML: {error}", filename=self.filename) from None
        except RecursionError:
            raise _too_deep(self.filename, None) from None
        return ParsedFile(value, self.lines)

    def _build(self, events: Any) -> Any:
        from ruamel.yaml import events as ev

        root: list[Any] = []
        stack: list[tuple[Any, Path, list[str]]] = [(root, (), [])]  # container, its path, pending key
        nodes = documents = 0
        for event in events:
            line = event.start_mark.line + 1 if event.start_mark else None
            if isinstance(event, ev.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise refuse(
                        "spec-documents",
                        "the file holds several YAML documents",
                        filename=self.filename,
                        line=line,
                        fix="drop one file per job",
                    )
            elif isinstance(event, (ev.MappingEndEvent, ev.SequenceEndEvent)):
                stack.pop()
            elif isinstance(event, ev.NodeEvent):
                nodes += 1
                if nodes > MAX_NODES:
                    raise _too_many(self.filename)
                self._refuse_features(event, line)
                if isinstance(event, ev.ScalarEvent):
                    self._place(stack, event, line, self._scalar)
                    continue
                if len(stack) > MAX_DEPTH:
                    raise _too_deep(self.filename, line)
                child: Any = {} if isinstance(event, ev.MappingStartEvent) else []
                path = self._place(stack, event, line, lambda _event, _line, child=child: child)
                stack.append((child, path, []))
        return root[0] if root else None

    def _place(self, stack: list[tuple[Any, Path, list[str]]], event: Any, line: int | None, build: Any) -> Path:
        """Put the value of `event` into the innermost container; returns its path."""
        container, path, pending = stack[-1]
        if isinstance(container, list):
            own = (*path, len(container)) if len(stack) > 1 else ()
            self._note(own, line)
            container.append(build(event, line))
            return own
        if not pending:
            key = getattr(event, "value", None)
            if not isinstance(key, str):
                raise refuse("spec-key", "a key must be plain text", filename=self.filename, line=line)
            if key == "<<":
                raise refuse("spec-merge-key", "merge keys (<<) are not allowed", filename=self.filename, line=line)
            if key in container:
                raise refuse(
                    "spec-duplicate-key",
                    f"key {key!r} stands twice",
                    filename=self.filename,
                    line=line,
                    fix="keep one of them",
                )
            pending.append(key)
            self._note((*path, key), line)
            return path
        key = pending.pop()
        container[key] = build(event, line)
        return (*path, key)

    def _note(self, path: Path, line: int | None) -> None:
        if line is not None:
            self.lines.setdefault(path, line)

    def _refuse_features(self, event: Any, line: int | None) -> None:
        from ruamel.yaml import events as ev

        if isinstance(event, ev.AliasEvent) or event.anchor is not None:
            raise refuse(
                "spec-alias",
                "YAML anchors and aliases are not allowed",
                filename=self.filename,
                line=line,
                fix="write the value out",
            )
        if getattr(event, "tag", None) not in (None, "!"):
            raise refuse("spec-tag", f"YAML tags are not allowed: {event.tag}", filename=self.filename, line=line)

    def _scalar(self, event: Any, line: int | None) -> Any:
        text = _joined_surrogates(event.value, self.filename, line)
        if event.style in ("'", '"', "|", ">") or getattr(event, "tag", None) == "!":
            return text
        if _NULL.fullmatch(text):
            return None
        if _BOOL.fullmatch(text):
            return text.lower() == "true"
        if _INT.fullmatch(text):
            if len(text) > 40:
                raise refuse("spec-number", "a number with more than 40 digits", filename=self.filename, line=line)
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        if _FLOAT.fullmatch(text) and math.isfinite(value := float(text)):
            return value
        if _NOT_FINITE.fullmatch(text) or _FLOAT.fullmatch(text):
            raise refuse("spec-not-finite", f"{text} is not a number a job can use", filename=self.filename, line=line)
        return text

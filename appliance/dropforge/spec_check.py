"""Check a spec file completely: parse, validate, resolve. `check` does it here, `check_in_child` under limits.

The daemon and every command use the child for files they did not write themselves: a hostile file then kills a process
that owns nothing (a C YAML loader dies on deep nesting; a pure one recurses).
"""

from __future__ import annotations

import difflib
import io
import json
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from textwrap import indent
from typing import Any

from dropforge.errors import EnvironmentFault, Problem, SpecError
from dropforge.spec import Spec
from dropforge.spec_file import ParsedFile, Path, parse, refuse

CPU_SECONDS = 10
MEMORY_BYTES = 1 << 30
WALL_SECONDS = 30.0
STARVED_SECONDS = 2.0
"""A child that had less CPU time than this when its time was up was held up by others: it needs half a second."""


@dataclass(frozen=True, kw_only=True)
class CheckedSpec:
    """A spec as the user wrote it and with every default filled in."""

    spec: Spec
    resolved: Spec


def check(raw: bytes, *, filename: str) -> CheckedSpec:
    """Raises SpecError with every problem found."""
    from pydantic import ValidationError

    from dropforge.releases import not_yet
    from dropforge.spec_defaults import resolve

    parsed = parse(raw, filename=filename)
    try:
        spec = Spec.model_validate_json(json.dumps(parsed.value, allow_nan=False))
    except ValidationError as error:
        raise SpecError.of([_explain(item, parsed, filename) for item in _once(error.errors())]) from None
    refused = [*not_yet(spec), *_unknown_builtin(spec)]
    if refused:
        raise SpecError.of(refused)
    return CheckedSpec(spec=spec, resolved=resolve(spec))


def _unknown_builtin(spec: Spec) -> list[Problem]:
    """A builtin model is the one kind of model whose absence is known at once."""
    from dropforge.models.builtin import BUILTIN

    kind, _, name = spec.model.id.rpartition(":")
    if kind != "builtin" or name in BUILTIN:
        return []
    near = difflib.get_close_matches(name, BUILTIN, n=1, cutoff=0.0)
    fix = f"did you mean builtin:{near[0]}? Known: {', '.join(sorted(BUILTIN))}"
    what = f"there is no builtin model {name!r}"
    return [Problem(code="model-unknown-builtin", what=what, where="model.id", fix=fix)]


def to_yaml(spec: Spec) -> str:
    """The spec as YAML 1.2 that `parse` reads back to an equal spec."""
    # JSON first: tuples and enums become what YAML knows.
    return _block(json.loads(spec.model_dump_json()))


def _block(mapping: dict[str, Any]) -> str:
    """A block mapping, entry by entry: nearly all are defaults, and the same ones in the next spec."""
    return "".join(_entry(key, value) for key, value in mapping.items())


def _entry(key: str, value: Any) -> str:
    if isinstance(value, dict) and value and key.isidentifier():
        return f"{key}:\n{indent(_block(value), '  ')}"
    return _emitted(key, json.dumps(value)) if isinstance(value, (dict, list)) else _emitted_scalar(key, value)


@lru_cache(maxsize=1024, typed=True)  # 1, 1.0 and true are three values
def _emitted_scalar(key: str, value: str | float | bool | None) -> str:
    return _emitted(key, json.dumps(value))


@lru_cache(maxsize=1024)
def _emitted(key: str, value: str) -> str:
    """A mapping of one key; its value is given as JSON. Strings that look like numbers are quoted by the emitter."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    stream = io.StringIO()
    yaml.dump({key: json.loads(value)}, stream)
    return stream.getvalue()


def check_in_child(raw: bytes, *, filename: str) -> CheckedSpec:
    """`check` in a child process with CPU, memory and wall-time limits.

    Raises SpecError; EnvironmentFault (spec-starved) when the machine gave the child no time: no verdict on the file.
    """
    command = [sys.executable, "-P", "-m", "dropforge.spec_check", filename]
    before = _cpu_of_children()
    try:
        done = subprocess.run(command, input=raw, capture_output=True, timeout=WALL_SECONDS, preexec_fn=_limit)
    except subprocess.TimeoutExpired:
        if _cpu_of_children() - before < STARVED_SECONDS:
            raise _starved(filename) from None
        raise _overrun(filename, f"reading it took over {WALL_SECONDS:g} s") from None
    if done.returncode != 0:
        raise _overrun(filename, f"reading it ended the reader (exit status {done.returncode})")
    return read_answer(json.loads(done.stdout))


def answer(raw: bytes, *, filename: str) -> dict[str, Any]:
    """What a child says about a spec, as JSON values. daemon/spec_batch.py says it about many."""
    try:
        checked = check(raw, filename=filename)
    except SpecError as error:
        return {"problems": [asdict(p) for p in error.problems]}
    return {
        "problems": [],
        "spec": checked.spec.model_dump_json(exclude_unset=True),
        "resolved": checked.resolved.model_dump_json(),
    }


def read_answer(value: dict[str, Any]) -> CheckedSpec:
    """The other end of `answer`. Raises SpecError."""
    if value["problems"]:
        raise SpecError.of([Problem(**item) for item in value["problems"]])
    return CheckedSpec(
        spec=Spec.model_validate_json(value["spec"]), resolved=Spec.model_validate_json(value["resolved"])
    )


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _cpu_of_children() -> float:
    """CPU seconds of all children of this process that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _starved(filename: str) -> EnvironmentFault:
    return EnvironmentFault(
        "this machine is too busy to read a spec", code="spec-starved", where=filename,
        why=f"{WALL_SECONDS:g} s were not enough for what takes half a second of the CPU",
        fix="nothing: it is tried again; if it stays so, see what else runs here",
    )  # fmt: skip


def _overrun(filename: str, why: str) -> SpecError:
    return refuse(
        "spec-hostile",
        "the spec cannot be read within the limits for a spec",
        filename=filename,
        why=why,
        fix="simplify the file; a spec is small and flat",
    )


def _once(errors: Any) -> list[Any]:
    """Drop repeated locations (a union reports one error per member) and complaints about a part with wrong parts."""
    seen: dict[tuple[Any, ...], Any] = {}
    for item in errors:
        location = tuple(part for part in item["loc"] if not _is_union_tag(part))
        seen.setdefault(location, {**item, "loc": location})
    return [
        item
        for location, item in seen.items()
        if not any(other[: len(location)] == location for other in seen if other != location)
    ]


def _is_union_tag(part: str | int) -> bool:
    return isinstance(part, str) and (part in _UNION_TAGS or "[" in part or "-" in part)


_UNION_TAGS = frozenset({"ColumnsFormat", "int", "bool", "str"})


def _explain(item: Any, parsed: ParsedFile, filename: str) -> Problem:
    """One pydantic error as a Problem with the line, the nearest key or value, and what to do."""
    location: Path = item["loc"]
    dotted = ".".join(str(part) for part in location) or "(the whole spec)"
    line = _line(location, parsed)
    where = f"{filename}, line {line}: {dotted}" if line else f"{filename}: {dotted}"
    kind, context = item["type"], item.get("ctx", {})
    if kind == "extra_forbidden":
        keys = _known_keys(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), keys, n=1, cutoff=0.5)
        fix = f"did you mean {near[0]!r}?" if near else f"known keys here: {', '.join(keys)}"
        return Problem(code="spec-unknown-key", what=f"unknown key {str(location[-1])!r}", where=where, fix=fix)
    if kind == "missing":
        return Problem(
            code="spec-missing-key",
            what=f"required key {dotted!r} is missing",
            where=where,
            fix=_MISSING_FIX.get(dotted, "add it"),
        )
    value = item.get("input")
    if kind == "literal_error":
        expected = context["expected"]
        near = difflib.get_close_matches(
            str(value), [w.strip("' ") for w in expected.replace(" or ", ", ").split(",")], n=1
        )
        fix = f"did you mean {near[0]!r}? " if near else ""
        return Problem(
            code="spec-value",
            what=f"{dotted}: {value!r} is not one of the allowed values",
            where=where,
            fix=f"{fix}Allowed: {expected}",
        )
    shown = "" if isinstance(value, (dict, list, tuple)) else f", not {value!r}"
    text = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return Problem(code="spec-value", what=f"{dotted}: {text}{shown}", where=where, fix="see docs/reference/spec.md")


_MISSING_FIX = {
    "version": "add `version: 1`",
    "export": "add `export: [gguf:q4_k_m, ollama]` as the last line; a missing export often means a half-copied file",
    "data": "add `data: my-rows.jsonl`",
    "model": "add `model: builtin:tiny-llama` or a hub id",
    "name": "add `name: my-first-job`",
}


def _line(location: Path, parsed: ParsedFile) -> int | None:
    for end in range(len(location), 0, -1):
        if location[:end] in parsed.lines:
            return parsed.lines[location[:end]]
    return None


@cache
def _schema() -> dict[str, Any]:
    """Building it takes 15 ms, which counts when thousands of faulty specs are dropped at once."""
    return Spec.model_json_schema()


def _known_keys(location: Path) -> list[str]:
    """Field names of the section at `location`."""
    schema = _schema()
    node: Any = schema
    for part in location:
        if isinstance(part, int):
            node = _form(node, "items", schema["$defs"]).get("items", {})
        else:
            node = _form(node, "properties", schema["$defs"]).get("properties", {}).get(part, {})
    return list(_form(node, "properties", schema["$defs"]).get("properties", {}))


def _form(node: Any, key: str, definitions: Any) -> Any:
    """Follow $ref and pick the form that has `key` ("properties" or "items") out of a union; {} when there is none."""
    if "$ref" in node:
        return _form(definitions[node["$ref"].rsplit("/", 1)[-1]], key, definitions)
    if key in node:
        return node
    for option in node.get("anyOf", ()):
        found = _form(option, key, definitions)
        if found:
            return found
    return {}


def _child() -> None:
    sys.stdout.write(json.dumps(answer(sys.stdin.buffer.read(), filename=sys.argv[1])))


if __name__ == "__main__":
    _child()

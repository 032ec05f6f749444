"""STYLE.md rule 1: one idea per file, small functions. Exceptions are listed with a reason and must still be needed."""

from __future__ import annotations

import ast
from pathlib import Path

from _pytest.fixtures import FixtureRequest

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 100
MAX_KERNEL_LINES = 150


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def oversized(sources) -> set[str]:
    found = set()
    for source in sources:
        if source.text.count("\n") > MAX_FILE_LINES:
            found.add(source.name)
        for node in ast.walk(source.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > (MAX_KERNEL_LINES if is_kernel(node) else MAX_FUNCTION_LINES):
                    found.add(f"{source.name}:{node.name}")
    return found


def test_files_and_functions_stay_small(sources, request: FixtureRequest):
    listed = Path(request.path).with_name("exceptions.txt").read_text(encoding="utf-8").splitlines()
    allowed = {line.split(" ", 1)[0] for line in listed if line and not line.startswith("#")}
    reasons = [line for line in listed if line and not line.startswith("#") and len(line.split(" ", 1)) < 2]
    assert not reasons, f"an exception needs a reason: {reasons}"
    found = oversized(sources)
    assert found - allowed == set(), "too large: split it, or list it in exceptions.txt with a reason"
    assert allowed - found == set(), "no longer too large: take it off the list"

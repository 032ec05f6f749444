"""Which model architectures this llama.cpp converts: read from its converter's tables, without running it."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dropforge.llama_cpp.locate import LlamaCpp


@dataclass(frozen=True, kw_only=True)
class Architectures:
    """Names as in config.json's `architectures`."""

    text: frozenset[str]
    """A GGUF of the language model can be made."""
    projector: frozenset[str]
    """llama.cpp knows a projector (mmproj) for the model's pictures or sounds too."""


def architectures(tools: LlamaCpp) -> Architectures:
    """The converter's tables."""
    return _read(tools.converter / "conversion" / "__init__.py")


@cache
def _read(path: Path) -> Architectures:
    tables: dict[str, frozenset[str]] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Dict):
            tables[node.target.id] = frozenset(ast.literal_eval(node.value))
    return Architectures(text=tables["TEXT_MODEL_MAP"], projector=tables["MMPROJ_MODEL_MAP"])

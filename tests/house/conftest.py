"""What the house tests look at: the source files of both packages, parsed once."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (ROOT / "appliance" / "dropforge", ROOT / "kernels" / "dropforge_kernels")


@dataclass(frozen=True)
class Source:
    path: Path
    name: str
    """Relative to the repository."""
    text: str
    tree: ast.Module

    @property
    def module(self) -> str:
        parts = self.path.relative_to(ROOT).with_suffix("").parts[1:]
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_sources() -> list[Source]:
    paths = sorted(path for package in PACKAGES for path in package.rglob("*.py"))
    texts = [(path, path.read_text(encoding="utf-8")) for path in paths]
    return [Source(path, str(path.relative_to(ROOT)), text, ast.parse(text)) for path, text in texts]


@pytest.fixture(scope="session")
def sources() -> list[Source]:
    found = read_sources()
    assert len(found) > 40, "the house tests look at the wrong folder"
    return found

"""Names of the GGUF files of a result, as the community writes them: the type at the end, in capitals."""

from __future__ import annotations

from pathlib import Path

PROJECTOR = "-mmproj-"


def gguf_name(slug: str, gguf_type: str) -> str:
    """A model's file."""
    return f"{slug}-{gguf_type.upper()}.gguf"


def projector_name(slug: str, gguf_type: str) -> str:
    """The file of the part that reads pictures."""
    return f"{slug}{PROJECTOR}{gguf_type.upper()}.gguf"


def is_projector(path: Path) -> bool:
    """Whether a GGUF is a projector, and no model by itself."""
    return PROJECTOR in path.name


def finished_projector(folder: Path) -> Path | None:
    """The projector in a folder of GGUF files."""
    return preferred_projector([path for path in folder.glob("*.gguf") if is_projector(path)])


def preferred_projector(found: list[Path]) -> Path | None:
    """f16 before others; None without any."""
    return min(found, key=lambda path: (not path.name.endswith("-F16.gguf"), path.name), default=None)

"""Find the built llama.cpp, or say how to get it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dropforge.errors import EnvironmentFault
from dropforge.llama_cpp.release import cache_folder
from dropforge.settings import settings

IMAGE_FOLDER = Path("/opt/llama.cpp")


@dataclass(frozen=True)
class LlamaCpp:
    """A folder with llama.cpp's tools in bin/ and its converter in convert/."""

    root: Path

    def tool(self, name: str) -> Path:
        """Path of one tool. Raises EnvironmentFault (tool-missing) when it is not there or cannot be run."""
        path = self.root / "bin" / name
        if not os.access(path, os.X_OK):
            raise _missing(f"llama.cpp's {name} is missing", where=str(path))
        return path

    @property
    def converter(self) -> Path:
        """Folder that holds the converter's `conversion` package and `gguf-py`."""
        path = self.root / "convert"
        if not (path / "conversion" / "__init__.py").is_file():
            raise _missing("llama.cpp's converter is missing", where=str(path))
        return path


def candidates() -> tuple[Path, ...]:
    """Folders looked at, in order: DROPFORGE_LLAMA_CPP alone when set, else the cache and the image's folder."""
    chosen = settings().llama_cpp
    return (chosen,) if chosen else (cache_folder(settings().cache), IMAGE_FOLDER)


def find_llama_cpp() -> LlamaCpp:
    """The llama.cpp to use. Raises EnvironmentFault (tool-missing) with the folders that were searched."""
    for folder in candidates():
        if (folder / "bin").is_dir():
            return LlamaCpp(folder)
    raise _missing("llama.cpp's tools are not built", where=", ".join(str(folder) for folder in candidates()))


def _missing(what: str, *, where: str) -> EnvironmentFault:
    return EnvironmentFault(
        what,
        code="tool-missing",
        where=where,
        why="GGUF and Ollama exports, and chatting with them, run llama.cpp's own tools",
        fix="run `make llama` (about 6 minutes on 2 cores), or set DROPFORGE_LLAMA_CPP to a built folder",
    )

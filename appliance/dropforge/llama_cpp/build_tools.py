"""CMake, Ninja and a C++ compiler: the system's, or CMake and Ninja from docker/build.lock in a folder of their own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dropforge.errors import EnvironmentFault, Reason
from dropforge.llama_cpp.child import tail

LOCK = Path(__file__).parents[3] / "docker" / "build.lock"


@dataclass(frozen=True)
class BuildTools:
    """The programs a build runs."""

    cmake: Path
    ninja: Path


def find_build_tools(folder: Path, *, log: Callable[[str], None]) -> BuildTools:
    """This machine's tools, else new ones in `folder`. Raises EnvironmentFault: compiler-missing, tool-missing."""
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        raise EnvironmentFault(
            "there is no C++ compiler", code="compiler-missing", where="c++, g++, clang++",
            why="llama.cpp is compiled on this machine",
            fix="install one (Debian, Ubuntu: apt-get install build-essential)",
        )  # fmt: skip
    beside_python = str(Path(sys.executable).parent)
    cmake, ninja = (shutil.which(name) or shutil.which(name, path=beside_python) for name in ("cmake", "ninja"))
    if cmake and ninja:
        return BuildTools(Path(cmake), Path(ninja))
    return install_build_tools(folder, log=log)


def install_build_tools(folder: Path, *, log: Callable[[str], None]) -> BuildTools:
    """CMake and Ninja from the package index, hashes checked, into `folder`."""
    tools = BuildTools(folder / "cmake" / "data" / "bin" / "cmake", folder / "bin" / "ninja")
    if tools.cmake.is_file() and tools.ninja.is_file():
        return tools
    if not LOCK.is_file():
        raise EnvironmentFault(
            "CMake and Ninja are missing", code="tool-missing", where="cmake, ninja",
            fix="install both (Debian, Ubuntu: apt-get install cmake ninja-build)",
        )  # fmt: skip
    log("fetching CMake and Ninja")
    command = [
        sys.executable, "-m", "pip", "install", "--no-deps", "--only-binary", ":all:", "--require-hashes",
        "--disable-pip-version-check", "--target", str(folder), "--upgrade", "--requirement", str(LOCK),
    ]  # fmt: skip
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode != 0 or not (tools.cmake.is_file() and tools.ninja.is_file()):
        raise EnvironmentFault(
            "CMake and Ninja could not be fetched", code="tool-missing", where="pip install",
            why=f"it said last:\n{tail(done.stdout.decode('utf-8', errors='replace'))}", reason=Reason.OFFLINE,
            fix="install both (Debian, Ubuntu: apt-get install cmake ninja-build)",
        )  # fmt: skip
    return tools

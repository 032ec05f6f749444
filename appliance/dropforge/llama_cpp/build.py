"""Build llama.cpp's tools from the pinned source archive: `python -m dropforge.llama_cpp.build`, or `make llama`.

The archive is llama-cpp-python's, because it is on every package index and carries all of llama.cpp. It is fetched with
its hash checked, unpacked, built with CMake and Ninja, and put in place with one rename. A build that was interrupted
goes on where it stopped; two at the same time wait for each other.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from dropforge.errors import DropforgeError, EnvironmentFault
from dropforge.files import rename_folder
from dropforge.llama_cpp.build_tools import BuildTools, find_build_tools
from dropforge.llama_cpp.child import death_signal, tail
from dropforge.llama_cpp.locate import LlamaCpp
from dropforge.llama_cpp.release import CMAKE_FLAGS, COMMIT, CONVERTER_PARTS, TARGETS, cache_folder
from dropforge.llama_cpp.source import unpacked_source
from dropforge.settings import settings

Log = Callable[[str], None]
PROGRESS_SECONDS = 15.0
BYTES_PER_JOB = 2**30
"""More than gcc takes, and nvcc: 0.7 GiB at most for its largest files."""
MEMINFO = Path("/proc/meminfo")
_STEP = re.compile(rb"^\[(\d+)/(\d+)\]")


def main(arguments: list[str] | None = None) -> int:
    """Build unless it is there already. Exit status 0, or 3 with the reason on stderr."""
    parser = argparse.ArgumentParser(prog="python -m dropforge.llama_cpp.build", description=__doc__.splitlines()[0])
    parser.add_argument("--sdist", type=Path, help="source archive at hand, instead of fetching it")
    parser.add_argument("--jobs", type=int, help="compilers at the same time; default: what cores and memory allow")
    parser.add_argument("--into", type=Path, help="folder to build into; default: the cache")
    parser.add_argument("--cmake-flag", action="append", default=[], metavar="FLAG", help="one more; needs --into")
    options = parser.parse_args(arguments)
    if options.cmake_flag and not options.into:
        parser.error("--cmake-flag needs --into: the cache holds the standard build only")
    log = partial(print, flush=True)
    target = options.into.absolute() if options.into else cache_folder(settings().cache)
    try:
        build(
            target,
            sdist=options.sdist,
            jobs=options.jobs or usable_jobs(),
            flags=options.cmake_flag,
            log=log,
        )
    except DropforgeError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


def build(target: Path, *, sdist: Path | None = None, jobs: int, flags: Sequence[str] = (), log: Log) -> LlamaCpp:
    """Make `target` hold bin/ and convert/, unless it does. Raises EnvironmentFault with the failing step.

    `flags` are given to CMake after the standard ones (the CUDA image adds its own).
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if complete(target):
            log(f"llama.cpp {COMMIT[:9]} is built: {target}")
            return LlamaCpp(target)
        start = time.monotonic()
        tools = find_build_tools(target.with_name(f".{target.name}.tools"), log=log)
        scratch = target.with_name(f".{target.name}.building")
        scratch.mkdir(exist_ok=True)
        source = unpacked_source(scratch, sdist=sdist, log=log)
        _compile(source, scratch / "build", tools=tools, jobs=jobs, flags=flags, log=log)
        _install(source, scratch / "build" / "bin", target, scratch=scratch / "install")
        shutil.rmtree(scratch)
        log(f"llama.cpp {COMMIT[:9]} built in {time.monotonic() - start:.0f} s: {target}")
    return LlamaCpp(target)


def complete(folder: Path) -> bool:
    """True when every tool and the converter are in `folder`."""
    tools = all(os.access(folder / "bin" / name, os.X_OK) for name in TARGETS)
    return tools and all((folder / "convert" / name).exists() for name in CONVERTER_PARTS)


def usable_jobs() -> int:
    """As many compilers as there are cores, but no more than the free memory holds.

    Reads /proc itself: the image builds with a Python that has nothing installed.
    """
    available = re.search(r"^MemAvailable: *(\d+) kB$", MEMINFO.read_text(encoding="ascii"), re.MULTILINE)
    assert available is not None, "Linux has told this since 3.14"
    return max(1, min(len(os.sched_getaffinity(0)), int(available[1]) * 1024 // BYTES_PER_JOB))


def _compile(source: Path, folder: Path, *, tools: BuildTools, jobs: int, flags: Sequence[str], log: Log) -> None:
    log("configuring llama.cpp")
    configure = [
        str(tools.cmake), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools.ninja}", "-S", str(source), "-B", str(folder),
        *CMAKE_FLAGS, *flags,
    ]  # fmt: skip
    _run(configure, step="configuring", log=log)
    how_long = "" if flags else "; about 6 minutes on 2 cores"
    log(f"compiling {', '.join(TARGETS)} with {jobs} job{'s' * (jobs != 1)}{how_long}")
    _run([str(tools.ninja), "-C", str(folder), "-j", str(jobs), *TARGETS], step="compiling", log=log)


def _run(command: list[str], *, step: str, log: Log) -> None:
    """Run to the end with a progress line every 15 s, taken from Ninja's own [done/all]."""
    said: list[bytes] = []
    last = time.monotonic()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=death_signal()
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said = [*said[-200:], line]
            match = _STEP.match(line)
            if match and time.monotonic() - last > PROGRESS_SECONDS:
                last = time.monotonic()
                log(f"{step} llama.cpp: {int(match[1])} of {int(match[2])}")
    if process.returncode != 0:
        raise EnvironmentFault(
            f"{step} llama.cpp failed", code="llama-build", where=Path(command[0]).name,
            why=f"it said last:\n{tail(b''.join(said).decode('utf-8', errors='replace'))}",
            fix="install a C++17 compiler (Debian: build-essential), then run the same command again; it goes on here",
        )  # fmt: skip


def _install(source: Path, built: Path, target: Path, *, scratch: Path) -> None:
    """Gather tools and converter in `scratch`, then rename it to `target`."""
    if scratch.exists():
        shutil.rmtree(scratch)
    (scratch / "bin").mkdir(parents=True)
    (scratch / "convert").mkdir()
    for name in TARGETS:
        shutil.copy2(built / name, scratch / "bin" / name)
    for library in built.glob("lib*.so*"):  # none in the standard build; versions are links to one file
        shutil.copy2(library, scratch / "bin" / library.name, follow_symlinks=False)
    for name in CONVERTER_PARTS:
        origin = source / name
        if origin.is_dir():
            shutil.copytree(origin, scratch / "convert" / name)
        else:
            shutil.copy2(origin, scratch / "convert" / name)
    rename_folder(scratch, target)


if __name__ == "__main__":
    sys.exit(main())

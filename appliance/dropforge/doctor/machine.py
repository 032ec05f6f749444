"""Everything but the GPU: packages, memory, the container's limits, shared memory, disk, llama.cpp."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from dropforge.doctor.finding import Finding, fault, note, ok
from dropforge.hardware import GIB, Hardware
from dropforge.paths import DataRoot

LOW_MEMORY = 4 * GIB
LOW_DISK = 5 * GIB
LOW_SHARED_MEMORY = GIB
LOW_PROCESSES = 512
LOW_OPEN_FILES = 1024
CGROUP = Path("/sys/fs/cgroup")
SHARED_MEMORY = Path("/dev/shm")
PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "safetensors", "gguf")


def package_findings(cpu_cores: int) -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield ok(f"Python {version}, {cpu_cores} CPU cores")
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            yield fault(f"{name} is not installed", "make setup, or pip install 'dropforge[train]'")
        else:
            yield ok(f"{name} {metadata.version(name)}")


def memory_findings(hardware: Hardware) -> Iterator[Finding]:
    what = f"memory: {_gib(hardware.memory_available)} available of {_gib(hardware.memory_total)}"
    if hardware.memory_available >= LOW_MEMORY:
        yield ok(what)
    else:
        yield note(what, "close other programs, or raise the container's --memory; even tiny models need about 2 GiB")


def limit_findings(cgroup: Path = CGROUP) -> Iterator[Finding]:
    """The container's limits (cgroup v2), where one is set. What is in use counts: a limit near its end kills jobs."""
    memory, used = _limit(cgroup / "memory.max"), _limit(cgroup / "memory.current")
    if memory is not None:
        what = f"container limit: {_gib(memory)} of memory" + (f", {_gib(used)} in use" if used is not None else "")
        if memory - (used or 0) < LOW_MEMORY:
            yield note(what, "raise --memory: a job that goes beyond it is killed without a word")
        else:
            yield ok(what)
    swap = _limit(cgroup / "memory.swap.max")
    if memory is not None and swap:
        yield note(f"container limit: {_gib(swap)} of swap; a job that swaps looks as if it stalled",
                   "--memory-swap with the same value as --memory turns it off")  # fmt: skip
    cores = _cores(cgroup / "cpu.max")
    if cores is not None:
        yield (note if cores < 1 else ok)(f"container limit: {cores:g} CPU cores")
    processes = _limit(cgroup / "pids.max")
    if processes is not None:
        what = f"container limit: {processes} processes and threads"
        if processes < LOW_PROCESSES:
            yield note(
                what, f"raise --pids-limit to {LOW_PROCESSES} or more: torch and data loading start many threads"
            )
        else:
            yield ok(what)


def open_file_findings(limit: int | None = None) -> Iterator[Finding]:
    import resource

    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if limit is None else limit
    if soft < LOW_OPEN_FILES:
        yield note(f"only {soft} files may be open at once", f"--ulimit nofile={4 * LOW_OPEN_FILES}")


def shared_memory_findings(folder: Path = SHARED_MEMORY) -> Iterator[Finding]:
    if not folder.is_dir():
        yield note(f"{folder} is missing; loaders with worker processes cannot work", "--shm-size 1g")
        return
    size = shutil.disk_usage(folder).total
    if size < LOW_SHARED_MEMORY:
        yield note(f"shared memory is {_gib(size)}; data loading stays in one process, which is enough for jobs",
                   "--shm-size 1g, for loader workers in notebooks")  # fmt: skip
    else:
        yield ok(f"shared memory: {_gib(size)}")


def disk_findings(root: DataRoot, hardware: Hardware) -> Iterator[Finding]:
    what = f"disk: {_gib(hardware.disk_free)} free at {root.path}"
    yield (
        ok(what) if hardware.disk_free >= LOW_DISK else note(what, "free space or set DROPFORGE_DATA to a larger disk")
    )
    try:
        with tempfile.NamedTemporaryFile(dir=root.inbox) as file:
            os.fsync(file.fileno())
    except OSError as error:
        yield fault(
            f"the data root cannot be written: {error.strerror}",
            f"make {root.path} writable for user {os.getuid()}, or set DROPFORGE_DATA",
        )
    if len({(root.path / name).stat().st_dev for name in root.FOLDERS}) > 1:
        yield fault("parts of the data root lie on different mounts, so renames are not atomic",
                    "mount the whole data root as one volume")  # fmt: skip


def llama_cpp_findings() -> Iterator[Finding]:
    from dropforge.errors import EnvironmentFault
    from dropforge.llama_cpp.locate import find_llama_cpp

    try:
        tools = find_llama_cpp()
        tools.tool("llama-server"), tools.tool("llama-quantize"), tools.converter
    except EnvironmentFault as error:
        problem = error.problems[0]
        yield fault(problem.what, problem.fix)
    else:
        yield ok(f"llama.cpp tools at {tools.root}")


def _limit(path: Path) -> int | None:
    """A number, or None for "max" and where there is no such limit."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cores(path: Path) -> float | None:
    try:
        quota, period = path.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return int(quota) / int(period) if quota.isdigit() else None


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB // 4 else f"{size / (1 << 20):.0f} MiB"

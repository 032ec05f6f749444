"""What this machine has, probed without torch: memory, disk, CPU cores, NVIDIA GPUs."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dropforge.settings import settings

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    uuid: str
    name: str
    memory_total: int
    """Bytes."""
    memory_free: int
    """Bytes."""
    driver: str


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Sizes in bytes."""

    cpu_cores: int
    memory_total: int
    memory_available: int
    disk_free: int
    gpus: tuple[Gpu, ...]
    gpu_note: str
    """Why there are no GPUs, in words; empty when there are some."""

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"


def probe(folder: Path) -> Hardware:
    """Read the machine; `folder` is where results go (its file system's free space counts)."""
    import psutil

    from dropforge.files import free_bytes

    memory = psutil.virtual_memory()
    limit = _container_memory_limit()
    gpus, note = _gpus(memory)
    return Hardware(
        cpu_cores=len(os.sched_getaffinity(0)),
        memory_total=min(memory.total, limit),
        memory_available=min(memory.available, limit),
        disk_free=free_bytes(folder),
        gpus=gpus,
        gpu_note=note,
    )


def _container_memory_limit() -> int:
    """The cgroup v2 limit in bytes, or a very large number."""
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return 1 << 62
    return 1 << 62 if text == "max" else int(text)


class _Memory(Protocol):
    """What psutil.virtual_memory() returns, as far as it is read here; bytes."""

    total: int
    available: int


def _bytes(mebibytes: str, shared: int) -> int:
    """nvidia-smi's MiB; `shared` where it says "[N/A]": that GPU has no memory of its own (DGX Spark)."""
    return int(mebibytes) << 20 if mebibytes.isdigit() else shared


def _gpus(memory: _Memory) -> tuple[tuple[Gpu, ...], str]:
    if settings().device == "cpu":
        return (), "DROPFORGE_DEVICE=cpu"
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return (), "nvidia-smi is not there: no NVIDIA driver, or the container was started without --gpus all"
    query = "uuid,name,memory.total,memory.free,driver_version"
    try:
        done = subprocess.run(
            [tool, f"--query-gpu={query}", "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20
        )
    except subprocess.TimeoutExpired:
        return (), "nvidia-smi did not answer within 20 s: the driver hangs"
    if done.returncode != 0:
        return (), f"nvidia-smi failed: {(done.stderr or done.stdout).strip()[:200]}"
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    gpus = tuple(
        Gpu(uuid=r[0], name=r[1], memory_total=_bytes(r[2], memory.total), memory_free=_bytes(r[3], memory.available),
            driver=r[4])
        for r in rows
    )  # fmt: skip
    return gpus, "" if gpus else "nvidia-smi lists no GPU"

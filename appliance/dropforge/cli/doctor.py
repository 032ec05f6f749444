"""doctor: look at this machine, name every cause, say how to mend it. Exit status 3 when a job could not run."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from dropforge.cli.output import data_root, emit, gib
from dropforge.hardware import GIB, Hardware, probe
from dropforge.paths import DataRoot
from dropforge.settings import settings

LOW_MEMORY = 4 * GIB
LOW_DISK = 5 * GIB
LOW_SHARED_MEMORY = GIB


@dataclass(frozen=True, kw_only=True)
class Finding:
    """`level`: ok, note (works, but know this), fault (a job could not run)."""

    level: str
    what: str
    fix: str = ""


def doctor(arguments: Namespace) -> int:
    root = data_root(arguments, create=True)
    hardware = probe(root.path)
    findings: list[Finding] = []
    for check in CHECKS:
        findings += check(root, hardware)
    signs = {"ok": "ok   ", "note": "note ", "fault": "FAULT"}
    lines = [f"{signs[f.level]}  {f.what}" + (f"\n         fix: {f.fix}" if f.fix else "") for f in findings]
    faults = sum(f.level == "fault" for f in findings)
    lines.append(
        "A job can run here." if not faults else f"{faults} fault(s): no job can run here before they are mended."
    )
    emit(arguments, {"findings": [asdict(f) for f in findings], "faults": faults}, "\n".join(lines))
    return 3 if faults else 0


def _python(root: DataRoot, hardware: Hardware) -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding(level="ok", what=f"Python {version}, {hardware.cpu_cores} CPU cores")
    for name in ("torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "safetensors", "gguf"):
        if importlib.util.find_spec(name) is None:
            yield Finding(
                level="fault", what=f"{name} is not installed", fix="make setup, or pip install 'dropforge[train]'"
            )
        else:
            yield Finding(level="ok", what=f"{name} {metadata.version(name)}")


def _memory(root: DataRoot, hardware: Hardware) -> Iterator[Finding]:
    level = "ok" if hardware.memory_available >= LOW_MEMORY else "note"
    fix = "" if level == "ok" else "close other programs; even tiny models need about 2 GiB"
    yield Finding(level=level, what=f"memory: {gib(hardware.memory_available)} available", fix=fix)
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).total < LOW_SHARED_MEMORY:
        size = gib(shutil.disk_usage(shared).total)
        yield Finding(level="note", what=f"shared memory is {size}; data loading stays in one process, which is enough")


def _disk(root: DataRoot, hardware: Hardware) -> Iterator[Finding]:
    level = "ok" if hardware.disk_free >= LOW_DISK else "note"
    fix = "" if level == "ok" else "free space or set DROPFORGE_DATA to a larger disk"
    yield Finding(level=level, what=f"disk: {gib(hardware.disk_free)} free at {root.path}", fix=fix)
    try:
        with tempfile.NamedTemporaryFile(dir=root.inbox) as file:
            os.fsync(file.fileno())
    except OSError as error:
        yield Finding(
            level="fault",
            what=f"the data root cannot be written: {error.strerror}",
            fix=f"make {root.path} writable for user {os.getuid()}, or set DROPFORGE_DATA",
        )
    devices = {(root.path / name).stat().st_dev for name in root.FOLDERS}
    if len(devices) > 1:
        yield Finding(
            level="fault",
            what="parts of the data root lie on different mounts, so renames are not atomic",
            fix="mount the whole data root as one volume",
        )


def _gpu(root: DataRoot, hardware: Hardware) -> Iterator[Finding]:
    if settings().device == "cpu":
        yield Finding(level="note", what="GPU: not used, because DROPFORGE_DEVICE=cpu")
        return
    if not hardware.gpus:
        yield Finding(
            level="note", what=f"GPU: none; {hardware.gpu_note}", fix="jobs run on the CPU, which suits tiny models"
        )
        return
    for gpu in hardware.gpus:
        yield Finding(
            level="ok",
            what=f"GPU {gpu.name}, {gib(gpu.memory_free)} free of {gib(gpu.memory_total)}, driver {gpu.driver}",
        )
    yield from _cuda_product()


def _cuda_product() -> Iterator[Finding]:
    """A product computed on every GPU and compared: a driver that lists a GPU may still not run a kernel on it."""
    import torch

    if not torch.cuda.is_available():
        yield Finding(
            level="fault",
            what="torch sees no GPU although the driver lists one",
            fix=f"torch {torch.__version__} is built for CUDA {torch.version.cuda}; install a matching build or driver",
        )
        return
    for index in range(torch.cuda.device_count()):
        try:
            a = torch.arange(4096.0, device=f"cuda:{index}").reshape(64, 64)
            right = bool(torch.allclose((a @ a).cpu(), a.cpu() @ a.cpu()))
        except RuntimeError as error:
            yield Finding(
                level="fault",
                what=f"GPU {index} cannot run a kernel: {str(error).splitlines()[0]}",
                fix="check the compute capability against torch's list: torch.cuda.get_arch_list()",
            )
        else:
            level = "ok" if right else "fault"
            yield Finding(level=level, what=f"GPU {index}: a matrix product {'is right' if right else 'is WRONG'}")


def _llama_cpp(root: DataRoot, hardware: Hardware) -> Iterator[Finding]:
    from dropforge.errors import EnvironmentFault
    from dropforge.llama_cpp.locate import find_llama_cpp

    try:
        tools = find_llama_cpp()
        tools.tool("llama-server"), tools.tool("llama-quantize"), tools.converter
    except EnvironmentFault as error:
        problem = error.problems[0]
        yield Finding(level="fault", what=problem.what, fix=problem.fix)
    else:
        yield Finding(level="ok", what=f"llama.cpp tools at {tools.root}")


CHECKS: tuple[Callable[[DataRoot, Hardware], Iterator[Finding]], ...] = (_python, _memory, _disk, _gpu, _llama_cpp)

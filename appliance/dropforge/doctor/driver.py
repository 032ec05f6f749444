"""NVIDIA's driver as nvidia-smi shows it, and whether it is new enough."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from dropforge.doctor.causes import explained, find_cause
from dropforge.doctor.finding import Finding, fault, note, ok
from dropforge.doctor.limited import run_limited

SECONDS = 20.0
QUERY = ("index", "uuid", "name", "compute_cap", "driver_version", "memory.total", "memory.free", "compute_mode",
         "mig.mode.current", "ecc.errors.uncorrected.volatile.total")  # fmt: skip
FLOORS: Mapping[int, int] = {11: 450, 12: 525, 13: 580}
"""Oldest driver branch for each major version of CUDA (NVIDIA's table of minor-version compatibility)."""
CRASHED = find_cause("gpu is lost")
DRIVER_FILE = Path("/proc/driver/nvidia/version")
"""There as soon as the host's kernel has the driver loaded, also where a container got no GPU."""


@dataclass(frozen=True, kw_only=True)
class Smi:
    """nvidia-smi's answer: one mapping from QUERY's names per GPU, or why there is none."""

    gpus: tuple[Mapping[str, str], ...] = ()
    error: str = ""
    installed: bool = True
    host_has_driver: bool = False


def ask_nvidia_smi() -> Smi:
    tool = shutil.which("nvidia-smi")
    host_has_driver = DRIVER_FILE.exists()
    if tool is None:
        return Smi(installed=False, host_has_driver=host_has_driver, error="nvidia-smi is not there")
    try:
        done = run_limited(
            [tool, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"], seconds=SECONDS
        )  # fmt: skip
    except OSError as error:
        return Smi(error=f"nvidia-smi does not answer: {error}", host_has_driver=host_has_driver)
    if done.status is None:
        return Smi(error=f"nvidia-smi does not answer within {SECONDS:g} s", host_has_driver=host_has_driver)
    if done.status != 0:
        return Smi(error=(done.stdout + done.stderr).strip(), host_has_driver=host_has_driver)
    return Smi(gpus=parse_rows(done.stdout), host_has_driver=host_has_driver)


def parse_rows(text: str) -> tuple[Mapping[str, str], ...]:
    """nvidia-smi's CSV without header and units. Cells it cannot tell are "[N/A]" (all memory on a DGX Spark)."""
    rows = csv.reader((line for line in text.splitlines() if line.strip()), skipinitialspace=True)
    return tuple(
        dict(zip(QUERY, (cell.strip() for cell in row), strict=True)) for row in rows if len(row) == len(QUERY)
    )


def compute_capabilities(smi: Smi) -> dict[str, int]:
    """By label ("GPU 0"), as 10 * major + minor; a GPU that does not say has none."""
    found = {}
    for gpu in smi.gpus:
        major, _, minor = gpu["compute_cap"].partition(".")
        if major.isdigit():
            found[f"GPU {gpu['index']}"] = 10 * int(major) + int(minor or 0)
    return found


def packaged_cuda() -> str:
    """Version of the CUDA that came with the Python packages ("13.0"), without importing torch; empty if none did."""
    try:
        return ".".join(metadata.version("nvidia-cuda-runtime").split(".")[:2])
    except metadata.PackageNotFoundError:
        return ""


def driver_findings(smi: Smi, *, cuda: str, unified_memory: str) -> Iterator[Finding]:
    """Faults of the driver and one line per GPU.

    Args:
        cuda: the CUDA version torch was built for, such as "13.0"; empty when unknown.
        unified_memory: text for the memory of a GPU that has none of its own.
    """
    if not smi.gpus:
        yield no_gpu(smi)
        return
    yield driver_version(smi.gpus[0]["driver_version"], cuda=cuda)
    for gpu in smi.gpus:
        yield from _gpu_findings(gpu, unified_memory=unified_memory)


def driver_version(version: str, *, cuda: str) -> Finding:
    """Is the driver new enough? `cuda` as in driver_findings."""
    branch = version.partition(".")[0]
    floor = FLOORS.get(int(cuda.partition(".")[0] or 0), 0)
    if not branch.isdigit():
        return fault(f"driver: nvidia-smi says {version!r} where its version should be", CRASHED.fix)
    if int(branch) < floor:
        return fault(
            f"driver {version} is older than CUDA {cuda} needs ({floor} or newer); the GPU cannot be used",
            "update the host's driver; until then DROPFORGE_DEVICE=cpu runs jobs on the CPU",
        )
    return ok(f"driver {version}" + (f", enough for CUDA {cuda} ({floor} or newer)" if floor else ""))


def no_gpu(smi: Smi) -> Finding:
    """Why there is no GPU, for a Smi without any: a note where nobody expects one, else a fault."""
    if not smi.installed and smi.host_has_driver:
        return fault("GPU: the host has NVIDIA's driver, but this container was given no GPU",
                     "start it with --gpus all (needs the NVIDIA Container Toolkit on the host); "
                     "Podman: --device nvidia.com/gpu=all")  # fmt: skip
    if not smi.installed:
        return note("GPU: no NVIDIA driver was found",
                    "install the driver and the NVIDIA Container Toolkit on the host, start with --gpus all; "
                    "without, jobs run on the CPU")  # fmt: skip
    if not smi.error:
        return fault("GPU: the driver answers, but lists none", find_cause("no devices were found").fix)
    return fault(f"GPU: {explained(smi.error)}", find_cause(smi.error).fix)


def _gpu_findings(gpu: Mapping[str, str], *, unified_memory: str) -> Iterator[Finding]:
    memory = (
        f"{gpu['memory.free']} of {gpu['memory.total']} MiB free" if gpu["memory.total"].isdigit() else unified_memory
    )
    label = f"GPU {gpu['index']}"
    yield ok(f"{label} {gpu['name']}, compute capability {gpu['compute_cap']}, {memory}, {gpu['uuid']}")
    if gpu["compute_mode"] == "Prohibited":
        yield fault(f"{label} lets no process in (compute mode Prohibited)", "on the host: nvidia-smi -c DEFAULT")
    elif gpu["compute_mode"] not in ("Default", "[N/A]"):
        yield note(f"{label} is in compute mode {gpu['compute_mode']}: jobs and notebooks exclude each other",
                   "on the host: nvidia-smi -c DEFAULT")  # fmt: skip
    if gpu["mig.mode.current"] == "Enabled":
        yield note(f"{label} is partitioned (MIG): a job gets one slice", "on the host: nvidia-smi -mig 0 undoes it")
    errors = gpu["ecc.errors.uncorrected.volatile.total"]
    if errors.isdigit() and int(errors):
        yield fault(f"{label} counted {errors} memory errors that could not be corrected", find_cause("ecc error").fix)

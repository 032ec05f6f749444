"""What the error texts of NVIDIA's driver, CUDA, torch, Triton and the engine mean, and how to mend each."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """`pattern` is searched in the error's text, without regard to case."""

    pattern: str
    why: str
    fix: str


CAUSES = (
    Cause("driver/library version mismatch", "the host's driver was updated under running programs",
          "reboot the host (or unload and load its NVIDIA modules), then start the container again"),
    Cause("nvidia-smi does not answer", "the driver hangs, as it does when a GPU has crashed",
          "look for Xid lines in the host's kernel log; reset the GPU or reboot"),
    Cause("couldn't communicate with the nvidia driver", "the host's kernel has no NVIDIA driver loaded",
          "install or repair the driver on the host until nvidia-smi works there"),
    Cause("failed to initialize nvml: (unknown error|insufficient permissions)|operation not permitted",
          "the container lost its right to the devices, which happens when the host reloads its service manager",
          "restart the container; for good: keep cgroup driver and container toolkit current, or give every "
          "/dev/nvidia* with --device"),
    Cause("libnvidia-ml.so|nvml.*shared library", "the driver's management library was not mounted in",
          "start with --gpus all; NVIDIA_DRIVER_CAPABILITIES must hold compute and utility"),
    Cause("libcuda.so", "the driver's CUDA library was not mounted in",
          "start with --gpus all; NVIDIA_DRIVER_CAPABILITIES must hold compute and utility"),
    Cause("no devices were found|no cuda-capable device", "the driver runs but shows this container no GPU",
          "check --gpus and NVIDIA_VISIBLE_DEVICES; on the host: nvidia-smi -L, and the kernel log for Xid lines"),
    Cause("forward compatibility was attempted|error 804|cuda error: .*compat",
          "CUDA's forward-compatibility libraries were loaded on a GPU that does not support them",
          "take them off LD_LIBRARY_PATH and update the host's driver instead"),
    Cause("driver version is insufficient|driver on your system is too old|unsupported toolchain|unsupported ptx",
          "the host's driver is older than this CUDA needs", "update the host's driver"),
    Cause("no kernel image is available|not compatible with the current pytorch|invalid device function",
          "the library carries no code for this GPU", "use an image or a build that lists its compute capability"),
    Cause("system not yet initialized|error 802", "a machine with NVSwitch needs NVIDIA's Fabric Manager",
          "start nvidia-fabricmanager on the host, in the driver's version"),
    Cause("out of memory", "other programs hold the GPU's memory", "nvidia-smi on the host shows which; stop them"),
    Cause("exclusive|device.* busy or unavailable|all cuda-capable devices are busy",
          "the GPU lets only one process in (compute mode), and one is in",
          "on the host: nvidia-smi -c DEFAULT, or stop the other process"),
    Cause("uncorrectable ecc|ecc error", "the GPU's memory is damaged or worn",
          "reset or replace the GPU; on the host: nvidia-smi -q -d ECC,ROW_REMAPPER"),
    Cause("fallen off the bus|gpu is lost|unspecified launch failure|error 999|cuda unknown error",
          "the GPU or its driver crashed", "look for Xid lines in the host's kernel log; reset the GPU or reboot"),
    Cause("failed to find c compiler|gcc.*not found|cc1.*not found|python.h",
          "Triton compiles its launchers with a C compiler",
          "install gcc, libc6-dev and python3-dev, or use the image, which has them"),
    Cause("torch does not show this gpu|no cuda gpus are available",
          "fewer GPUs are visible to CUDA than to the driver",
          "unset CUDA_VISIBLE_DEVICES, and choose GPUs with --gpus instead"),
    Cause("ptxas", "Triton's assembler does not know this GPU",
          "use a Triton release that supports its compute capability"),
    Cause("sigill", "a library uses instructions that this CPU does not have", "use a build for this CPU"),
    Cause("no space left|disk quota", "a disk is full", "free space; caches lie under cache/ in the data root"),
    Cause("permission denied|read-only file system", "a cache folder cannot be written",
          "point TRITON_CACHE_DIR and HOME to folders that can be written"),
    Cause("no module named|cannot import name|undefined symbol|cannot open shared object",
          "a library is missing or was built for another one's version",
          "use the locked versions: make setup, or the image"),
)  # fmt: skip
"""Searched in order; the first that matches is named."""

UNKNOWN = Cause("", "", "run it again with CUDA_LAUNCH_BLOCKING=1, and look for Xid lines in the host's kernel log")


def find_cause(error: str) -> Cause:
    """The cause of an error text; UNKNOWN, whose `why` is empty, when none is known."""
    return next((cause for cause in CAUSES if re.search(cause.pattern, error, re.IGNORECASE)), UNKNOWN)


def explained(error: str) -> str:
    """The error's last line, with its cause in brackets when it is known."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    why = find_cause(error).why
    return (lines[-1][:300] if lines else "no message") + (f" ({why})" if why else "")

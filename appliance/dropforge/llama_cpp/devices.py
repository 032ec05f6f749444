"""Which GPUs llama.cpp may use: none where the CPU was asked for, none where it was not compiled for one of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from dropforge.doctor.driver import ask_nvidia_smi, compute_capabilities
from dropforge.doctor.libraries import llama_cpp_build_list
from dropforge.settings import settings

CPU_ONLY = ("--device", "none")


def device_arguments(root: Path) -> tuple[str, ...]:
    """Arguments for the tools in `root`: CPU_ONLY, or none where they may take every GPU they find.

    Left alone, llama.cpp takes a GPU that it has no code for, and ends at the first kernel.
    """
    built = llama_cpp_build_list(root)
    if not built:
        return ()
    if settings().device == "cpu" or not all(built.runs_on(one) for one in _capabilities_here()):
        return CPU_ONLY
    return ()


@cache
def _capabilities_here() -> frozenset[int]:
    """Asked once per process: nvidia-smi takes up to a second, and GPUs do not come and go."""
    return frozenset(compute_capabilities(ask_nvidia_smi()).values())

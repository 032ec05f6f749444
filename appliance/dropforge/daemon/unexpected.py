"""The reason for an exception that nobody raised on purpose: what the exception says about the machine."""

from __future__ import annotations

import errno

from dropforge.daemon.attempts import AttemptEnd
from dropforge.errors import Reason
from dropforge.states import State

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_GPU_LOST = (
    "gpu is lost", "fallen off the bus", "no cuda-capable device", "uncorrectable ecc",
    "unable to determine the device handle",
    "device(s) is/are busy or unavailable", "system not yet initialized", "unknown error", "driver shutting down",
)  # fmt: skip
"""What the CUDA driver says when the device itself has failed, in lower case."""


def end_of_unexpected(error: Exception) -> AttemptEnd:
    """How an attempt ended that raised `error`."""
    text = f"{type(error).__name__}: {error}"
    if no_space_in(error):
        return AttemptEnd(state=State.FAILED, reason=Reason.DISK, message=f"the disk is full: {text}", no_space=True)
    if isinstance(error, MemoryError):
        return AttemptEnd(state=State.FAILED, reason=Reason.OOM_HOST, message="the machine's memory is full")
    if type(error).__name__ == "OutOfMemoryError":  # torch's, named because this file must start without torch
        return AttemptEnd(state=State.FAILED, reason=Reason.OOM_GPU,
                          message="the GPU's memory is full: use a smaller per_device_train_batch_size, a shorter "
                                  f"max_seq_length or quantization: nf4; {text}")  # fmt: skip
    if is_gpu_lost(error):
        return AttemptEnd(state=State.FAILED, reason=Reason.GPU_LOST, message=f"the GPU failed: {text}")
    return AttemptEnd(state=State.FAILED, reason=Reason.CRASH, message=f"{text}; the log has the traceback")


def no_space_in(error: BaseException) -> bool:
    """True for a full disk or quota, also when a library has wrapped it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in NO_SPACE:
            return True
        if "no space left on device" in str(seen).lower() or "(os error 28)" in str(seen).lower():
            return True  # Rust and C++ writers (safetensors, torch) put the system's words into their own exceptions
        seen = seen.__cause__ or seen.__context__
    return False


def is_gpu_lost(error: Exception) -> bool:
    text = str(error).lower()
    return ("cuda" in text or "nvml" in text or "nvidia" in text) and any(word in text for word in _GPU_LOST)

"""Decides, per call, whether an operation runs as a Triton kernel or as plain PyTorch, and says why.

An operation's public function does::

    choice = choose("rms_norm", x, weight)
    if choice.backend is Backend.REFERENCE:
        return reference.rms_norm(x, weight, eps=eps)

The rule: CUDA tensors go to Triton, everything else to the reference. Tests (and whoever hunts a numeric difference)
override it with ``forced``. Triton kernels run on CPU tensors only under Triton's interpreter, which Triton itself
switches on when ``TRITON_INTERPRET=1`` is in the environment *before* the module with the kernel is imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import NamedTuple

import torch


class Backend(StrEnum):
    """What can run an operation."""

    TRITON = "triton"
    """A Triton kernel: on the GPU, or in Triton's interpreter on the CPU."""
    REFERENCE = "reference"
    """Plain PyTorch: any device, differentiable by PyTorch's own autograd."""


class Choice(NamedTuple):
    """The backend of one call and the reason in words (for logs and reports)."""

    backend: Backend
    reason: str


# Constant results are shared, because this runs on every call of every operation.
_CUDA = Choice(Backend.TRITON, "tensors are on a CUDA device")
_NO_CUDA = Choice(Backend.REFERENCE, "tensors are not on a CUDA device")
_FORCED_TRITON = Choice(Backend.TRITON, "forced to triton by the caller")
_FORCED_REFERENCE = Choice(Backend.REFERENCE, "forced to reference by the caller")

# A process-wide stack rather than a context variable: backward passes of CUDA tensors run in autograd's own threads
# and must see it.
_forced: list[Backend] = []


def interpreter_on() -> bool:
    """Whether Triton's interpreter is asked for. The one place of this package that reads the environment."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def choose(op: str, *tensors: torch.Tensor | None, force: Backend | None = None) -> Choice:
    """Returns the backend for a call of ``op`` with these tensors; ``None`` entries (absent optional arguments) are
    skipped.

    ``force`` wins over ``forced(...)``, which wins over the rule (CUDA -> triton, else reference).
    Raises ValueError when the tensors live on different devices, and when Triton is forced for tensors that it cannot
    reach.
    """
    first = None
    for tensor in tensors:
        if tensor is None:
            continue
        if first is None:
            first = tensor
        elif tensor.device != first.device:
            found = ", ".join(str(t.device) for t in tensors if t is not None)
            raise ValueError(f"{op}: all tensors must be on one device; received {found}")
    if first is None:
        raise ValueError(f"{op}: at least one tensor is needed to choose a backend; received none")
    wanted = force if force is not None else (_forced[-1] if _forced else None)
    if wanted is None:
        return _CUDA if first.is_cuda else _NO_CUDA
    if wanted is Backend.REFERENCE:
        return _FORCED_REFERENCE
    if not first.is_cuda and not interpreter_on():
        raise ValueError(
            f"{op}: the triton backend was forced for tensors on {first.device}; it needs a CUDA device, "
            "or TRITON_INTERPRET=1 set before dropforge_kernels.ops is imported"
        )
    return _FORCED_TRITON


@contextmanager
def forced(backend: Backend | str) -> Iterator[None]:
    """Runs every operation of the block (all threads of the process) on ``backend``. Blocks nest; the innermost
    wins.
    """
    _forced.append(Backend(backend))
    try:
        yield
    finally:
        _forced.pop()

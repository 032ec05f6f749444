"""Argument checks of the public operations: each raises with the operation, the argument, what was expected and what
was received.

They cost fractions of a microsecond when nothing is wrong: messages are built only on failure, and nothing here waits
for the GPU except ``check_cu_seqlens`` when it is told to look at the values.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

FLOATS = frozenset({torch.bfloat16, torch.float16, torch.float32})
"""The dtypes that the training kernels take."""

INT32_MAX = 2**31 - 1


def check_tensor(op: str, name: str, value: object) -> None:
    """Raises TypeError unless ``value`` is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor; received {type(value).__name__}")


def check_dtype(op: str, name: str, tensor: torch.Tensor, allowed: Collection[torch.dtype] = FLOATS) -> None:
    """Raises TypeError unless the dtype is one of ``allowed`` (default: bf16, fp16, fp32)."""
    if tensor.dtype not in allowed:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in allowed))
        raise TypeError(f"{op}: {name} must have dtype {names}; received {str(tensor.dtype).removeprefix('torch.')}")


def check_same_dtype(op: str, name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Raises TypeError unless both tensors have one dtype."""
    if tensor.dtype != other.dtype:
        raise TypeError(f"{op}: {name} must have the dtype of {other_name} ({other.dtype}); received {tensor.dtype}")


def check_ndim(op: str, name: str, tensor: torch.Tensor, ndim: int) -> None:
    """Raises ValueError unless the tensor has exactly ``ndim`` dimensions."""
    if tensor.dim() != ndim:
        raise ValueError(f"{op}: {name} must have {ndim} dimensions; received shape {tuple(tensor.shape)}")


def check_shape(op: str, name: str, tensor: torch.Tensor, expected: Sequence[int | str]) -> None:
    """Raises ValueError unless the shape equals ``expected``; a string entry (a legend letter such as "T") matches
    any size.
    """
    shape = tensor.shape
    if len(shape) == len(expected) and all(isinstance(e, str) or e == s for e, s in zip(expected, shape, strict=True)):
        return
    wanted = "(" + ", ".join(str(e) for e in expected) + ")"
    raise ValueError(f"{op}: {name} must have shape {wanted}; received {tuple(shape)}")


def check_same_shape(op: str, name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Raises ValueError unless both tensors have one shape."""
    if tensor.shape != other.shape:
        raise ValueError(
            f"{op}: {name} must have the shape of {other_name} {tuple(other.shape)}; received {tuple(tensor.shape)}"
        )


def check_same_device(op: str, **tensors: torch.Tensor | None) -> None:
    """Raises ValueError unless all given tensors are on one device; ``None`` entries are skipped. Keys are the
    argument names.
    """
    first: tuple[str, torch.Tensor] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first = (name, tensor)
        elif tensor.device != first[1].device:
            raise ValueError(
                f"{op}: {name} must be on the device of {first[0]} ({first[1].device}); received {tensor.device}"
            )


def check_choice(op: str, name: str, value: object, allowed: Collection[object]) -> None:
    """Raises ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(repr(a) for a in allowed)}; received {value!r}")


def check_positive(op: str, name: str, value: float) -> None:
    """Raises ValueError unless ``value`` is above zero."""
    if not value > 0:
        raise ValueError(f"{op}: {name} must be positive; received {value!r}")


def check_width(op: str, name: str, width: int, limit: int) -> None:
    """Raises ValueError unless a row width is between 1 and ``limit`` (what one program of the kernel holds)."""
    if not 1 <= width <= limit:
        raise ValueError(f"{op}: the last dimension of {name} must be between 1 and {limit}; received {width}")


def check_cu_seqlens(op: str, name: str, cu_seqlens: torch.Tensor, total: int, *, values: bool = True) -> None:
    """Checks the cumulative document lengths of a packed row: int32, shape (D + 1,), first 0, never falling, last =
    ``total``.

    Zero-length documents are valid (they pad a batch to a fixed D). ``values=False`` skips what needs the numbers
    themselves, which would wait for the GPU; so does a call during CUDA graph capture or under torch.compile. Raises
    TypeError or ValueError.
    """
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{op}: {name} must have dtype int32; received {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"{op}: {name} must have shape (documents + 1,); received {tuple(cu_seqlens.shape)}")
    if not values or torch.compiler.is_compiling():
        return
    if cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0:
        raise ValueError(f"{op}: {name} must start with 0; received {ends[0]}")
    for i in range(1, len(ends)):
        if ends[i] < ends[i - 1]:
            raise ValueError(f"{op}: {name} must not fall; received {ends[i - 1]} then {ends[i]} at index {i}")
    if ends[-1] != total:
        raise ValueError(f"{op}: {name} must end with the number of tokens {total}; received {ends[-1]}")

"""FlashAttention 4 for long dense rows, where the package flash-attn-4 is installed: forward and backward as two calls.

It compiles itself for a GPU and a kind of head at its first call, and it is young: before a kind is used it is tried on
a few hundred tokens, both ways, against attention in fp32. What does not compile, or differs, is left to cuDNN, and the
log says why.

Legend: T tokens of all rows, H query heads, G key-value heads, D head width.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dropforge_kernels.ops._attention_fa4 import fa4_missing

LOG = logging.getLogger("dropforge")
ROWS_FROM = 2048
"""Tokens of a row from which it is used: on an H200, 12% less time than cuDNN at 8,192 (forward and backward)."""
TOLERANCE = 1e-2
"""Relative L2 distance of the trial from fp32; bf16 gradients come to 3e-3."""
TRIAL = 384

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Rows:
    """Equally long rows, one after the other."""

    edges: torch.Tensor
    """int32, where each begins and the last one ends."""
    length: int


class _Verdicts:
    """What the trials of this process said, by kind of head: "" or why not."""

    def __init__(self) -> None:
        self.on = True
        self.found: dict[tuple[object, ...], str] = {}


_VERDICTS = _Verdicts()


def rows_of(rows: int, tokens: int, device: torch.device) -> Rows:
    """``tokens`` in ``rows`` rows."""
    length = tokens // rows
    return Rows(torch.arange(0, tokens + 1, length, dtype=torch.int32, device=device), length)


@contextmanager
def without_fa4() -> Iterator[None]:
    """For comparisons: inside the block cuDNN does it."""
    before, _VERDICTS.on = _VERDICTS.on, False
    try:
        yield
    finally:
        _VERDICTS.on = before


def switch(on: bool) -> None:
    """The same without a block."""
    _VERDICTS.on = on


def usable(q: torch.Tensor, groups: int, length: int) -> bool:
    """Whether rows of ``length`` tokens with heads like q's (T, H, D) go this way. A kind's first call tries it."""
    if not _VERDICTS.on or length < ROWS_FROM or fa4_missing() is not None:
        return False
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return False  # not proven inside a graph
    kind = (q.device, q.dtype, q.shape[1] // groups, q.shape[2])
    if kind not in _VERDICTS.found:
        _VERDICTS.found[kind] = problem = _try(q, q.shape[1] // groups)
        if problem:
            LOG.warning("FlashAttention 4 is not used for heads of %d: %s", q.shape[2], problem)
    return not _VERDICTS.found[kind]


def fa4_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Rows, scale: float) -> Tensors:
    """q (T, H, D), k and v (T, G, D), causal -> (out (T, H, D), log-sum-exp (H, T) fp32, rows.edges)."""
    with _quiet():
        out, lse, *_ = _functions()[0](
            q, k, v, cu_seqlens_q=rows.edges, cu_seqlens_k=rows.edges, max_seqlen_q=rows.length,
            max_seqlen_k=rows.length, softmax_scale=scale, causal=True, return_lse=True,
        )  # fmt: skip
    return out, lse, rows.edges


def fa4_backward(
    dout: torch.Tensor, out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lse: torch.Tensor,
    rows: Rows, scale: float,
) -> Tensors:  # fmt: skip
    """(dq, dk, dv) in new memory."""
    with _quiet():
        made = _functions()[1](
            q, k, v, out, dout, lse, scale, True, cu_seqlens_q=rows.edges, cu_seqlens_k=rows.edges,
            max_seqlen_q=rows.length, max_seqlen_k=rows.length,
        )  # fmt: skip
    return made[0], made[1], made[2]


def _functions() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The package's forward and backward below its autograd function: the layer keeps what it wants itself."""
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd  # type: ignore[import-not-found]

    return _flash_attn_fwd, _flash_attn_bwd


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Argument aux_data")
        yield


def _try(like: torch.Tensor, group: int) -> str:
    """Why heads like these, ``group`` query heads to a key-value head, cannot be done; empty when they can."""
    width = like.shape[2]
    source = torch.Generator(like.device).manual_seed(0)
    sizes = {"generator": source, "device": like.device}
    joint = torch.randn(TRIAL, 2 * group + 4, width, **sizes).to(like.dtype)  # type: ignore[call-overload]
    dout = torch.randn(TRIAL, 2 * group, width, **sizes).to(like.dtype)  # type: ignore[call-overload]
    q, k, v = joint.split((2 * group, 2, 2), dim=1)
    rows = rows_of(2, TRIAL, like.device)
    try:
        out, lse, _ = fa4_forward(q, k, v, rows, width**-0.5)
        found = (out, *fa4_backward(dout, out, q, k, v, lse, rows, width**-0.5))
        torch.cuda.synchronize() if like.is_cuda else None
    except Exception as error:  # noqa: BLE001  a compiler of its own: whatever fails there, cuDNN does it
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    names = ("output", "dq", "dk", "dv")
    for name, got, want in zip(names, found, _exact(dout, q, k, v, width**-0.5), strict=True):
        distance = float((got.float() - want).norm() / want.norm())
        if not distance < TOLERANCE:
            return f"{name} is {distance:.1e} from fp32"
    return ""


def _exact(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, ...]:
    """Output and gradients of two rows in fp32."""
    leaves = [t.detach().float().unflatten(0, (2, -1)).transpose(1, 2).requires_grad_() for t in (q, k, v)]
    with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
        out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, scale=scale, enable_gqa=True)
    made = torch.autograd.grad(out, leaves, dout.float().unflatten(0, (2, -1)).transpose(1, 2))
    return tuple(t.detach().transpose(1, 2).flatten(0, 1) for t in (out, *made))

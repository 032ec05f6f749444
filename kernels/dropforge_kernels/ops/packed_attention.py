"""Causal attention over documents packed into one row, for rows of many short documents, deterministic.

Legend: T packed tokens, H query heads, G key-value heads (H a multiple of G), D head width.

Forward:   P = softmax(cap(scale q k^T) over the document's keys, not later, not further back than the window)
           out = P v;  lse = log2 of the sum of 2^(score log2 e)
Backward:  delta = sum over D of dout * out;  dS = P (dout v^T - delta);  dq = scale dS k;  dk = scale dS^T q;
           dv = P^T dout, with dk and dv summed over the heads of a group
FlashAttention's variable-length kernel starts a tile for every document up to the longest one's length; with documents
of 200 tokens most of them are empty. Here tiles lie over the packed row (``_packed_kernels``), and no sum depends on
the order in which programs run.
Source: Dao 2023 (arXiv 2307.08691); Milakov and Gimelshein 2018 (arXiv 1805.02867).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton

from dropforge_kernels import checks, reference
from dropforge_kernels.dispatch import Backend, choose
from dropforge_kernels.ops import _packed_kernels as kernels
from dropforge_kernels.ops._common import as_autocast, next_power_of_2, register

OP = "packed_attention"


class Bounds(NamedTuple):
    """Where each token's document begins and ends: two int32 (T,) tensors."""

    starts: torch.Tensor
    ends: torch.Tensor


def document_bounds(cu_seqlens: torch.Tensor, tokens: int, *, validate: bool = True) -> Bounds:
    """The bounds of cu_seqlens (N + 1,) int32, which must begin with 0, never fall and end with ``tokens``; empty
    documents are fine.

    ``validate=False`` trusts the values: looking at them waits for the GPU. Can be captured, unvalidated then.
    Raises TypeError or ValueError.
    """
    checks.check_cu_seqlens("document_bounds", "cu_seqlens", cu_seqlens, tokens, values=validate)
    place = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
    # Not in cu_seqlens[1:]: compiled, torch 2.11 searches a slice from its base's start (pytorch issue 182343).
    document = torch.searchsorted(cu_seqlens, place, right=True) - 1
    return Bounds(cu_seqlens[document], cu_seqlens[document + 1])


class Tiles(NamedTuple):
    """(queries, keys, warps, stages) of each kernel."""

    forward: tuple[int, int, int, int]
    query: tuple[int, int, int, int]
    key: tuple[int, int, int, int]


@lru_cache(maxsize=16)
def _roomy(device: torch.device) -> bool:
    """Whether a program may have the 200 KB of shared memory that the large tiles of wide heads need: Hopper and
    the large Blackwells."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


def tiles(width: int, itemsize: int, *, roomy: bool = False) -> Tiles:
    """Tile sizes by head width; ``roomy``: 200 KB of shared memory. Measured on an H200."""
    if itemsize == 4:
        return Tiles((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1))
    if width <= 64:
        return Tiles((128, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3))
    if width <= 128:
        return Tiles((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 2))
    if roomy:
        return Tiles((128, 64, 8, 2), (64, 16, 4, 3), (64, 64, 8, 2))
    return Tiles((64, 32, 4, 2), (64, 32, 4, 2), (32, 64, 8, 1))


def _block(width: int) -> int:
    """Columns of a tile: the tensor cores' products want 16 at least."""
    return max(16, next_power_of_2(width))


def packed_attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: Bounds, scale: float, window: int | None,
    softcap: float | None, cut: Tiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The launch alone: (out (T, H, D) contiguous, lse (H, T) fp32)."""
    tokens, heads, width = q.shape
    out = torch.empty((tokens, heads, width), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    if tokens:
        m, n, warps, stages = (cut or tiles(width, q.element_size(), roomy=_roomy(q.device))).forward
        kernels.packed_forward_kernel[(triton.cdiv(tokens, m), heads)](
            q, k, v, out, lse, bounds.starts, tokens, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            scale, softcap or 1.0, window or 0, heads, heads // k.shape[1], width, _block(width), m, n,
            window is not None, softcap is not None, q.dtype is torch.float32, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out, lse


def packed_attention_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    bounds: Bounds, scale: float, window: int | None, softcap: float | None,
    into: tuple[torch.Tensor, torch.Tensor, torch.Tensor], cut: Tiles | None = None,
) -> None:  # fmt: skip
    """The launches alone: writes dq, dk and dv into ``into``, tensors like q, k and v with any strides but the last."""
    tokens, heads, width = q.shape
    if not tokens:
        return
    chosen = cut or tiles(width, q.element_size(), roomy=_roomy(q.device))
    dq, dk, dv = into
    delta = torch.empty_like(lse)
    shared = (scale, softcap or 1.0, window or 0)
    group, block = heads // k.shape[1], _block(width)
    flags = (window is not None, softcap is not None, q.dtype is torch.float32)
    strides = (*dout.stride()[:2], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    m, n, warps, stages = chosen.query
    kernels.packed_query_kernel[(triton.cdiv(tokens, m), heads)](
        dout, q, k, v, out, lse, delta, dq, bounds.starts, tokens, *strides, *dq.stride()[:2], *shared,
        heads, group, width, block, m, n, *flags, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    m, n, warps, stages = chosen.key
    kernels.packed_key_kernel[(triton.cdiv(tokens, n), k.shape[1])](
        dout, q, k, v, lse, delta, dk, dv, *bounds, tokens, *strides, *dk.stride()[:2], *dv.stride()[:2], *shared,
        group, width, block, m, n, *flags, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _forward_op(q, k, v, starts, ends, scale, window, softcap):
    return packed_attention_forward(q, k, v, Bounds(starts, ends), scale, window, softcap)


def _backward_op(dout, q, k, v, out, lse, starts, ends, scale, window, softcap):
    into = tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    packed_attention_backward(dout, q, k, v, out, lse, Bounds(starts, ends), scale, window, softcap, into)
    return into


_OPTIONS = "Tensor starts, Tensor ends, float scale, int? window, float? softcap"
_FORWARD = register(
    OP,
    f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    _forward_op,
    lambda q, *_: (q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)),
)
_BACKWARD = register(
    f"{OP}_backward",
    f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _backward_op,
    lambda dout, q, k, v, *_: tuple(t.new_empty(t.shape) for t in (q, k, v)),
)


def _setup(ctx, inputs, output):
    q, k, v, starts, ends, *options = inputs
    ctx.save_for_backward(q, k, v, *output, starts, ends)
    ctx.options = options


def _differentiate(ctx, run, dout):
    return *run(dout, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


class _PackedAttention(torch.autograd.Function):
    """Eager form: saves q, k, v, out, lse and the bounds."""

    @staticmethod
    def forward(ctx, *arguments: object) -> torch.Tensor:
        output = _forward_op(*arguments)
        _setup(ctx, arguments, output)
        return output[0]

    @staticmethod
    def backward(ctx, dout) -> tuple[torch.Tensor | None, ...]:
        return _differentiate(ctx, _backward_op, dout)


_FORWARD.register_autograd(lambda ctx, dout, _: _differentiate(ctx, _BACKWARD, dout), setup_context=_setup)


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: Bounds,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Softmax attention of each token over its document's tokens up to itself.

    Args:
        q: (T, H, D), bf16, fp16 or fp32, last dimension contiguous, other strides free. k, v: (T, G, D) likewise.
        bounds: from ``document_bounds``. scale: of the scores; None = 1 / sqrt(D).
        window: number of keys a query sees, its own included; None = all. softcap: bound of the scores (Gemma 2).

    Returns (T, H, D), contiguous. Softmax and sums in fp32; the same bits at every run. Under autocast q, k and v
    are cast to its dtype, as torch's own attention does. Saved for backward: q, k, v, out and the log-sum-exp (4 bytes
    a head and token). No host wait; can be captured.
    Raises TypeError or ValueError for wrong dtypes, shapes or devices.
    """
    q, k, v = as_autocast(q, k, v)
    _check(q, k, v, bounds, window, softcap)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if choose(OP, q, k, v, bounds.starts).backend is Backend.REFERENCE:
        return reference.packed_attention(q, k, v, bounds, scale=scale, window=window, softcap=softcap)
    arguments = (q, k, v, *bounds, scale, window, None if softcap is None else float(softcap))
    if torch.compiler.is_compiling():
        return _FORWARD(*arguments)[0]
    return _PackedAttention.apply(*arguments)


def _check(q, k, v, bounds, window, softcap) -> None:
    checks.check_dtype(OP, "q", q)
    checks.check_ndim(OP, "q", q, 3)
    for name, tensor in (("k", k), ("v", v)):
        checks.check_same_dtype(OP, name, tensor, "q", q)
    checks.check_shape(OP, "k", k, (q.shape[0], "G", q.shape[2]))
    checks.check_same_shape(OP, "v", v, "k", k)
    heads, groups = q.shape[1], k.shape[1]
    if groups == 0 or heads % groups:
        raise ValueError(f"{OP}: the heads of q must be a multiple of those of k; received {heads} and {groups}")
    checks.check_width(OP, "q", q.shape[-1], 256)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
            raise ValueError(f"{OP}: {name} must have a contiguous last dimension; received stride {tensor.stride()}")
    for name, tensor in (("starts", bounds.starts), ("ends", bounds.ends)):
        checks.check_dtype(OP, name, tensor, {torch.int32})
        checks.check_shape(OP, name, tensor, (q.shape[0],))
    checks.check_same_device(OP, q=q, k=k, v=v, starts=bounds.starts, ends=bounds.ends)
    if window is not None:
        checks.check_positive(OP, "window", window)
    if softcap is not None:
        checks.check_positive(OP, "softcap", softcap)

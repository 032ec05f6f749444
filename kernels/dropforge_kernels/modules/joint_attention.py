"""Attention of a hand-written layer: from the joint projection qkv to the attention's output, rotation included.

Three ways, by what the batch is and where it lies:

    packed   ``ops.packed_attention`` for rows of several documents and for capped scores; one gradient in one piece
    dense    rows of one document each, without window and cap: FlashAttention 4 for long ones where it is installed
             (``fa4``), else cuDNN
    graph    whatever ``ops.attention`` or ``ops.packed_attention`` do elsewhere, differentiated by autograd

The first two need only qkv, the output and the log-sum-exp for their backward, and qkv can be multiplied out again; so
a layer may keep the output alone and never run its attention twice. The third keeps a small graph of its own.

Legend: T tokens, H query heads, G key-value heads, D head width; qkv (T, (H + 2 G) D).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dropforge_kernels.dispatch import Backend, choose
from dropforge_kernels.modules.fa4 import fa4_backward, fa4_forward, rows_of, usable
from dropforge_kernels.modules.head_pieces import head_pieces
from dropforge_kernels.modules.layer import AttentionShape, Frame
from dropforge_kernels.ops import attention, packed_attention, qk_norm_rope, rope
from dropforge_kernels.ops._heads import launch_forward, launch_norm_backward
from dropforge_kernels.ops.packed_attention import packed_attention_backward, packed_attention_forward

_CUDNN_BACKWARD = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
FA4_LSE = 2
"""Dimensions of FlashAttention 4's log-sum-exp (H, T); cuDNN's has four."""
CUDNN_WIDTH = 128
"""Widest head that cuDNN's attention takes on Hopper in both directions."""


@dataclass
class Attended:
    """What an attention leaves for its backward."""

    qkv: torch.Tensor
    """With q and k rotated in place, unless they are normed first. With ``graph``: the leaf of that graph."""
    out: torch.Tensor
    """(T, H D)."""
    lse: torch.Tensor | None
    """The log-sum-exp in the form that the way's own backward reads; None with ``graph``."""
    graph: torch.Tensor | None = None
    """The output with autograd's graph behind it."""


def way(shape: AttentionShape, frame: Frame, x: torch.Tensor) -> str:
    """ "packed", "dense" or "graph" for a layer whose tensors are like x."""
    if choose("attend", x).backend is not Backend.TRITON:
        return "graph"
    if frame.bounds is not None:
        return "packed"
    half = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
    plain = shape.window is None and shape.softcap is None
    return "dense" if half and plain and shape.width <= CUDNN_WIDTH and shape.width % 8 == 0 else "graph"


def attend(shape: AttentionShape, qkv: torch.Tensor, frame: Frame) -> Attended:
    """The forward. Takes qkv over: nobody else may need it."""
    how = way(shape, frame, qkv)
    if how == "graph":
        with torch.enable_grad():
            graph = _differentiable(shape, qkv.requires_grad_(), frame)
        return Attended(qkv, graph.detach(), None, graph)
    q, k, v = _parts(shape, qkv)
    q, k = _rotated(shape, frame, q, k)
    if how == "packed":
        assert frame.bounds is not None
        out, lse = packed_attention_forward(q, k, v, frame.bounds, shape.scale, shape.window, shape.softcap)
        return Attended(qkv, out.view(qkv.shape[0], -1), lse)
    tokens = qkv.shape[0]
    if usable(q, shape.groups, tokens // frame.rows):
        out, lse, _ = fa4_forward(q, k, v, rows_of(frame.rows, tokens, q.device), shape.scale)
        return Attended(qkv, out.view(tokens, -1), lse)
    q, k, v = (_rows(t, frame) for t in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, True, False, scale=shape.scale
    )
    return Attended(qkv, out.transpose(1, 2).reshape(qkv.shape[0], -1), lse)


def attend_again(
    shape: AttentionShape, qkv: torch.Tensor, frame: Frame, out: torch.Tensor, lse: torch.Tensor
) -> Attended:
    """What ``attend`` left, from its kept output and a qkv multiplied out again. Not for way "graph"."""
    if shape.q_norm is None:
        q, k, _ = _parts(shape, qkv)
        _rotated(shape, frame, q, k)
    return Attended(qkv, out, lse)


def attend_backward(shape: AttentionShape, dout: torch.Tensor, state: Attended, frame: Frame) -> torch.Tensor:
    """dqkv from dout (T, H D), contiguous."""
    if state.graph is not None:
        (dqkv,) = torch.autograd.grad(state.graph, state.qkv, dout)
        return dqkv
    assert state.lse is not None
    raw = _parts(shape, state.qkv)
    q, k, v = raw
    if shape.q_norm is not None:
        q, k = _rotated(shape, frame, q, k)
    dqkv = torch.empty_like(state.qkv)
    dq, dk, dv = into = _parts(shape, dqkv)
    if frame.bounds is not None:
        heads = (q.shape[0], shape.heads, shape.width)
        packed_attention_backward(
            dout.view(heads), q, k, v, state.out.view(heads), state.lse, frame.bounds,
            shape.scale, shape.window, shape.softcap, into,
        )  # fmt: skip
    else:
        out = state.out.view(-1, shape.heads, shape.width)
        tensors = (dout.view_as(out), out, q, k, v)
        pieces = head_pieces(shape.heads, shape.groups, q.shape[0]) if frame.rows == 1 else 1
        run = _fa4_backward if state.lse.dim() == FA4_LSE else _cudnn_backward
        for piece in range(pieces):
            run(shape, tensors, state.lse, into, (piece, pieces), frame)
    table = frame.tables[shape.angles]
    if shape.q_norm is None or shape.k_norm is None:
        launch_forward(dq, dk, table=table, inplace=True, sign=-1)
        return dqkv
    norm = shape.q_norm
    launch_norm_backward(
        dq, dk, raw[0], raw[1], (norm.weight, shape.k_norm.weight), eps=norm.eps, offset=norm.offset,
        weight_gradient=False, table=table, inplace=True,
    )  # fmt: skip
    return dqkv


def _cudnn_backward(
    shape: AttentionShape, tensors: tuple[torch.Tensor, ...], lse: torch.Tensor, into: tuple[torch.Tensor, ...],
    piece: tuple[int, int], frame: Frame,
) -> None:  # fmt: skip
    """Writes dq, dk and dv of piece i of n (a share of the heads) into ``into``.

    tensors: dout, out, q, k, v, each (T, heads, D); lse (B, H, S, 1). A function of its own, so that what cuDNN returns
    is gone before the next piece begins.
    """
    dout, out, q, k, v = (_share(_rows(t, frame), 1, piece) for t in tensors)
    # Dropout is off, so the state of the random generator is an argument without meaning.
    seed = torch.empty((), dtype=torch.int64, device=q.device)
    length = q.shape[2]
    made = _CUDNN_BACKWARD(
        dout, q, k, v, out, _share(lse, 1, piece), seed, seed, None, None, None, length, length, 0.0, True,
        scale=shape.scale,
    )  # fmt: skip
    for target, gradient in zip(into, made, strict=True):
        _share(_rows(target, frame), 1, piece).copy_(gradient)


def _fa4_backward(
    shape: AttentionShape, tensors: tuple[torch.Tensor, ...], lse: torch.Tensor, into: tuple[torch.Tensor, ...],
    piece: tuple[int, int], frame: Frame,
) -> None:  # fmt: skip
    """The same; lse (H, T)."""
    dout, out, q, k, v = (_share(t, 1, piece) for t in tensors)
    rows = rows_of(frame.rows, q.shape[0], q.device)
    made = fa4_backward(dout, out, q, k, v, _share(lse, 0, piece), rows, shape.scale)
    for target, gradient in zip(into, made, strict=True):
        _share(target, 1, piece).copy_(gradient)


def _share(t: torch.Tensor, dim: int, piece: tuple[int, int]) -> torch.Tensor:
    """Piece i of n along ``dim``."""
    index, pieces = piece
    return t if pieces == 1 else t.unflatten(dim, (pieces, -1)).select(dim, index)


def _rows(x: torch.Tensor, frame: Frame) -> torch.Tensor:
    """(T, heads, D) as (B, heads, S, D)."""
    return x.unflatten(0, (frame.rows, -1)).transpose(1, 2)


def _parts(shape: AttentionShape, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views (T, heads, D) of q, k and v."""
    joint = qkv.view(qkv.shape[0], shape.heads + 2 * shape.groups, shape.width)
    q, k, v = joint.split((shape.heads, shape.groups, shape.groups), dim=1)
    return q, k, v


def _rotated(
    shape: AttentionShape, frame: Frame, q: torch.Tensor, k: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k rotated in place, or normed and rotated into new memory."""
    table = frame.tables[shape.angles]
    if shape.q_norm is None or shape.k_norm is None:
        return launch_forward(q, k, table=table, inplace=True)
    norm = shape.q_norm
    return launch_forward(
        q, k, weights=(norm.weight, shape.k_norm.weight), eps=norm.eps, offset=norm.offset,
        llama=norm.rounding == "llama", table=table,
    )  # fmt: skip


def _differentiable(shape: AttentionShape, qkv: torch.Tensor, frame: Frame) -> torch.Tensor:
    tokens = qkv.shape[0]
    q, k, v = _parts(shape, qkv)
    cos, sin = frame.tables[shape.angles]
    if shape.q_norm is not None and shape.k_norm is not None:
        norm, weights = shape.q_norm, (shape.q_norm.weight, shape.k_norm.weight)
        q, k = qk_norm_rope(q, k, *weights, cos, sin, eps=norm.eps, offset=norm.offset, rounding=norm.rounding)
    else:
        q, k = rope(q, k, cos, sin, inplace=True)
    options: dict[str, Any] = {"scale": shape.scale, "window": shape.window, "softcap": shape.softcap}
    if frame.bounds is not None:
        return packed_attention(q, k, v, frame.bounds, **options).reshape(tokens, -1)
    q, k, v = (t.reshape(frame.rows, tokens // frame.rows, *t.shape[1:]) for t in (q, k, v))
    return attention(q, k, v, **options).reshape(tokens, -1)

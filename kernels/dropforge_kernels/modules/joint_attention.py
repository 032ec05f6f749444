"""Attention of a hand-written layer: from the joint projection qkv to the attention's output, rotation included.

Legend: T tokens, H query heads, G key-value heads, D head width; qkv (T, (H + 2 G) D).
"""

from __future__ import annotations

from typing import Any

import torch

from dropforge_kernels.dispatch import Backend, choose
from dropforge_kernels.modules.layer import AttentionShape, Frame
from dropforge_kernels.ops import attention, packed_attention, qk_norm_rope, rope
from dropforge_kernels.ops._heads import launch_forward, launch_norm_backward
from dropforge_kernels.ops.packed_attention import packed_attention_backward, packed_attention_forward


def attend(shape: AttentionShape, qkv: torch.Tensor, frame: Frame) -> torch.Tensor:
    """qkv -> attention's output (T, H D), differentiable. Rotates in qkv's own memory where it can: nobody else may
    need qkv. Packed rows (and capped scores) take ``packed_attention``, dense rows whatever ``attention`` chooses.
    """
    if frame.bounds is not None and choose("attend", qkv).backend is Backend.TRITON:
        out: torch.Tensor = _JointAttention.apply(qkv, shape, frame)
        return out
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


def _parts(shape: AttentionShape, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views (T, heads, D) of q, k and v."""
    joint = qkv.view(qkv.shape[0], shape.heads + 2 * shape.groups, shape.width)
    q, k, v = joint.split((shape.heads, shape.groups, shape.groups), dim=1)
    return q, k, v


class _JointAttention(torch.autograd.Function):
    """Packed attention on qkv as a whole, so that its gradient is written in one piece. Saves qkv, out and lse.

    Without head norms qkv holds rotated q and k afterwards; with them q and k are normed and rotated once more in the
    backward, which costs less than keeping them.
    """

    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor, shape: AttentionShape, frame: Frame) -> torch.Tensor:
        assert frame.bounds is not None
        q, k, v = _parts(shape, qkv)
        q, k = _rotated(shape, frame, q, k)
        out, lse = packed_attention_forward(q, k, v, frame.bounds, shape.scale, shape.window, shape.softcap)
        ctx.save_for_backward(qkv, out, lse)
        ctx.shape, ctx.frame = shape, frame
        return out.view(qkv.shape[0], -1)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        qkv, out, lse = ctx.saved_tensors
        shape, frame = ctx.shape, ctx.frame
        q, k, v = raw = _parts(shape, qkv)
        if shape.q_norm is not None:
            q, k = _rotated(shape, frame, q, k)
        dqkv = torch.empty_like(qkv)
        into = _parts(shape, dqkv)
        packed_attention_backward(
            dout.view(out.shape), q, k, v, out, lse, frame.bounds, shape.scale, shape.window, shape.softcap, into
        )
        dq, dk, _ = into
        table = frame.tables[shape.angles]
        if shape.q_norm is None or shape.k_norm is None:
            launch_forward(dq, dk, table=table, inplace=True, sign=-1)
            return dqkv, None, None
        norm = shape.q_norm
        before_q, before_k, *_ = launch_norm_backward(
            dq, dk, raw[0], raw[1], (norm.weight, shape.k_norm.weight), eps=norm.eps, offset=norm.offset,
            weight_gradient=False, table=table,
        )  # fmt: skip
        dq.copy_(before_q)
        dk.copy_(before_k)
        return dqkv, None, None


def _rotated(
    shape: AttentionShape, frame: Frame, q: torch.Tensor, k: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    table = frame.tables[shape.angles]
    if shape.q_norm is None or shape.k_norm is None:
        return launch_forward(q, k, table=table, inplace=True)
    norm = shape.q_norm
    return launch_forward(
        q, k, weights=(norm.weight, shape.k_norm.weight), eps=norm.eps, offset=norm.offset,
        llama=norm.rounding == "llama", table=table,
    )  # fmt: skip

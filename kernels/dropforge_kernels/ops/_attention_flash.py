"""The FlashAttention 2 that torch carries, in its variable-length form, with windows and sinks.

The public ``torch.nn.attention.varlen`` is the same kernel; the operator below it is called here because sinks need
its log-sum-exp in both directions, and because one opaque op costs the host less.
Legend: T tokens, H query heads, G key-value heads, D head width, N documents.
"""

from __future__ import annotations

import torch

from dropforge_kernels.ops._common import register
from dropforge_kernels.ops._sinks import apply_sinks, sinks_gradient


def _forward(q, k, v, sinks, cu_seqlens, max_seqlen, causal, scale, left, right):
    """(out (T, H, D), lse (H, T) fp32), both with sinks when given."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, causal, False,
        scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    if sinks is not None:
        out, lse = out.contiguous(), lse.contiguous()
        apply_sinks(out, lse, sinks)
    return out, lse


def _backward(dout, q, k, v, sinks, out, lse, cu_seqlens, max_seqlen, causal, scale, left, right, wants_sinks):
    """(dq, dk, dv, dsinks or an empty tensor)."""
    dout = dout.contiguous()
    # Dropout is off, so the state of the random generator is an argument without meaning.
    state = torch.empty(2, dtype=torch.uint64, device=q.device)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        dout, q, k, v, out, lse, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, causal, state,
        torch.empty(0, device=q.device), scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return dq, dk, dv, sinks_gradient(dout, out, lse, sinks) if wants_sinks else dq.new_empty(0)


_OPTIONS = "Tensor cu_seqlens, SymInt max_seqlen, bool causal, float scale, int left, int right"
_FORWARD = register(
    "flash_attention",
    f"(Tensor q, Tensor k, Tensor v, Tensor? sinks, {_OPTIONS}) -> (Tensor, Tensor)",
    _forward,
    lambda q, *_: (q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)),
)
_BACKWARD = register(
    "flash_attention_backward",
    f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor out, Tensor lse, {_OPTIONS}, bool wants_sinks) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    lambda dout, q, k, v, sinks, *rest: (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        torch.empty_like(sinks) if rest[-1] else q.new_empty(0),
    ),
)


def _setup(ctx, inputs, output):
    q, k, v, sinks, cu_seqlens, *options = inputs
    ctx.save_for_backward(q, k, v, sinks, *output, cu_seqlens)
    ctx.options = options


def _gradients(ctx, run, dout):
    wants_sinks = ctx.needs_input_grad[3]
    dq, dk, dv, dsinks = run(dout, *ctx.saved_tensors, *ctx.options, wants_sinks)
    return dq, dk, dv, dsinks if wants_sinks else None, *(None,) * 6


class _Flash(torch.autograd.Function):
    """Eager form: saves q, k, v, sinks, out and lse."""

    @staticmethod
    def forward(ctx, *arguments: object) -> torch.Tensor:
        output = _forward(*arguments)
        _setup(ctx, arguments, output)
        return output[0]

    @staticmethod
    def backward(ctx, dout) -> tuple[torch.Tensor | None, ...]:
        return _gradients(ctx, _backward, dout)


_FORWARD.register_autograd(lambda ctx, dout, _: _gradients(ctx, _BACKWARD, dout), setup_context=_setup)


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    *,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """q (T, H, D), k and v (T, G, D), bf16 or fp16, D a multiple of 8 up to 256; window counts the query's own
    token.
    """
    left = -1 if window is None else window - 1
    right = 0 if causal else left
    arguments = (q, k, v, sinks, cu_seqlens, max_seqlen, causal, scale, left, right)
    return _FORWARD(*arguments)[0] if torch.compiler.is_compiling() else _Flash.apply(*arguments)

"""Attention sinks around any attention that returns its log-sum-exp: exact in both directions, one small launch each.

Legend: T tokens, H heads, D head width; out (T, H, D), lse (H, T) fp32 natural log, sinks (H,).

A sink is one more score per head, whose probability goes nowhere. With l the log-sum-exp without it:
Forward:   l' = log(exp(l) + exp(sink));   out' = out * exp(l - l') = out * sigmoid(l - sink)
Backward:  an attention backward that is given out' and l' in place of out and l is exact for q, k and v, because it
           only uses P = exp(score - l') and delta = sum over D of dout' * out'.
           dsink = -sum over tokens of exp(sink - l') * delta
Derivation: differentiate the softmax with the extra column (its value vector is zero).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dropforge_kernels.ops._common import next_power_of_2, processors


@triton.jit(do_not_specialize=["tokens"])
def sink_forward_kernel(
    out_ptr, lse_ptr, sinks_ptr, tokens, H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """One token: scales every head of out in place and moves its lse."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_H)
    live = head < H
    lse = tl.load(lse_ptr + head * tokens.to(tl.int64) + token, mask=live, other=0.0)
    sink = tl.load(sinks_ptr + head, mask=live, other=0.0).to(tl.float32)
    # exp of a negative number only, on either side: no overflow whatever the sink is.
    difference = lse - sink
    small = tl.exp(-tl.abs(difference))
    share = tl.where(difference >= 0, 1 / (1 + small), small / (1 + small))
    tl.store(lse_ptr + head * tokens.to(tl.int64) + token, tl.maximum(lse, sink) + tl.log(1 + small), mask=live)
    col = tl.arange(0, BLOCK_D)
    at = out_ptr + token * H * D + head[:, None] * D + col[None, :]
    mask = live[:, None] & (col < D)[None, :]
    out = tl.load(at, mask=mask, other=0.0)
    tl.store(at, (out.to(tl.float32) * share[:, None]).to(out.dtype), mask=mask)


@triton.jit(do_not_specialize=["tokens", "steps"])
def sink_backward_kernel(
    dout_ptr, out_ptr, lse_ptr, sinks_ptr, partial_ptr, tokens, steps,
    H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum of exp(sink - l') * delta over this program's tokens, per head."""
    head = tl.arange(0, BLOCK_H)
    live = head < H
    col = tl.arange(0, BLOCK_D)
    sink = tl.load(sinks_ptr + head, mask=live, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    for step in range(steps):
        token = (step * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
        here = live & (token < tokens)
        mask = here[:, None] & (col < D)[None, :]
        at = token * H * D + head[:, None] * D + col[None, :]
        dout = tl.load(dout_ptr + at, mask=mask, other=0.0).to(tl.float32)
        out = tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32)
        lse = tl.load(lse_ptr + head * tokens.to(tl.int64) + token, mask=here, other=float("inf"))
        total += tl.exp(sink - lse) * tl.sum(dout * out, axis=1)
    tl.store(partial_ptr + tl.program_id(0) * H + head, total, mask=live)


def apply_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> None:
    """Turns (out, lse) of attention without sinks into those with them, in place. out (T, H, D), lse (H, T),
    contiguous.
    """
    tokens, heads, width = out.shape
    if tokens:
        sink_forward_kernel[(tokens,)](
            out, lse, sinks, tokens, heads, width, next_power_of_2(heads), next_power_of_2(width), num_warps=4
        )


def sinks_gradient(dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """dsinks (H,) in the dtype of sinks, from out and lse with sinks. dout and out (T, H, D) contiguous."""
    tokens, heads, width = out.shape
    programs = max(1, min(tokens, 4 * processors(out.device)))
    partial = torch.zeros((programs, heads), dtype=torch.float32, device=out.device)
    if tokens:
        sink_backward_kernel[(programs,)](
            dout, out, lse, sinks, partial, tokens, -(-tokens // programs),
            heads, width, next_power_of_2(heads), next_power_of_2(width), num_warps=4,
        )  # fmt: skip
    return -partial.sum(0).to(sinks.dtype)

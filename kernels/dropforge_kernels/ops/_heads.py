"""Launches the head kernels: how rope, qk_norm and qk_norm_rope cut q and k into tiles, without autograd."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dropforge_kernels.ops._common import next_power_of_2, processors
from dropforge_kernels.ops._head_kernels import heads_backward_kernel, heads_forward_kernel
from dropforge_kernels.ops._sum_rows import sum_rows


class Tile(NamedTuple):
    """How one launch cuts its work."""

    half: int  # rotated pairs (or half the width when nothing is rotated)
    pairs: int  # power of two that holds them
    rest: int  # power of two that holds what is not in a pair; 0 = nothing
    block_t: int
    block_n: int
    warps: int


def tile(heads_q: int, heads_k: int, width: int, half: int | None, *, norm_tokens: int | None = None) -> Tile:
    """About 1,024 elements a program: heads first (up to 8, no more than the smaller of q and k has), then tokens.

    Measured on an H200: 2 warps for rotation alone and for the norm's backward. The norm's forward (``norm_tokens``)
    wants at most 4 heads and 1 warp at large sizes, and 4 warps at sizes that do not fill the GPU.
    """
    half = width // 2 if half is None else half
    padded = next_power_of_2(width)
    block_n = max(1, min(next_power_of_2(min(heads_q, heads_k)), 8, 1024 // padded))
    block_t, warps = max(1, min(16, 1024 // (block_n * padded))), 2
    if norm_tokens is not None and norm_tokens * (heads_q + heads_k) * width > 8 << 20:
        block_n, warps = min(block_n, 4), 1
        block_t = max(1, min(16, 1024 // (block_n * padded)))
    elif norm_tokens is not None and padded <= 128:
        warps = 4
    rest = width - 2 * half
    return Tile(half, next_power_of_2(half), next_power_of_2(rest) if rest else 0, block_t, block_n, warps)


def chunks(heads: int, block_n: int) -> int:
    """Head groups of one tensor."""
    return -(-heads // block_n)


def strides(x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """(x, (batch, token, head) strides) of (B, S, H, D) or (T, H, D) with the last dimension contiguous; copies if
    not.
    """
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        x = x.contiguous()
    s = x.stride()
    return x, (s[0], s[1], s[2]) if x.dim() == 4 else (0, s[0], s[1])


def sizes(x: torch.Tensor) -> tuple[int, int]:
    """(T, S) of (B, S, H, D) or (T, H, D)."""
    shape = x.shape
    return (shape[0] * shape[1], shape[1]) if len(shape) == 4 else (shape[0], shape[0])


def _table_sizes(cos: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if cos is None else (cos.stride(0), cos.shape[0])


def launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    weights: tuple[torch.Tensor | None, torch.Tensor | None] | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    llama: bool = False,
    table: tuple[torch.Tensor, torch.Tensor] | None = None,
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    sign: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm (when ``weights`` is given; its entries may be None) and rotation (when ``table`` is given) of q and k."""
    q_source, q_strides = strides(q)
    k_source, k_strides = strides(k)
    if inplace and (q_source is not q or k_source is not k):
        raise ValueError("rope: inplace needs q and k with a contiguous last dimension")
    if inplace:
        q_out, k_out = q, k
    else:
        q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
        k_out = torch.empty_like(k, memory_format=torch.contiguous_format)
    tokens, sequence = sizes(q)
    if tokens == 0:
        return q_out, k_out
    heads_q, heads_k, width = q.shape[-2], k.shape[-2], q.shape[-1]
    half = None if table is None else table[0].shape[-1]
    cut = tile(heads_q, heads_k, width, half, norm_tokens=None if weights is None else tokens)
    programs = -(-tokens // cut.block_t) * (chunks(heads_q, cut.block_n) + chunks(heads_k, cut.block_n))
    cos, sin = table if table is not None else (None, None)
    q_weight, k_weight = weights if weights is not None else (None, None)
    heads_forward_kernel[(programs,)](
        q_source, k_source, q_weight, k_weight, cos, sin, positions, q_out, k_out, *q_strides, *k_strides,
        *_table_sizes(cos), tokens, sequence, eps, offset,
        heads_q, heads_k, width, cut.half, cut.pairs, cut.rest, cut.block_t, cut.block_n,
        weights is not None, table is not None, q_weight is not None, llama, positions is not None, interleaved,
        inplace, sign, num_warps=cut.warps,
    )  # fmt: skip
    return q_out, k_out


def launch_norm_backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    weights: tuple[torch.Tensor | None, torch.Tensor | None],
    *,
    eps: float,
    offset: float,
    weight_gradient: bool,
    table: tuple[torch.Tensor, torch.Tensor] | None = None,
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(dq, dk, dq_weight, dk_weight) for inputs before the norm; the weight gradients are None unless asked for.

    inplace: the result takes the place of dq and dk, whose strides then are those of the result.
    """
    if inplace and not dq.stride(-1) == dk.stride(-1) == 1:
        raise ValueError("qk_norm: inplace needs dq and dk with a contiguous last dimension")
    dq, dq_strides = strides(dq)
    dk, dk_strides = strides(dk)
    q, q_strides = strides(q)
    k, k_strides = strides(k)
    q_out, k_out = dq, dk
    if not inplace:
        q_out, k_out = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k))
    tokens, sequence = sizes(q)
    heads_q, heads_k, width = q.shape[-2], k.shape[-2], q.shape[-1]
    cut = tile(heads_q, heads_k, width, None if table is None else table[0].shape[-1])
    q_chunks, k_chunks = chunks(heads_q, cut.block_n), chunks(heads_k, cut.block_n)
    blocks = -(-tokens // cut.block_t)
    programs, partial = blocks, None
    if weight_gradient:
        programs = max(1, min(blocks, 8 * processors(q.device) // (q_chunks + k_chunks)))
        rows = programs * (q_chunks + k_chunks) if tokens else 0  # first those of q, then those of k
        partial = torch.empty((rows, width), dtype=torch.float32, device=q.device)
    cos, sin = table if table is not None else (None, None)
    if tokens:
        heads_backward_kernel[(programs * (q_chunks + k_chunks),)](
            dq, dk, q, k, weights[0], weights[1], cos, sin, positions, q_out, k_out, partial,
            *dq_strides, *dk_strides, *q_strides, *k_strides, *_table_sizes(cos),
            tokens, sequence, -(-blocks // programs), eps, offset,
            heads_q, heads_k, width, cut.half, cut.pairs, cut.rest, cut.block_t, cut.block_n, table is not None,
            weights[0] is not None, positions is not None, interleaved, weight_gradient, inplace, num_warps=cut.warps,
        )  # fmt: skip
    q_rows = programs * q_chunks if tokens else 0
    if partial is None:
        return q_out, k_out, None, None
    dq_weight, dk_weight = (
        sum_rows(part, weight.dtype)
        for part, weight in zip(partial.split((q_rows, partial.shape[0] - q_rows)), weights, strict=True)
    )
    return q_out, k_out, dq_weight, dk_weight

"""Triton kernels of ``packed_attention``. Scores are kept in units of log2 where no cap needs them otherwise.

Legend: T packed tokens, H query heads, G key-value heads, D head width, M and N the tile's queries and keys.

Tiles lie over the packed row, not over documents: a tile of queries visits the keys from the start of its first
token's document to its own last token, and a token sees what its document's start and its own place allow. So no tile
is empty, however short the documents are, and nothing but two integers per token describes them.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(ptr, index, stride, T, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(tile, BLOCK_D) rows of one head; zeros beyond T and D."""
    feature = tl.arange(0, BLOCK_D)
    at = ptr + index.to(tl.int64)[:, None] * stride + feature[None, :]
    if BLOCK_D == D:
        return tl.load(at, mask=(index < T)[:, None], other=0.0)
    return tl.load(at, mask=(index < T)[:, None] & (feature < D)[None, :], other=0.0)


@triton.jit
def _store(ptr, index, stride, value, T, D: tl.constexpr, BLOCK_D: tl.constexpr):
    feature = tl.arange(0, BLOCK_D)
    at = ptr + index.to(tl.int64)[:, None] * stride + feature[None, :]
    tl.store(at, value.to(ptr.dtype.element_ty), mask=(index < T)[:, None] & (feature < D)[None, :])


@triton.jit
def _scores(product, scale, softcap, CAP: tl.constexpr):
    """Scores in log2 units of a tile of q k^T, and the capped score over the cap (for the backward; else product)."""
    if CAP:
        x = product * (scale / softcap)
        # tanh from exp of a negative number only
        small = tl.exp(-2.0 * tl.abs(x))
        ratio = tl.where(x >= 0, 1.0, -1.0) * (1.0 - small) / (1.0 + small)
        return ratio * (softcap * LOG2_E), ratio
    return product * (scale * LOG2_E), product


@triton.jit(do_not_specialize=["T", "window"])
def packed_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, start_ptr, T, q_token, q_head, k_token, k_head, v_token, v_head,
    scale, softcap, window, H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: out and log2-sum-exp2 of its scores."""
    first = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1).to(tl.int64)  # heads may lie further than 2^31 elements apart
    kv_head = head // GROUP
    row = first + tl.arange(0, BLOCK_M)
    start = tl.load(start_ptr + row, mask=row < T, other=0)
    low = tl.load(start_ptr + first)
    if WINDOW:
        start = tl.maximum(start, row - window + 1)
        low = tl.maximum(low, first - window + 1)
    q = _load(q_ptr + head * q_head, row, q_token, T, D, BLOCK_D)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for begin in range(low // BLOCK_N * BLOCK_N, tl.minimum(first + BLOCK_M, T), BLOCK_N):
        col = begin + tl.arange(0, BLOCK_N)
        k = _load(k_ptr + kv_head * k_head, col, k_token, T, D, BLOCK_D)
        product = tl.dot(q, tl.trans(k), input_precision="ieee" if IEEE else "tf32")
        score, _ = _scores(product, scale, softcap, CAP)
        seen = (col[None, :] >= start[:, None]) & (col[None, :] <= row[:, None])
        score = tl.where(seen, score, float("-inf"))
        new = tl.maximum(best, tl.max(score, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(score - safe[:, None])
        shrink = tl.exp2(best - safe)
        total = total * shrink + tl.sum(p, 1)
        v = _load(v_ptr + kv_head * v_head, col, v_token, T, D, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee" if IEEE else "tf32")
        best = new
    total = tl.where(row < T, total, 1.0)
    _store(out_ptr + head * D, row, H * D, acc / total[:, None], T, D, BLOCK_D)
    tl.store(lse_ptr + head * T + row, best + tl.log2(total), mask=row < T)


@triton.jit(do_not_specialize=["T", "window"])
def packed_query_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, delta_ptr, dq_ptr, start_ptr, T,
    dout_token, dout_head, q_token, q_head, k_token, k_head, v_token, v_head, dq_token, dq_head, scale, softcap, window,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: dq, and delta = sum of dout * out, which ``packed_key_kernel`` reads."""
    first = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1).to(tl.int64)
    kv_head = head // GROUP
    row = first + tl.arange(0, BLOCK_M)
    start = tl.load(start_ptr + row, mask=row < T, other=0)
    low = tl.load(start_ptr + first)
    if WINDOW:
        start = tl.maximum(start, row - window + 1)
        low = tl.maximum(low, first - window + 1)
    q = _load(q_ptr + head * q_head, row, q_token, T, D, BLOCK_D)
    dout = _load(dout_ptr + head * dout_head, row, dout_token, T, D, BLOCK_D)
    out = _load(out_ptr + head * D, row, H * D, T, D, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + head * T + row, delta, mask=row < T)
    lse = tl.load(lse_ptr + head * T + row, mask=row < T, other=float("inf"))
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for begin in range(low // BLOCK_N * BLOCK_N, tl.minimum(first + BLOCK_M, T), BLOCK_N):
        col = begin + tl.arange(0, BLOCK_N)
        k = _load(k_ptr + kv_head * k_head, col, k_token, T, D, BLOCK_D)
        v = _load(v_ptr + kv_head * v_head, col, v_token, T, D, BLOCK_D)
        product = tl.dot(q, tl.trans(k), input_precision="ieee" if IEEE else "tf32")
        score, ratio = _scores(product, scale, softcap, CAP)
        seen = (col[None, :] >= start[:, None]) & (col[None, :] <= row[:, None])
        p = tl.where(seen, tl.exp2(score - lse[:, None]), 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee" if IEEE else "tf32")
        ds = p * (dp - delta[:, None])
        if CAP:
            ds = ds * (1.0 - ratio * ratio)
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee" if IEEE else "tf32")
    _store(dq_ptr + head * dq_head, row, dq_token, acc * scale, T, D, BLOCK_D)


@triton.jit(do_not_specialize=["T", "window"])
def packed_key_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, start_ptr, end_ptr, T,
    dout_token, dout_head, q_token, q_head, k_token, k_head, v_token, v_head, dk_token, dk_head, dv_token, dv_head,
    scale, softcap, window, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one key-value head: dk and dv, summed over the query heads that share it, in fixed order."""
    first = tl.program_id(0) * BLOCK_N
    kv_head = tl.program_id(1)
    col = first + tl.arange(0, BLOCK_N)
    last = tl.minimum(first + BLOCK_N, T) - 1
    end = tl.load(end_ptr + last)
    if WINDOW:
        end = tl.minimum(end, last + window)
    k = _load(k_ptr + kv_head.to(tl.int64) * k_head, col, k_token, T, D, BLOCK_D)
    v = _load(v_ptr + kv_head.to(tl.int64) * v_head, col, v_token, T, D, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    begin = first // BLOCK_M * BLOCK_M
    tiles = tl.cdiv(end - begin, BLOCK_M)
    for step in range(0, tiles * GROUP):
        head = kv_head * GROUP + step // tiles
        row = begin + step % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        start = tl.load(start_ptr + row, mask=row < T, other=T)
        if WINDOW:
            start = tl.maximum(start, row - window + 1)
        q = _load(q_ptr + head.to(tl.int64) * q_head, row, q_token, T, D, BLOCK_D)
        lse = tl.load(lse_ptr + head * T + row, mask=row < T, other=float("inf"))
        product = tl.dot(k, tl.trans(q), input_precision="ieee" if IEEE else "tf32")
        score, ratio = _scores(product, scale, softcap, CAP)
        seen = (col[:, None] >= start[None, :]) & (col[:, None] <= row[None, :])
        p = tl.where(seen, tl.exp2(score - lse[None, :]), 0.0)
        dout = _load(dout_ptr + head.to(tl.int64) * dout_head, row, dout_token, T, D, BLOCK_D)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee" if IEEE else "tf32")
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee" if IEEE else "tf32")
        delta = tl.load(delta_ptr + head * T + row, mask=row < T, other=0.0)
        ds = p * (dp - delta[None, :])
        if CAP:
            ds = ds * (1.0 - ratio * ratio)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee" if IEEE else "tf32")
    _store(dk_ptr + kv_head.to(tl.int64) * dk_head, col, dk_token, dk * scale, T, D, BLOCK_D)
    _store(dv_ptr + kv_head.to(tl.int64) * dv_head, col, dv_token, dv, T, D, BLOCK_D)

"""The kernels behind rope, qk_norm and qk_norm_rope: one launch over the heads of q and of k together.

Legend: B batch, S tokens of one row, T = B * S, H heads (of q or of k), D head width, HALF rotated pairs, N table
rows. A program takes BLOCK_T tokens times BLOCK_N heads of q or of k, as tile rows r = (token, head), and three
column groups of every head: the first and the second element of each rotated pair, and the rest that is not rotated.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rotated(a, b, at, known, cos_ptr, sin_ptr, table_stride, pair, HALF: tl.constexpr, SIGN: tl.constexpr):
    """(a, b) turned by the angles of table row ``at``; SIGN = -1 turns back (the gradient). Unknown rows give NaN."""
    offsets = at[:, None] * table_stride + pair
    mask = known[:, None] & (pair < HALF)
    cos = tl.load(cos_ptr + offsets, mask=mask, other=float("nan")).to(tl.float32)
    sin = tl.load(sin_ptr + offsets, mask=mask, other=float("nan")).to(tl.float32) * SIGN
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def _table_row(positions_ptr, token, tokens, table_rows, HAS_POSITIONS: tl.constexpr):
    """(row of the cos and sin tables, whether it exists) of each tile row."""
    at = token
    if HAS_POSITIONS:
        at = tl.load(positions_ptr + token, mask=token < tokens, other=0).to(tl.int64)
    return at, (at >= 0) & (at < table_rows)


@triton.jit
def _forward_tile(
    x_ptr, weight_ptr, out_ptr, x_batch, x_token, x_head, chunk, block, cos_ptr, sin_ptr, positions_ptr,
    table_stride, table_rows, tokens, sequence, eps, offset,
    HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    LLAMA: tl.constexpr, HAS_POSITIONS: tl.constexpr, INTERLEAVED: tl.constexpr, INPLACE: tl.constexpr,
    SIGN: tl.constexpr,
):  # fmt: skip
    """One tile of q or of k: out = rotate(norm(x))."""
    r = tl.arange(0, BLOCK_T * BLOCK_N)
    row = block * BLOCK_T + r // BLOCK_N
    token = row.to(tl.int64)
    head = chunk * BLOCK_N + r % BLOCK_N
    live = ((token < tokens) & (head < HEADS))[:, None]
    # Divided in 32 bits, which is many times cheaper, then widened: offsets may pass 2^31, tokens do not.
    batch = (row // sequence).to(tl.int64)
    start = (batch * x_batch + (row % sequence).to(tl.int64) * x_token + head * x_head)[:, None]
    out_start = start if INPLACE else ((token * HEADS + head) * D)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    first = 2 * pair if INTERLEAVED else pair
    second = 2 * pair + 1 if INTERLEAVED else pair + HALF
    mask = live & (pair < HALF)
    a = tl.load(x_ptr + start + first, mask=mask, other=0.0)
    b = tl.load(x_ptr + start + second, mask=mask, other=0.0)
    dtype = a.dtype
    a, b = a.to(tl.float32), b.to(tl.float32)
    if REST > 0 and not INPLACE:
        last = 2 * HALF + tl.arange(0, REST)[None, :]
        last_mask = live & (last < D)
        c = tl.load(x_ptr + start + last, mask=last_mask, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(a * a + b * b, axis=1)
        if REST > 0:
            squares += tl.sum(c * c, axis=1)
        rstd = tl.rsqrt(squares / D + eps)[:, None]
        a, b = a * rstd, b * rstd
        if LLAMA:
            a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
        if HAS_WEIGHT:
            a *= tl.load(weight_ptr + first, mask=pair < HALF, other=0.0).to(tl.float32) + offset
            b *= tl.load(weight_ptr + second, mask=pair < HALF, other=0.0).to(tl.float32) + offset
        if REST > 0:
            c = c * rstd
            if LLAMA:
                c = c.to(dtype).to(tl.float32)
            if HAS_WEIGHT:
                c *= tl.load(weight_ptr + last, mask=last < D, other=0.0).to(tl.float32) + offset
    if ROPE:
        if NORM:
            a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
        at, known = _table_row(positions_ptr, token, tokens, table_rows, HAS_POSITIONS)
        a, b = _rotated(a, b, at, known, cos_ptr, sin_ptr, table_stride, pair, HALF, SIGN)
    tl.store(out_ptr + out_start + first, a.to(dtype), mask=mask)
    tl.store(out_ptr + out_start + second, b.to(dtype), mask=mask)
    if REST > 0 and not INPLACE:
        tl.store(out_ptr + out_start + last, c.to(dtype), mask=last_mask)


@triton.jit(do_not_specialize=["tokens", "sequence", "table_rows"])
def heads_forward_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, positions_ptr, q_out_ptr, k_out_ptr,
    q_batch, q_token, q_head, k_batch, k_token, k_head, table_stride, table_rows, tokens, sequence, eps, offset,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
    REST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, LLAMA: tl.constexpr, HAS_POSITIONS: tl.constexpr, INTERLEAVED: tl.constexpr,
    INPLACE: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    """out = rotate(norm(x)); either step can be off. In place (rotation only), the unrotated rest is not touched."""
    Q_CHUNKS: tl.constexpr = (Q_HEADS + BLOCK_N - 1) // BLOCK_N
    CHUNKS: tl.constexpr = Q_CHUNKS + (K_HEADS + BLOCK_N - 1) // BLOCK_N
    chunk = tl.program_id(0) % CHUNKS
    block = tl.program_id(0) // CHUNKS
    if chunk < Q_CHUNKS:
        _forward_tile(
            q_ptr, q_weight_ptr, q_out_ptr, q_batch, q_token, q_head, chunk, block, cos_ptr, sin_ptr, positions_ptr,
            table_stride, table_rows, tokens, sequence, eps, offset, Q_HEADS, D, HALF, PAIRS, REST, BLOCK_T, BLOCK_N,
            NORM, ROPE, HAS_WEIGHT, LLAMA, HAS_POSITIONS, INTERLEAVED, INPLACE, SIGN,
        )  # fmt: skip
    else:
        _forward_tile(
            k_ptr, k_weight_ptr, k_out_ptr, k_batch, k_token, k_head, chunk - Q_CHUNKS, block, cos_ptr, sin_ptr,
            positions_ptr, table_stride, table_rows, tokens, sequence, eps, offset, K_HEADS, D, HALF, PAIRS, REST,
            BLOCK_T, BLOCK_N, NORM, ROPE, HAS_WEIGHT, LLAMA, HAS_POSITIONS, INTERLEAVED, INPLACE, SIGN,
        )  # fmt: skip


@triton.jit
def _backward_tiles(
    dy_ptr, x_ptr, weight_ptr, dx_ptr, dy_batch, dy_token, dy_head, x_batch, x_token, x_head, chunk, program, programs,
    cos_ptr, sin_ptr, positions_ptr, partial_ptr, partial_row, table_stride, table_rows, tokens, sequence, steps, eps,
    offset, HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, ROPE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, INTERLEAVED: tl.constexpr, WEIGHT_GRADIENT: tl.constexpr, INPLACE: tl.constexpr,
):  # fmt: skip
    """``steps`` tiles of q or of k, and their share of the weight's gradient."""
    pair = tl.arange(0, PAIRS)[None, :]
    first = 2 * pair if INTERLEAVED else pair
    second = 2 * pair + 1 if INTERLEAVED else pair + HALF
    r = tl.arange(0, BLOCK_T * BLOCK_N)
    head = chunk * BLOCK_N + r % BLOCK_N
    if HAS_WEIGHT:
        w_a = tl.load(weight_ptr + first, mask=pair < HALF, other=0.0).to(tl.float32) + offset
        w_b = tl.load(weight_ptr + second, mask=pair < HALF, other=0.0).to(tl.float32) + offset
    if REST > 0:
        last = 2 * HALF + tl.arange(0, REST)[None, :]
        if HAS_WEIGHT:
            w_c = tl.load(weight_ptr + last, mask=last < D, other=0.0).to(tl.float32) + offset
        if WEIGHT_GRADIENT:
            sum_c = tl.zeros([BLOCK_T * BLOCK_N, REST], tl.float32)
    if WEIGHT_GRADIENT:
        sum_a = tl.zeros([BLOCK_T * BLOCK_N, PAIRS], tl.float32)
        sum_b = tl.zeros([BLOCK_T * BLOCK_N, PAIRS], tl.float32)
    else:
        steps = 1  # one block a program: the loop goes away
    for step in range(steps):
        row = (step * programs + program) * BLOCK_T + r // BLOCK_N
        token, batch, within = row.to(tl.int64), (row // sequence).to(tl.int64), (row % sequence).to(tl.int64)
        live = ((token < tokens) & (head < HEADS))[:, None]
        mask = live & (pair < HALF)
        dy_start = (batch * dy_batch + within * dy_token + head * dy_head)[:, None]
        x_start = (batch * x_batch + within * x_token + head * x_head)[:, None]
        da = tl.load(dy_ptr + dy_start + first, mask=mask, other=0.0).to(tl.float32)
        db = tl.load(dy_ptr + dy_start + second, mask=mask, other=0.0).to(tl.float32)
        a = tl.load(x_ptr + x_start + first, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + x_start + second, mask=mask, other=0.0).to(tl.float32)
        if ROPE:
            at, known = _table_row(positions_ptr, token, tokens, table_rows, HAS_POSITIONS)
            da, db = _rotated(da, db, at, known, cos_ptr, sin_ptr, table_stride, pair, HALF, -1)
            if WEIGHT_GRADIENT:  # the NaN of rows that do not exist must not reach the sums
                da, db = tl.where(mask, da, 0.0), tl.where(mask, db, 0.0)
        ga, gb = da, db
        if HAS_WEIGHT:
            ga, gb = da * w_a, db * w_b
        # Both sums over the head at once: neither waits for rstd.
        squares = tl.sum(a * a + b * b, axis=1)
        dot = tl.sum(tl.where(mask, ga * a + gb * b, 0.0), axis=1)
        if REST > 0:
            last_mask = live & (last < D)
            dc = tl.load(dy_ptr + dy_start + last, mask=last_mask, other=0.0).to(tl.float32)
            c = tl.load(x_ptr + x_start + last, mask=last_mask, other=0.0).to(tl.float32)
            gc = dc
            if HAS_WEIGHT:
                gc = dc * w_c
            squares += tl.sum(c * c, axis=1)
            dot += tl.sum(gc * c, axis=1)
        rstd = tl.rsqrt(squares / D + eps)[:, None]
        slope = rstd * rstd * (dot / D)[:, None]
        if WEIGHT_GRADIENT:
            sum_a += da * (a * rstd)
            sum_b += db * (b * rstd)
            if REST > 0:
                sum_c += dc * (c * rstd)
        out = dy_start if INPLACE else ((token * HEADS + head) * D)[:, None]
        dtype = dx_ptr.dtype.element_ty
        tl.store(dx_ptr + out + first, (rstd * (ga - a * slope)).to(dtype), mask=mask)
        tl.store(dx_ptr + out + second, (rstd * (gb - b * slope)).to(dtype), mask=mask)
        if REST > 0:
            tl.store(dx_ptr + out + last, (rstd * (gc - c * slope)).to(dtype), mask=last_mask)
    if WEIGHT_GRADIENT:
        base = partial_ptr + partial_row.to(tl.int64) * D
        tl.store(base + first, tl.sum(sum_a, axis=0)[None, :], mask=pair < HALF)
        tl.store(base + second, tl.sum(sum_b, axis=0)[None, :], mask=pair < HALF)
        if REST > 0:
            tl.store(base + last, tl.sum(sum_c, axis=0)[None, :], mask=last < D)


@triton.jit(do_not_specialize=["tokens", "sequence", "steps", "table_rows"])
def heads_backward_kernel(
    dq_ptr, dk_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, positions_ptr,
    dq_in_ptr, dk_in_ptr, partial_ptr,
    dq_batch, dq_token, dq_head, dk_batch, dk_token, dk_head, q_batch, q_token, q_head, k_batch, k_token, k_head,
    table_stride, table_rows, tokens, sequence, steps, eps, offset,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
    REST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, ROPE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_POSITIONS: tl.constexpr, INTERLEAVED: tl.constexpr, WEIGHT_GRADIENT: tl.constexpr,
    INPLACE: tl.constexpr,
):  # fmt: skip
    """Gradient through the rotation, then the norm. rstd is computed again from x, which has to be read anyway.

    g = turn back(dy) * w;  n = x * rstd;  dx = rstd * (g - n * mean(g * n));  dw = sum of turn back(dy) * n over
    rows, of this program's ``steps`` token blocks, into its row of ``partial``: first (programs, chunks of q), then
    those of k.
    """
    Q_CHUNKS: tl.constexpr = (Q_HEADS + BLOCK_N - 1) // BLOCK_N
    CHUNKS: tl.constexpr = Q_CHUNKS + (K_HEADS + BLOCK_N - 1) // BLOCK_N
    chunk = tl.program_id(0) % CHUNKS
    program = tl.program_id(0) // CHUNKS
    programs = tl.num_programs(0) // CHUNKS
    k_row = programs * Q_CHUNKS + program * (CHUNKS - Q_CHUNKS) + chunk - Q_CHUNKS
    if chunk < Q_CHUNKS:
        _backward_tiles(
            dq_ptr, q_ptr, q_weight_ptr, dq_in_ptr, dq_batch, dq_token, dq_head, q_batch, q_token, q_head, chunk,
            program, programs, cos_ptr, sin_ptr, positions_ptr, partial_ptr, program * Q_CHUNKS + chunk, table_stride,
            table_rows, tokens, sequence, steps, eps, offset, Q_HEADS, D, HALF, PAIRS, REST, BLOCK_T, BLOCK_N, ROPE,
            HAS_WEIGHT, HAS_POSITIONS, INTERLEAVED, WEIGHT_GRADIENT, INPLACE,
        )  # fmt: skip
    else:
        _backward_tiles(
            dk_ptr, k_ptr, k_weight_ptr, dk_in_ptr, dk_batch, dk_token, dk_head, k_batch, k_token, k_head,
            chunk - Q_CHUNKS, program, programs, cos_ptr, sin_ptr, positions_ptr, partial_ptr, k_row, table_stride,
            table_rows, tokens, sequence, steps, eps, offset, K_HEADS, D, HALF, PAIRS, REST, BLOCK_T, BLOCK_N, ROPE,
            HAS_WEIGHT, HAS_POSITIONS, INTERLEAVED, WEIGHT_GRADIENT, INPLACE,
        )  # fmt: skip

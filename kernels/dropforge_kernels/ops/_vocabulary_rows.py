"""Triton kernels over rows of logits, shared by cross_entropy, linear_cross_entropy and linear_logprobs.

Legend: N rows (tokens), V vocabulary. With z = softcap * tanh(logit_scale * x / softcap), or z = logit_scale * x
without a soft-cap:

    lse  = log sum_j exp(z_j)           p_j = exp(z_j - lse)           entropy = lse - sum_j p_j z_j
    nll  = (1 - eps) (lse - z_t) + eps (lse - mean_j z_j) + w lse^2    eps = label smoothing, w = z-loss weight

and every gradient of a row that the three operations need has the one form

    dL/dz_j = p_j (A + E z_j) + C + T [j = t]        dL/dx_j = dL/dz_j * logit_scale * (1 - (z_j / softcap)^2)

    nll, upstream g:           A = g (1 + 2 w lse)    T = -g (1 - eps)    C = -g eps / V    E = 0
    log-probability g, entropy h:  A = -g + h (lse - entropy)    T = g    C = 0    E = -h

All statistics are fp32 whatever the logits' dtype. One program reads one row: [LANES, WIDTH] values per step, where
WIDTH values are one thread's own, so that the running maximum needs no exchange between threads and there is one
exponential per value (plus one per WIDTH). Online softmax: Milakov and Gimelshein 2018 (arXiv:1805.02867)."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1.0e38)  # start of a running maximum: finite, so that no step computes inf - inf
WIDTH = 8
"""Values of one thread in one step: 16 bytes of bf16."""


@triton.jit
def _scaled(x, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """z of the module docstring, fp32."""
    z = x.to(tl.float32) * logit_scale
    if HAS_SOFTCAP:
        # tanh(u) = 1 - 2 / (exp(2u) + 1), whose absolute error is an fp32 step; near zero its series, so that the
        # relative one is too
        u = z / softcap
        w = u * u
        series = u * (1.0 + w * (-0.33333333 + w * (0.13333333 - 0.053968254 * w)))
        z = softcap * tl.where(w < 0.04, series, 1.0 - 2.0 / (tl.exp2(u * (2.0 * LOG2E)) + 1.0))
    return z


@triton.jit
def _row_sums(
    row_ptr,
    V,
    logit_scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    NEED_SUM: tl.constexpr,
    NEED_ENTROPY: tl.constexpr,
    EVICTION: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    NARROW: tl.constexpr = False,
):
    """(peak, sum of exp(z - peak), sum of z or 0, sum of exp(z - peak) z or 0) of V values, read once.

    NARROW: logits of 16 bits without soft-cap or sum. Scale and base-2 exponent are then one multiply-add per value
    (a rounding step of fp32 off, far below the logits' own), and values past the end are read as -inf."""
    offsets = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    # Running maximum per lane, of z or (NARROW) of x: then so small that no scale makes it infinite.
    peak = tl.full([LANES], -1.0e30 if NARROW else LOWEST, tl.float32)
    mass = tl.zeros([LANES], tl.float32)  # sum of exp(z - peak)
    total = tl.zeros([LANES], tl.float32)
    moment = tl.zeros([LANES], tl.float32)  # sum of exp(z - peak) * z
    for start in range(0, V, LANES * WIDTH):
        mask = start + offsets < V
        if NARROW:
            x = tl.load(row_ptr + start + offsets, mask=mask, other=-float("inf"), eviction_policy=EVICTION)
            x = x.to(tl.float32)
            slope = logit_scale * LOG2E
            higher = tl.maximum(peak, tl.max(x, axis=1))
            shrink = tl.exp2((peak - higher) * slope)
            e = tl.exp2(x * slope - (higher * slope)[:, None])
            if NEED_ENTROPY:
                moment = moment * shrink + tl.sum(e * tl.where(e > 0.0, x * logit_scale, 0.0), axis=1)
            mass = mass * shrink + tl.sum(e, axis=1)
            peak = higher
        else:
            x = tl.load(row_ptr + start + offsets, mask=mask, other=0.0, eviction_policy=EVICTION)
            z = _scaled(x, logit_scale, softcap, HAS_SOFTCAP)
            if NEED_SUM:
                total += tl.sum(tl.where(mask, z, 0.0), axis=1)
            y = tl.where(mask, z, -float("inf"))
            higher = tl.maximum(peak, tl.max(y, axis=1))
            shrink = tl.exp2((peak - higher) * LOG2E)
            e = tl.exp2((y - higher[:, None]) * LOG2E)
            mass = mass * shrink + tl.sum(e, axis=1)
            if NEED_ENTROPY:
                # a masked-out vocabulary entry (z = -inf) has p z = 0
                moment = moment * shrink + tl.sum(e * tl.where(e > 0.0, y, 0.0), axis=1)
            peak = higher
    if NARROW:
        peak *= logit_scale
    top = tl.max(peak, axis=0)
    weight = tl.exp2((peak - top) * LOG2E)
    return top, tl.sum(mass * weight, axis=0), tl.sum(total, axis=0), tl.sum(moment * weight, axis=0)


@triton.jit
def _gradient(x, is_target, lse, A, T, C, E, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr, HAS_E: tl.constexpr):
    """dL/dx of the module docstring, fp32."""
    z = _scaled(x, logit_scale, softcap, HAS_SOFTCAP)
    p = tl.exp2((z - lse) * LOG2E)
    if HAS_E:
        g = p * (A + E * tl.where(p > 0.0, z, 0.0)) + C
    else:
        g = p * A + C
    g = tl.where(is_target, g + T, g) * logit_scale
    if HAS_SOFTCAP:
        u = z / softcap
        g = g * (1.0 - u * u)
    return g


@triton.jit
def row_loss_kernel(
    logits_ptr,
    gradient_ptr,
    target_ptr,
    nll_ptr,
    lse_ptr,
    entropy_ptr,
    upstream_ptr,
    logits_row_stride,
    V,
    ignore_index,
    logit_scale,
    softcap,
    smoothing,
    z_weight,
    HAS_SOFTCAP: tl.constexpr,
    NEED_SUM: tl.constexpr,
    NEED_ENTROPY: tl.constexpr,
    WRITE_GRADIENT: tl.constexpr,
    HAS_UPSTREAM: tl.constexpr,
    LANES: tl.constexpr,
    LANES_OUT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row: nll, lse, entropy (fp32) and, if asked, d nll / d logits times the scalar ``upstream``, where the
    logits were.

    gradient_ptr may equal logits_ptr. Ignored rows: nll, lse and entropy 0, gradient 0. A target outside [0, V) that
    is not ignore_index gives NaN, never a plausible number. The second pass runs from the row's end to its start:
    what was read last is still in the L2 cache, so that device memory sees one read and one write."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_row_stride
    out_ptr = gradient_ptr + row * logits_row_stride
    target = tl.load(target_ptr + row)
    offsets = tl.arange(0, LANES_OUT)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    steps = tl.cdiv(V, LANES_OUT * WIDTH)
    EVICTION: tl.constexpr = "evict_last" if WRITE_GRADIENT else "evict_first"
    if target == ignore_index:
        tl.store(nll_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        if NEED_ENTROPY:
            tl.store(entropy_ptr + row, 0.0)
        if WRITE_GRADIENT:
            zero = tl.zeros([LANES_OUT, WIDTH], logits_ptr.dtype.element_ty)
            for step in range(0, steps):
                at = step * (LANES_OUT * WIDTH) + offsets
                tl.store(out_ptr + at, zero, mask=at < V)
    else:
        inside = (target >= 0) & (target < V)
        at_target = tl.load(row_ptr + target, mask=inside, other=float("nan"))
        z_target = _scaled(at_target, logit_scale, softcap, HAS_SOFTCAP)
        peak, mass, total, moment = _row_sums(
            row_ptr, V, logit_scale, softcap, HAS_SOFTCAP, NEED_SUM, NEED_ENTROPY, EVICTION, LANES, WIDTH
        )
        lse = peak + tl.log2(mass) * LN2
        entropy = lse - moment / mass
        lse = tl.where(inside, lse, float("nan"))
        nll = (1.0 - smoothing) * (lse - z_target) + z_weight * lse * lse
        if NEED_SUM:
            nll += smoothing * (lse - total / V)
        tl.store(nll_ptr + row, nll)
        tl.store(lse_ptr + row, lse)
        if NEED_ENTROPY:
            tl.store(entropy_ptr + row, entropy)
        if WRITE_GRADIENT:
            g = 1.0
            if HAS_UPSTREAM:
                g = tl.load(upstream_ptr)
            A = g * (1.0 + 2.0 * z_weight * lse)
            T = -g * (1.0 - smoothing)
            C = -g * smoothing / V
            for step in range(0, steps):
                at = (steps - 1 - step) * (LANES_OUT * WIDTH) + offsets
                mask = at < V
                x = tl.load(row_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first")
                dx = _gradient(x, at == target, lse, A, T, C, 0.0, logit_scale, softcap, HAS_SOFTCAP, False)
                tl.store(out_ptr + at, dx.to(gradient_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit
def row_gradient_kernel(
    logits_ptr,
    gradient_ptr,
    target_ptr,
    lse_ptr,
    entropy_ptr,
    upstream_ptr,
    entropy_upstream_ptr,
    logits_row_stride,
    gradient_row_stride,
    upstream_stride,
    V,
    ignore_index,
    logit_scale,
    softcap,
    smoothing,
    z_weight,
    SIGN: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """dL/dx of a tile of one row from the row's saved lse: upstream[row * upstream_stride] times SIGN times d nll /
    dx, plus entropy_upstream[row] times d entropy / dx. SIGN = -1 makes it the gradient of the log-probability
    (smoothing = z_weight = 0).
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * (LANES * WIDTH) + tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    mask = at < V
    target = tl.load(target_ptr + row)
    out_ptr = gradient_ptr + row * gradient_row_stride
    if target == ignore_index:
        tl.store(out_ptr + at, tl.zeros([LANES, WIDTH], gradient_ptr.dtype.element_ty), mask=mask)
    else:
        g = tl.load(upstream_ptr + row * upstream_stride) * SIGN
        lse = tl.load(lse_ptr + row)
        A = g * (1.0 + 2.0 * z_weight * lse)
        T = -g * (1.0 - smoothing)
        C = -g * smoothing / V
        E = 0.0
        if HAS_ENTROPY:
            h = tl.load(entropy_upstream_ptr + row)
            A += h * (lse - tl.load(entropy_ptr + row))
            E = -h
        x = tl.load(logits_ptr + row * logits_row_stride + at, mask=mask, other=0.0)
        dx = _gradient(x, at == target, lse, A, T, C, E, logit_scale, softcap, HAS_SOFTCAP, HAS_ENTROPY)
        tl.store(out_ptr + at, dx.to(gradient_ptr.dtype.element_ty), mask=mask)


@triton.jit
def reduce_loss_kernel(
    nll_ptr,
    target_ptr,
    items_ptr,
    loss_ptr,
    scale_ptr,
    count_ptr,
    N,
    limit,
    ignore_index,
    MEAN: tl.constexpr,
    HAS_ITEMS: tl.constexpr,
    SUM_LOSS: tl.constexpr,
    STORE_COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: scale = 1 / max(divisor, 1), loss = scale * sum(nll) in a fixed order, and the number of rows that
    are not ignored.

    divisor = items[0] if given, else the number of rows that are not ignored (MEAN), else 1. NaN when more than
    ``limit`` rows are not ignored: the caller promised fewer and rows were left out."""
    total = tl.zeros([BLOCK], tl.float32)
    counted = tl.zeros([BLOCK], tl.int32)
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < N
        counted += (tl.load(target_ptr + at, mask=mask, other=ignore_index) != ignore_index).to(tl.int32)
        if SUM_LOSS:
            total += tl.load(nll_ptr + at, mask=mask, other=0.0)
    count = tl.sum(counted, axis=0)
    divisor = 1.0
    if HAS_ITEMS:
        divisor = tl.maximum(tl.load(items_ptr).to(tl.float32), 1.0)
    elif MEAN:
        divisor = tl.maximum(count.to(tl.float32), 1.0)
    scale = tl.where(count > limit, float("nan"), 1.0 / divisor)
    tl.store(scale_ptr, scale)
    if STORE_COUNT:
        tl.store(count_ptr, count.to(tl.float32))
    if SUM_LOSS:
        tl.store(loss_ptr, tl.sum(total, axis=0) * scale)


def lanes_for(vocabulary: int, warps: int, groups: int = 2) -> int:
    """Lanes of one step: each thread takes up to ``groups`` groups of WIDTH values, fewer for short rows. Two were
    best on an H200 for reading, one for the pass that reads the cache and writes.
    """
    return max(32, min(warps * 32 * groups, triton.next_power_of_2(triton.cdiv(vocabulary, WIDTH))))

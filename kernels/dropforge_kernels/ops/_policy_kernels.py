"""The Triton kernel of the GRPO family: value and gradient of one sequence. Formulas: ops/grpo_loss.py."""

from __future__ import annotations

import triton
import triton.language as tl

LIMIT = tl.constexpr(20.0)
LOWEST_LOG_WEIGHT = tl.constexpr(-18.420680743952367)  # log 1e-8


@triton.jit
def _clipped(ratio, inside, advantage, low, high, delta, HAS_DELTA: tl.constexpr):
    """(loss, d loss / d log ratio) of the clipped surrogate."""
    bounded = ratio
    slope = tl.where(inside, ratio, 0.0)
    if HAS_DELTA:
        bounded = tl.minimum(ratio, delta)
        slope = tl.where(ratio > delta, 0.0, slope)
    free = bounded * advantage
    held = tl.minimum(tl.maximum(ratio, low), high) * advantage
    return -tl.minimum(free, held), tl.where(free <= held, -advantage * slope, 0.0)


@triton.jit
def _soft(ratio, inside, advantage, tau):
    """(loss, d loss / d log ratio) of the soft gate."""
    gate = 1.0 / (1.0 + tl.exp(-tau * (ratio - 1.0)))
    slope = tl.where(inside, -4.0 * gate * (1.0 - gate) * ratio * advantage, 0.0)
    return -4.0 / tau * gate * advantage, slope


@triton.jit
def _gamma(total, k, decay):
    """w^k exp(decay (1 - w)) of a sequence's importance weight w = exp(total): 1 at w = 1.

    total in fp64, one value a program: an exponential's relative error is its argument's absolute one, here k times
    that of a sum over all tokens, and decay times w's.
    """
    log_w = tl.clamp(total, LOWEST_LOG_WEIGHT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return tl.exp(decay + k * log_w - decay * tl.exp(log_w)).to(tl.float32)


@triton.jit
def policy_loss_kernel(
    logp_ptr,
    old_ptr,
    ref_ptr,
    advantage_ptr,
    mask_ptr,
    gradient_ptr,
    sums_ptr,
    T,
    low,
    high,
    delta,
    beta,
    tau_positive,
    tau_negative,
    k_positive,
    k_negative,
    decay_positive,
    decay_negative,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    SEQUENCE: tl.constexpr,
    PER_SEQUENCE_MEAN: tl.constexpr,
    SURROGATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One sequence: gradient (T), and sums[b] = (loss, tokens, kl, clipped low, clipped high)."""
    b = tl.program_id(0).to(tl.int64)
    advantage = tl.load(advantage_ptr + b).to(tl.float32)
    lanes = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.float32)
    shift = tl.zeros([BLOCK], tl.float64)
    for start in range(0, T, BLOCK):
        at = b * T + start + lanes
        live = tl.load(mask_ptr + at, mask=start + lanes < T, other=0) != 0
        count += live.to(tl.float32)
        if (SEQUENCE or SURROGATE == "vespo") and HAS_OLD:
            logp = tl.load(logp_ptr + at, mask=live, other=0.0).to(tl.float64)
            moved = logp - tl.load(old_ptr + at, mask=live, other=0.0).to(tl.float64)
            if SURROGATE == "vespo":
                moved = tl.clamp(moved, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
            shift += moved
    tokens = tl.sum(count, axis=0)
    least_one = tl.maximum(tokens, 1.0)
    mean_shift = (tl.sum(shift, axis=0) / least_one).to(tl.float32)
    weight = 1.0
    if PER_SEQUENCE_MEAN:
        weight = 1.0 / least_one
    gamma = 1.0
    if SURROGATE == "vespo":
        k = tl.where(advantage >= 0.0, k_positive, k_negative)
        decay = tl.where(advantage >= 0.0, decay_positive, decay_negative)
        gamma = _gamma(tl.sum(shift, axis=0), k, decay)
    tau = tl.where(advantage > 0.0, tau_positive, tau_negative)
    loss = tl.zeros([BLOCK], tl.float32)
    kl_sum = tl.zeros([BLOCK], tl.float32)
    below = tl.zeros([BLOCK], tl.float32)
    above = tl.zeros([BLOCK], tl.float32)
    for start in range(0, T, BLOCK):
        at = b * T + start + lanes
        here = start + lanes < T
        live = tl.load(mask_ptr + at, mask=here, other=0) != 0
        logp = tl.load(logp_ptr + at, mask=live, other=0.0).to(tl.float32)
        log_ratio = tl.zeros([BLOCK], tl.float32)
        if SEQUENCE:
            log_ratio += mean_shift
        elif HAS_OLD:
            log_ratio = logp - tl.load(old_ptr + at, mask=live, other=0.0).to(tl.float32)
        inside = tl.abs(log_ratio) <= LIMIT
        # The propagating clamp: a NaN log-probability must reach the loss.
        ratio = tl.exp(tl.clamp(log_ratio, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL))
        if SURROGATE == "cispo":  # the weight is a constant: no gradient through the ratio
            slope = -tl.minimum(ratio, high) * advantage
            value = slope * logp
        elif SURROGATE == "vespo":
            slope = tl.zeros([BLOCK], tl.float32) - gamma * advantage
            value = slope * logp
        elif SURROGATE == "sapo":
            value, slope = _soft(ratio, inside, advantage, tau)
        else:
            value, slope = _clipped(ratio, inside, advantage, low, high, delta, HAS_DELTA)
        value = tl.where(ratio != ratio, ratio, value)
        if HAS_REF:
            difference = tl.load(ref_ptr + at, mask=live, other=0.0).to(tl.float32) - logp
            e = tl.exp(tl.clamp(difference, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL))
            kl = e - difference - 1.0
            value += beta * kl
            slope += beta * (1.0 - tl.where(tl.abs(difference) <= LIMIT, e, 0.0))
            kl_sum += tl.where(live, kl, 0.0)
        loss += tl.where(live, value, 0.0)
        below += tl.where(live, (ratio < low).to(tl.float32), 0.0)
        above += tl.where(live, (ratio > high).to(tl.float32), 0.0)
        tl.store(gradient_ptr + at, tl.where(live, slope * weight, 0.0).to(gradient_ptr.dtype.element_ty), mask=here)
    tl.store(sums_ptr + b * 5, tl.sum(loss, axis=0) * weight)
    tl.store(sums_ptr + b * 5 + 1, tokens)
    tl.store(sums_ptr + b * 5 + 2, tl.sum(kl_sum, axis=0))
    tl.store(sums_ptr + b * 5 + 3, tl.where(advantage < 0.0, tl.sum(below, axis=0), 0.0))
    tl.store(sums_ptr + b * 5 + 4, tl.where(advantage > 0.0, tl.sum(above, axis=0), 0.0))

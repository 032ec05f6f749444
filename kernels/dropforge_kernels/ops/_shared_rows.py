"""Loss and gradient of a row of logits in place, the row shared by several programs that exchange its statistics.

One program per row keeps 132 rows of 262K logits (69 MB) between its two passes, more than the L2 cache holds, so that
part of the second read comes from memory again. Here a program has PART values of a row: a few megabytes between the
passes, and device memory sees one read and one write.

    each part:  peak, mass = sum exp(z - peak), sum of z, moment = sum exp(z - peak) z; then waits for the others
    row:        lse from all the parts' peaks and masses, in their order; then the part's own gradient

Waiting is safe: programs take (row, part) by ticket in the order in which they start, so the earliest row that is not
complete has only programs that run or come next. Formula and legend: ops/_vocabulary_rows.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dropforge_kernels.ops._vocabulary_rows import LN2, LOG2E, LOWEST, WIDTH, _gradient, _row_sums, _scaled


@triton.jit
def _exchanged(
    exchange_ptr, row, part, peak, mass, total, moment, arrived_ptr, PARTS: tl.constexpr, LANES: tl.constexpr
):
    """(lse, sum of z, sum of p z) of the row, from all its parts; waits until they are there."""
    mine = exchange_ptr + row * (4 * PARTS) + part
    tl.store(mine, peak)
    tl.store(mine + PARTS, mass)
    tl.store(mine + 2 * PARTS, total)
    tl.store(mine + 3 * PARTS, moment)
    tl.debug_barrier()
    arrived = tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel") + 1
    while arrived < PARTS:
        arrived = tl.atomic_add(arrived_ptr + row, 0, sem="acquire")
    tl.debug_barrier()
    lane = tl.arange(0, LANES)
    here = lane < PARTS
    every = exchange_ptr + row * (4 * PARTS) + lane
    # Past the first-level cache, which may hold the line from before.
    peaks = tl.load(every, mask=here, other=LOWEST, cache_modifier=".cg")
    masses = tl.load(every + PARTS, mask=here, other=0.0, cache_modifier=".cg")
    totals = tl.load(every + 2 * PARTS, mask=here, other=0.0, cache_modifier=".cg")
    moments = tl.load(every + 3 * PARTS, mask=here, other=0.0, cache_modifier=".cg")
    top = tl.max(peaks, axis=0)
    weight = tl.exp2((peaks - top) * LOG2E)
    whole = tl.sum(masses * weight, axis=0)
    return top + tl.log2(whole) * LN2, tl.sum(totals, axis=0), tl.sum(moments * weight, axis=0) / whole


@triton.jit
def shared_row_loss_kernel(
    logits_ptr,
    target_ptr,
    nll_ptr,
    lse_ptr,
    entropy_ptr,
    upstream_ptr,
    exchange_ptr,
    tickets_ptr,
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
    HAS_UPSTREAM: tl.constexpr,
    NARROW: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_LANES: tl.constexpr,
    PART: tl.constexpr,
    LANES: tl.constexpr,
    LANES_OUT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One part of a row: as row_loss_kernel with WRITE_GRADIENT; part 0 stores nll, lse and entropy.

    tickets (1 + rows, int32, zeros): the next (row, part), then the parts of each row that have arrived."""
    ticket = tl.atomic_add(tickets_ptr, 1, sem="relaxed")
    row = (ticket // PARTS).to(tl.int64)
    part = ticket % PARTS
    start = part * PART
    size = tl.minimum(PART, V - start)
    row_ptr = logits_ptr + row * logits_row_stride
    target = tl.load(target_ptr + row)
    offsets = tl.arange(0, LANES_OUT)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    steps = tl.cdiv(size, LANES_OUT * WIDTH)
    if target == ignore_index:
        if part == 0:
            tl.store(nll_ptr + row, 0.0)
            tl.store(lse_ptr + row, 0.0)
            if NEED_ENTROPY:
                tl.store(entropy_ptr + row, 0.0)
        zero = tl.zeros([LANES_OUT, WIDTH], logits_ptr.dtype.element_ty)
        for step in range(0, steps):
            at = step * (LANES_OUT * WIDTH) + offsets
            tl.store(row_ptr + start + at, zero, mask=at < size)
    else:
        inside = (target >= 0) & (target < V)
        # Read before this part arrives: nobody overwrites it earlier.
        owner = (target >= start) & (target < start + size)
        at_target = tl.load(row_ptr + target, mask=inside & ((part == 0) | owner), other=float("nan"))
        peak, mass, total, moment = _row_sums(
            row_ptr + start, size, logit_scale, softcap, HAS_SOFTCAP, NEED_SUM, NEED_ENTROPY, "evict_last", LANES,
            WIDTH, NARROW,
        )  # fmt: skip
        lse, total, moment = _exchanged(
            exchange_ptr, row, part, peak, mass, total, moment, tickets_ptr + 1, PARTS, PARTS_LANES
        )
        entropy = lse - moment
        lse = tl.where(inside, lse, float("nan"))
        if part == 0:
            z_target = _scaled(at_target, logit_scale, softcap, HAS_SOFTCAP)
            nll = (1.0 - smoothing) * (lse - z_target) + z_weight * lse * lse
            if NEED_SUM:
                nll += smoothing * (lse - total / V)
            tl.store(nll_ptr + row, nll)
            tl.store(lse_ptr + row, lse)
            if NEED_ENTROPY:
                tl.store(entropy_ptr + row, entropy)
        g = 1.0
        if HAS_UPSTREAM:
            g = tl.load(upstream_ptr)
        A = g * (1.0 + 2.0 * z_weight * lse)
        T = -g * (1.0 - smoothing)
        C = -g * smoothing / V
        slope = logit_scale * LOG2E
        for step in range(0, steps):
            at = (steps - 1 - step) * (LANES_OUT * WIDTH) + offsets
            mask = at < size
            x = tl.load(row_ptr + start + at, mask=mask, other=0.0, eviction_policy="evict_first")
            if NARROW:
                dx = tl.exp2(x.to(tl.float32) * slope - lse * LOG2E) * (A * logit_scale)
            else:
                dx = _gradient(x, start + at == target, lse, A, T, C, 0.0, logit_scale, softcap, HAS_SOFTCAP, False)
            tl.store(row_ptr + start + at, dx.to(logits_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")
        if NARROW:  # one value a row, not one comparison per value
            tl.debug_barrier()
            dx = (tl.exp2(at_target.to(tl.float32) * slope - lse * LOG2E) * A + T) * logit_scale
            tl.store(row_ptr + target, dx.to(logits_ptr.dtype.element_ty), mask=owner)


def shared_row_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    scalars: tuple[float, ...],
    *,
    nll: torch.Tensor,
    lse: torch.Tensor,
    entropy: torch.Tensor | None,
    upstream: torch.Tensor | None,
    part: int,
    warps: int,
    groups: tuple[int, int],
) -> None:
    """Fills nll, lse and entropy (fp32, (N,)) and overwrites the logits (N, V) with d nll / d logits * upstream.

    scalars: ignore_index, logit_scale, logit_softcap, label_smoothing, z_loss_weight. part: values of a program.
    More than one part a row needs a GPU: the interpreter runs programs one after the other and would wait for ever.
    """
    rows, vocabulary = logits.shape
    parts = triton.cdiv(vocabulary, part)
    exchange = torch.empty(rows * parts * 4, dtype=torch.float32, device=logits.device)
    tickets = torch.zeros(rows + 1, dtype=torch.int32, device=logits.device)
    lanes = (min(warps * 32 * group, part // WIDTH) for group in groups)
    shared_row_loss_kernel[(rows * parts,)](
        logits,
        target,
        nll,
        lse,
        entropy if entropy is not None else nll,
        upstream if upstream is not None else nll,
        exchange,
        tickets,
        logits.stride(0),
        vocabulary,
        *scalars,
        HAS_SOFTCAP=scalars[2] > 0,
        NEED_SUM=scalars[3] > 0,
        NEED_ENTROPY=entropy is not None,
        HAS_UPSTREAM=upstream is not None,
        NARROW=scalars[2] == 0 and scalars[3] == 0 and logits.element_size() == 2,
        PARTS=parts,
        PARTS_LANES=triton.next_power_of_2(parts),
        PART=part,
        LANES=next(lanes),
        LANES_OUT=next(lanes),
        WIDTH=WIDTH,
        num_warps=warps,
    )

"""The longest sequence that trains on a card of a given size: bisection over lengths, each tried with whole steps.

A length counts as trained after a whole step with the optimizer's states in place, which a step of 64 tokens makes
before it; when that step was short, a second one gives the speed. Out of memory, the planner steps back once before the
length counts as too long. The first guess may be given (``start``); from there lengths grow or shrink by a factor until
one fits and one does not, then the gap is halved until it is under ``resolution`` of the length.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from steps.engines import Loaded
from steps.measure import HOST_SHAPE, Bench, Clock
from steps.models import BatchShape

MULTIPLE = 256
SECOND_STEP_UNDER_S = 60.0


def search(
    trains: Callable[[int], bool],
    *,
    start: int,
    resolution: float,
    growth: float,
    most: int,
    allowed: Callable[[int], bool],
) -> int:
    """The longest length found to train, 0 for none. Pure: ``trains`` does the work, ``allowed`` says whether there is
    time for a length. Lengths are multiples of 256."""
    good, bad = 0, most + MULTIPLE
    length = min(start, most) // MULTIPLE * MULTIPLE
    while good < length < bad and allowed(length):
        if trains(length):
            good = length
        else:
            bad = length
        if bad - good <= max(MULTIPLE, int(resolution * good)):
            break
        if bad > most:
            length = min(most, max(good + MULTIPLE, int(good * growth) // MULTIPLE * MULTIPLE))
        elif good == 0:
            length = int(bad / growth) // MULTIPLE * MULTIPLE
        else:
            length = (good + bad) // 2 // MULTIPLE * MULTIPLE
    return good


def find(
    loaded: Loaded, emit: Callable[[dict[str, object]], None], *, start: int, resolution: float, growth: float,
    most: int, deadline: float,
) -> None:  # fmt: skip
    """Emits one row per tried length as it is tried (status ok or oom), and the longest again with status longest."""
    rows: dict[int, dict[str, object]] = {}
    per_square = 0.0

    def trains(length: int) -> bool:
        nonlocal per_square
        row = rows[length] = _try(loaded, BatchShape(1, length))
        emit(row)
        if row["status"] == "ok":
            per_square = 1e-3 * float(str(row["step_ms"])) / length**2
        return row["status"] == "ok"

    def allowed(length: int) -> bool:
        # Time grows at most with the square.
        enough = time.time() + 1.1 * per_square * length**2 < deadline
        if not enough:
            print(f"no time left to try {length:,} tokens", flush=True)
        return enough

    found = search(trains, start=start, resolution=resolution, growth=growth, most=most, allowed=allowed)
    if found:
        emit({**rows[found], "status": "longest"})


def _try(loaded: Loaded, shape: BatchShape) -> dict[str, object]:
    clock = Clock(loaded.device)
    clock.clear()
    row: dict[str, object] = {"batch": shape.batch, "length": shape.length}
    row |= loaded.prepare(shape)
    attempt = _attempt(loaded, shape)
    if attempt["status"] == "oom":
        clock.clear()
        smaller = loaded.retreat()
        if smaller is not None:
            row |= smaller
            attempt = _attempt(loaded, shape)
    clock.clear()
    return row | attempt


def _attempt(loaded: Loaded, shape: BatchShape) -> dict[str, object]:
    clock = Clock(loaded.device)
    try:
        bench = Bench(loaded, shape)
        bench.step(HOST_SHAPE)
        clock.clear()
        clock.reset_peaks()
        row, seconds = bench.first_step()
        if seconds < SECOND_STEP_UNDER_S:
            seconds, _ = bench.step()
        return row | {
            "status": "ok",
            "steps": 1,
            "step_ms": 1e3 * seconds,
            "tok_per_s": shape.tokens / seconds,
            "peak_allocated_gib": clock.peak_allocated(),
            "peak_reserved_gib": clock.peak_reserved(),
            "driver_gib": clock.driver_used(),
        }
    except torch.OutOfMemoryError as error:
        print(f"{shape}: {str(error).splitlines()[0][:300]}", flush=True)
        return {"status": "oom"}
    finally:
        loaded.model.zero_grad(set_to_none=True)

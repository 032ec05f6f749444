"""Times whole steps of one loaded model at one shape."""

from __future__ import annotations

import gc
import statistics
import time
import traceback
from typing import Any

import torch

from steps import adapters
from steps.engines import Loaded
from steps.models import BatchShape

GIB = 1 << 30
WARM_UP = 3
LEAST_STEPS, MOST_STEPS = 3, 30
LONG_STEP_S = 15.0
"""Steps that take longer are warm after the first two, and two of them are timed."""
ALONE_STEP_S = 30.0
"""Of steps that take longer the second is the one that is timed: the first compiled, and nothing else varies."""
HOST_SHAPE = BatchShape(1, 64)


class Clock:
    """Time and memory of one device; on a CPU the memory columns are 0."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def reset_peaks(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak_allocated(self) -> float:
        return torch.cuda.max_memory_allocated() / GIB if self.cuda else 0.0

    def peak_reserved(self) -> float:
        return torch.cuda.max_memory_reserved() / GIB if self.cuda else 0.0

    def driver_used(self) -> float:
        if not self.cuda:
            return 0.0
        free, total = torch.cuda.mem_get_info()
        return (total - free) / GIB

    def clear(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


def batch_of(shape: BatchShape, vocabulary: int, device: str, seed: int) -> dict[str, torch.Tensor]:
    """Random tokens, every one of them learnt; the same for every engine."""
    seeded = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (shape.batch, shape.length), generator=seeded).to(device)
    return {"input_ids": ids, "labels": ids}


def backward(loaded: Loaded, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Forward and backward under bf16 autocast; returns the loss without a wait."""
    extra = loaded.extra(BatchShape(*batch["input_ids"].shape))
    with torch.autocast(loaded.device, dtype=torch.bfloat16):
        loss = loaded.model(**batch, **extra).loss
    loss.backward()
    return loss.detach()


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW with 8-bit states over the adapters."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=2e-4)


class Bench:
    """Steps of one shape with a fresh optimizer and the adapters' first values."""

    def __init__(self, loaded: Loaded, shape: BatchShape) -> None:
        self.loaded, self.shape, self.clock = loaded, shape, Clock(loaded.device)
        self.vocabulary = min(int(loaded.model.config.vocab_size), 128000)
        adapters.reset(loaded.model)
        self.optimizer = make_optimizer(loaded.model)
        self.seed = 0

    def step(self, shape: BatchShape | None = None) -> tuple[float, float]:
        """(seconds, seconds until everything was queued) of one whole step."""
        self.seed += 1
        batch = batch_of(shape or self.shape, self.vocabulary, self.loaded.device, self.seed)
        self.clock.synchronize()
        start = time.perf_counter()
        backward(self.loaded, batch)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        queued = time.perf_counter() - start
        self.clock.synchronize()
        return time.perf_counter() - start, queued

    def first_step(self) -> tuple[dict[str, object], float]:
        """(loss and gradient norm before any update, and the memory of a step that compiles and allocates; seconds)."""
        batch = batch_of(self.shape, self.vocabulary, self.loaded.device, 0)
        self.clock.synchronize()
        start = time.perf_counter()
        loss = float(backward(self.loaded, batch))
        norm = adapters.gradient_norm(self.loaded.model)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.clock.synchronize()
        seconds = time.perf_counter() - start
        return {"loss": loss, "grad_norm": norm, "first_step_gib": self.clock.peak_allocated()}, seconds

    def host_ms(self) -> float:
        """Median time of a step of 64 tokens in the setting of the full shape."""
        for _ in range(3):
            self.step(HOST_SHAPE)
        return 1e3 * statistics.median(self.step(HOST_SHAPE)[0] for _ in range(5))


def measure(loaded: Loaded, shape: BatchShape, *, seconds: float, deadline: float) -> dict[str, object]:
    """The columns of one row. ``seconds``: about how long the timed steps may take; ``deadline``: time.time() by which
    it must be over. Out of memory is a result (status "oom"), and so is a shape that an engine cannot run."""
    clock = Clock(loaded.device)
    clock.clear()
    clock.reset_peaks()
    row: dict[str, object] = {"batch": shape.batch, "length": shape.length}
    row |= loaded.prepare(shape)
    while True:
        attempt = _attempt(loaded, shape, seconds=seconds, deadline=deadline)
        loaded.model.zero_grad(set_to_none=True)
        clock.clear()
        retreated = loaded.retreat() if attempt["status"] == "oom" else None
        if retreated is None:
            return row | attempt
        row |= retreated


def _attempt(loaded: Loaded, shape: BatchShape, *, seconds: float, deadline: float) -> dict[str, object]:
    try:
        return {"status": "ok"} | _timed(Bench(loaded, shape), seconds=seconds, deadline=deadline)
    except torch.OutOfMemoryError as error:
        print(f"{shape}: {str(error).splitlines()[0][:300]}", flush=True)
        return {"status": "oom"}
    except (RuntimeError, ValueError) as error:
        traceback.print_exc()
        return {"status": f"error: {(str(error).splitlines() or [type(error).__name__])[0][:200]}"}


def _timed(bench: Bench, *, seconds: float, deadline: float) -> dict[str, object]:
    row, _ = bench.first_step()
    bench.clock.reset_peaks()
    second = bench.step()
    steps = [second] if second[0] >= ALONE_STEP_S else _repeated(bench, second[0], seconds=seconds, deadline=deadline)
    times = [1e3 * spent for spent, _ in steps]
    row |= {
        "steps": len(steps),
        "step_ms": statistics.median(times),
        "step_ms_p20": percentile(times, 0.2),
        "step_ms_p80": percentile(times, 0.8),
        "enqueue_ms": 1e3 * statistics.median(queued for _, queued in steps),
        "peak_allocated_gib": bench.clock.peak_allocated(),
        "peak_reserved_gib": bench.clock.peak_reserved(),
        "driver_gib": bench.clock.driver_used(),
    }
    row["tok_per_s"] = 1e3 * bench.shape.tokens / statistics.median(times)
    if time.time() + 10 < deadline:
        row["host_ms"] = bench.host_ms()
    return row


def _repeated(bench: Bench, expected: float, *, seconds: float, deadline: float) -> list[tuple[float, float]]:
    """The rest of the warm-up, then steps of about ``expected`` seconds until ``seconds`` are filled."""
    least = LEAST_STEPS if expected < LONG_STEP_S else 2
    for _ in range(WARM_UP - 1):
        if expected < LONG_STEP_S and time.time() + (LEAST_STEPS + 2) * expected < deadline:
            expected = bench.step()[0]
    bench.clock.reset_peaks()
    wanted = max(least, min(MOST_STEPS, int(seconds / max(expected, 1e-6))))
    steps: list[tuple[float, float]] = []
    while len(steps) < wanted and (not steps or time.time() + 1.1 * expected < deadline):
        steps.append(bench.step())
    return steps


def percentile(values: list[float], share: float) -> float:
    """Nearest rank."""
    ordered: list[Any] = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]

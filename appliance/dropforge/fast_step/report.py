"""What the fast step did with each bucket shape, in a form that can be logged and saved beside the result."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from dropforge.packing.shapes import BucketShape


class Way(StrEnum):
    """How micro-batches of a shape run."""

    EAGER = "eager"
    """Operation by operation; always so for the first of a shape, which warms everything up."""
    CAPTURED = "captured"
    """Forward and backward replayed as one CUDA graph."""
    COMPILED = "compiled"
    """Operation by operation, but each decoder layer through torch.compile."""
    SPLIT = "split"
    """Out of memory as a whole: cut into smaller buckets."""


@dataclass
class BucketReport:
    """One shape."""

    shape: BucketShape
    way: Way = Way.EAGER
    reason: str = ""
    """Why it is not captured; empty when it is, or may yet be."""
    runs: int = 0
    capture_seconds: float = 0.0
    graph_bytes: int = 0
    """Memory that the shared pool of graphs grew by."""

    @property
    def why_not(self) -> str:
        """Why it is not captured, for a reader of the result."""
        waits = self.way is Way.EAGER and not self.reason
        return ("met only once" if self.runs == 1 else "to be captured again") if waits else self.reason


@dataclass
class FastReport:
    """One training."""

    packing: str = ""
    """Mode, budget and why."""
    optimizer: str = ""
    notes: list[str] = field(default_factory=list)
    """What was switched off, and why."""
    buckets: dict[BucketShape, BucketReport] = field(default_factory=dict)
    tokens_per_second: float = 0.0
    """Real tokens (no padding) over the whole training, captures included."""
    steady_tokens_per_second: float = 0.0
    """The same over the steps in which no shape was met for the first time or captured."""
    first_step_seconds: float = 0.0
    """From the start of the training to the first step's end on the host: compiling and tuning kernels, mostly."""
    host_ms_per_micro_batch: float = 0.0
    """Time of the training thread per micro-batch when it waits neither for the GPU nor for data; 0 until measured."""
    wait_for_data_ms_per_step: float = 0.0
    filled: float = 0.0
    """Share of the computed tokens that are real."""
    planned_memory: int = 0
    """Bytes that the engine's plan expected to be allocated at most; 0 without a plan."""
    planned_graphs: int = 0
    """Bytes of it that captured buckets are expected to hold between steps as well, in the pool that they share."""
    peak_memory: int = 0
    """Bytes that were allocated at most."""
    peak_reserved: int = 0
    """Bytes that torch had taken from the GPU at most, the graphs' pool included."""

    def bucket(self, shape: BucketShape) -> BucketReport:
        """The entry of a shape, made on first use."""
        return self.buckets.setdefault(shape, BucketReport(shape))

    def note(self, text: str) -> None:
        """Say something, once."""
        if text not in self.notes:
            self.notes.append(text)

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        own = asdict(replace(self, buckets={}))
        rows = [
            {
                **asdict(shape),
                **{k: v for k, v in asdict(bucket).items() if k != "shape"},
                **{"way": str(bucket.way), "reason": bucket.why_not},
            }
            for shape, bucket in sorted(self.buckets.items())
        ]
        return own | {"buckets": rows}

    def lines(self) -> list[str]:
        """A few sentences for a log."""
        lines = [f"packing: {self.packing}"] if self.packing else []
        captured = [b for b in self.buckets.values() if b.way is Way.CAPTURED]
        if captured:
            sizes = sorted({bucket.shape.tokens for bucket in captured})
            gib = sum(bucket.graph_bytes for bucket in captured) / 2**30
            lines.append(f"captured as CUDA graphs: {len(captured)} buckets of {sizes} tokens, {gib:.1f} GiB in all")
        for bucket in self.buckets.values():
            if bucket.reason:
                lines.append(f"bucket of {bucket.shape.tokens} tokens {bucket.way}: {bucket.reason}")
        return lines + self.notes

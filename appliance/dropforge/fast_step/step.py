"""Forward and backward of one micro-batch: as a CUDA graph per bucket shape where it can be, else eager.

    step = BucketStep(model_loss, grads=flat.grads.values(), device=device, report=report, split=feeder.split)
    step.begin()                    # loss of the optimizer step = 0
    for micro in batch.micro:
        step.run(micro)             # gradients add up in the flat buffers, the loss in step.loss
    optimizer.step()

The first micro-batch of a shape runs eagerly (it warms up whatever compiles or tunes itself, and it counts); the second
is captured, and from then on one copy and one launch do the work. All graphs share one memory pool: they never run at
the same time and keep nothing between runs. A capture that fails, for want of memory or because something cannot be
captured, leaves the shape eager, or compiled layer by layer (``compiled``), with the reason in the report. Every eager
run may run out of memory: its half-written gradients are taken back, room is made (``_make_room``), and a bucket that
does not fit at all is cut in two.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from dropforge.fast_step.compiled import LayerCompiler
from dropforge.fast_step.graph import OUT_OF_MEMORY, GraphPool
from dropforge.fast_step.report import BucketReport, FastReport, Way
from dropforge.packing.collate import MicroBatch, model_inputs
from dropforge.packing.shapes import BucketShape

MOST_GRAPHS = 32
"""Each graph holds its launches on the host and a little memory on the GPU."""

MOST_KEPT = 2 << 30
"""Bytes of gradients that are copied before an eager run. Of a whole model's the copy might be what does not fit."""

MOST_DROPS = 2
"""Times that graphs are given up for a shape that had run before, until the model is asked to need less: made again,
they are in the way again. The first run of a new shape may always have their room; it needs it once."""

COMPILE_FROM = 3
"""Run of a shape from which compiling is worth its seconds."""

LossOf = Callable[[dict[str, Any]], torch.Tensor]
"""Model's arguments -> loss (0-d), already divided by the counted targets of the whole optimizer step."""


def _zero(buffers: Iterable[torch.Tensor]) -> None:
    for buffer in buffers:
        buffer.zero_()


@dataclass(frozen=True)
class _Problem:
    """Why an attempt did not succeed."""

    text: str
    out_of_memory: bool = False


class _Slot:
    """What a shape keeps: its input buffer on the device, its graph."""

    def __init__(self, shape: BucketShape, device: torch.device) -> None:
        self.shape = shape
        self.flat = torch.zeros(shape.words, dtype=torch.int64, device=device)
        self.inputs = model_inputs(self.flat, shape)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False


class BucketStep:
    """Runs micro-batches; gradients add up where ``loss.backward()`` puts them.

    Args:
        loss_of: the model's loss.
        grads: flat gradient buffers, which a failed attempt is taken back from.
        device: of the model. On a CPU everything is eager.
        report: filled as it goes.
        split: a micro-batch -> smaller ones with the same documents; one element when it cannot be cut.
        retreat: called when a bucket does not fit, before it is cut; makes the model need less memory and says how, or
            gives an empty text when it cannot.
        capture: False captures nothing; ``why_not`` says why in the report.
        layers: compiles decoder layers where a shape cannot be captured; None leaves them eager.
    """

    def __init__(
        self,
        loss_of: LossOf,
        *,
        grads: Iterable[torch.Tensor],
        device: torch.device,
        report: FastReport,
        split: Callable[[MicroBatch], Sequence[MicroBatch]],
        retreat: Callable[[], str] = str,
        capture: bool = True,
        why_not: str = "",
        layers: LayerCompiler | None = None,
    ) -> None:
        self.loss_of, self.report, self.split, self.retreat = loss_of, report, split, retreat
        self.grads = list(grads)
        self.cuda = device.type == "cuda"
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if self.cuda and device.index is None else device
        )
        self.capture = capture and self.cuda
        self.why_not = why_not or ("" if self.cuda else "CUDA graphs need a GPU")
        self.loss = torch.zeros((), dtype=torch.float32, device=device)
        self.layers = layers
        self.captures = 0
        """Graphs there are."""
        self.changes = 0
        """First runs and captures so far: steps with one say nothing about the steady rate."""
        self._drops = 0
        self._untouched = False
        self._slots: dict[BucketShape, _Slot] = {}
        self.pool = GraphPool(self.device) if self.capture else None

    def begin(self) -> None:
        """Start an optimizer step: its loss is zero. Its gradients must be zero as well."""
        self.loss.zero_()
        self._untouched = True

    def run(self, micro: MicroBatch) -> None:
        """Forward and backward. Raises torch.OutOfMemoryError when even one document does not fit."""
        bucket = self.report.bucket(micro.shape)
        bucket.runs += 1
        if bucket.way is Way.SPLIT:
            self._run_split(micro)
            return
        slot = self._slots.get(micro.shape)
        if slot is None:
            slot = self._slots[micro.shape] = _Slot(micro.shape, self.device)
        slot.flat.copy_(micro.flat, non_blocking=True)
        if slot.graph is None and slot.warm and self._may_capture(bucket):
            self._capture(slot, bucket)
        if slot.graph is not None:
            slot.graph.replay()
        else:
            self._run_eager(slot, bucket, micro)
        self._untouched = False

    def _may_capture(self, bucket: BucketReport) -> bool:
        if bucket.reason:
            return False
        if not self.capture:
            bucket.reason = self.why_not
        elif self.captures >= MOST_GRAPHS:
            bucket.reason = f"there are {MOST_GRAPHS} graphs already"
        return not bucket.reason

    def _forward_backward(self, inputs: dict[str, Any]) -> None:
        loss = self.loss_of(inputs)
        loss.backward()  # type: ignore[no-untyped-call]
        self.loss.add_(loss.detach())

    def _eagerly(self, slot: _Slot) -> None:
        with nullcontext() if self.pool is None else self.pool.beside():
            self._forward_backward(slot.inputs)

    def _run_eager(self, slot: _Slot, bucket: BucketReport, micro: MicroBatch) -> None:
        self.changes += not slot.warm
        undo = self._undo()
        if undo is None:
            self._eagerly(slot)
            slot.warm = True
            return
        self._compile(slot, bucket, undo)
        while problem := self._attempt(slot, compiled=bucket.way is Way.COMPILED):
            undo()
            gc.collect()
            if self.cuda:
                torch.cuda.empty_cache()
            if not problem.out_of_memory:
                self._uncompiled(bucket, problem.text)
                continue
            note = self._make_room(new=not slot.warm)
            if note:
                self.report.note(note)
                continue
            del undo, self._slots[micro.shape]
            bucket.way, bucket.reason = Way.SPLIT, problem.text
            self._run_split(micro)
            return
        slot.warm = True

    def _undo(self) -> Callable[[], None] | None:
        """Takes back what an attempt has written half-way; None when that would need a copy larger than MOST_KEPT."""
        written = (*self.grads, self.loss)
        if self._untouched:
            return lambda: _zero(written)
        if not self._copyable():
            return None
        kept = [buffer.clone() for buffer in written]

        def undo() -> None:
            for buffer, before in zip(written, kept, strict=True):
                buffer.copy_(before)

        return undo

    def _copyable(self) -> bool:
        return sum(buffer.numel() * buffer.element_size() for buffer in self.grads) <= MOST_KEPT

    def _attempt(self, slot: _Slot, *, compiled: bool) -> _Problem | None:
        """What went wrong, as text, because the exception would keep the attempt's tensors alive."""
        try:
            if self.layers is not None:
                self.layers.switch(compiled)
            self._eagerly(slot)
        except torch.OutOfMemoryError as error:
            return _Problem(str(error).split(".")[0], out_of_memory=True)
        except Exception as error:
            if not compiled:
                raise
            return _Problem(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        finally:
            if self.layers is not None:
                self.layers.switch(False)
        return None

    def _compile(self, slot: _Slot, bucket: BucketReport, undo: Callable[[], None]) -> None:
        """Of a shape that comes again and cannot be captured: compiled from now on, if that computes the same."""
        if self.layers is None or not bucket.reason or bucket.runs < COMPILE_FROM or bucket.way is Way.COMPILED:
            return
        if not self._copyable():
            self._uncompiled(bucket, "the gradients are too large to check it")
            return
        if self.layers.why_not:
            self._uncompiled(bucket, self.layers.why_not)
            return
        self.changes += 1
        before = [buffer.clone() for buffer in self.grads]
        found: list[list[torch.Tensor]] = []
        for compiled in (False, True):
            started = self.loss.clone()
            problem = self._attempt(slot, compiled=compiled)
            made = [now - then for now, then in zip((*self.grads, self.loss), (*before, started), strict=True)]
            undo()
            if problem is not None:
                if not problem.out_of_memory:
                    self._uncompiled(bucket, problem.text)
                return
            found.append(made)
        difference = self.layers.difference(*found)
        if difference:
            self._uncompiled(bucket, f"compiled, {difference}")
        else:
            bucket.way = Way.COMPILED

    def _uncompiled(self, bucket: BucketReport, why: str) -> None:
        assert self.layers is not None
        self.layers.give_up(why)
        bucket.way = Way.EAGER
        if "not compiled" not in bucket.reason:
            bucket.reason += f"; not compiled either: {why}"

    def _run_split(self, micro: MicroBatch) -> None:
        parts = self.split(micro)
        if len(parts) < 2:
            raise torch.OutOfMemoryError(f"a document of {micro.tokens} tokens does not fit; {micro.shape}")
        for part in parts:
            self.run(part)

    def _make_room(self, *, new: bool) -> str:
        """What was given up for a bucket that did not fit; empty when there is nothing left to give."""
        note = self._drop_graphs() if new or self._drops < MOST_DROPS else ""
        if note:
            self._drops += not new
            return f"{note}; they are captured again"
        note = self.retreat()
        if note:  # graphs were made for what the layers kept before
            self._drop_graphs()
            self._drops = 0
            return note
        note = self._drop_graphs()
        if note:
            self.capture, self.why_not = False, "graphs left no room for other shapes"
        return note

    def _drop_graphs(self) -> str:
        """Gives the graphs' memory up: an eager run needs as much beside it. Empty when there was none."""
        held = [slot for slot in self._slots.values() if slot.graph is not None]
        if not held or self.pool is None:
            return ""
        torch.cuda.synchronize(self.device)
        for slot in held:
            slot.graph = None
            self.report.bucket(slot.shape).way = Way.EAGER
        self.captures = 0
        self.pool = GraphPool(self.device)
        torch.cuda.empty_cache()
        return f"memory: {len(held)} captured shapes given up to make room for another one"

    def _capture(self, slot: _Slot, bucket: BucketReport) -> None:
        """Sets ``slot.graph``, or ``bucket.reason``. Nothing is computed; gradients stay as they are."""
        assert self.pool is not None
        started = time.monotonic()
        self.changes += 1
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self.device)
        slot.graph, bucket.reason = self.pool.record(lambda: self._forward_backward(slot.inputs))
        if slot.graph is None and OUT_OF_MEMORY in bucket.reason and self._drops < MOST_DROPS:
            # What a small bucket left in the pool is in pieces too small for a large one, but not the other way round.
            note = self._drop_graphs()
            if note:
                self._drops += 1
                self.report.note(f"{note}; they are captured again")
                before = torch.cuda.memory_reserved(self.device)
                slot.graph, bucket.reason = self.pool.record(lambda: self._forward_backward(slot.inputs))
        if slot.graph is None:
            return
        self.captures += 1
        bucket.way = Way.CAPTURED
        bucket.capture_seconds = round(time.monotonic() - started, 3)
        bucket.graph_bytes = max(0, torch.cuda.memory_reserved(self.device) - before)

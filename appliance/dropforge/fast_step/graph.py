"""Recording work as a CUDA graph, and recovering when a recording fails."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

OUT_OF_MEMORY = torch.OutOfMemoryError.__name__
"""Stands in the reason of a recording that failed for want of memory."""


class GraphPool:
    """Memory that graphs share which never run at the same time, and the stream they are recorded on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.id = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """The block runs on the stream that records, so that both share memory and autograd's streams agree."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:  # after an exception too: what was queued may still write
            current.wait_stream(self.stream)

    def record(self, work: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph | None, str]:
        """(graph, "") or (None, why not). ``work`` must have run before; recording computes nothing."""
        current = torch.cuda.current_stream(self.device)
        graph = torch.cuda.CUDAGraph()
        gc.collect()
        torch.cuda.empty_cache()
        why_not = self._record(graph, work)
        if not why_not:
            return graph, ""
        del graph
        self._recover(current)
        return None, why_not

    def _record(self, graph: torch.cuda.CUDAGraph, work: Callable[[], Any]) -> str:
        """As text, because the exception would keep the attempt's tensors alive."""
        try:
            # thread_local: another thread pins memory for the next batches meanwhile.
            with torch.cuda.graph(graph, pool=self.id, stream=self.stream, capture_error_mode="thread_local"):
                work()
        except Exception as error:  # noqa: BLE001  it ran eagerly just now: whatever fails here fails for the capture
            first: BaseException = error
            while first.__context__ is not None:  # leaving the block raises again, for what was raised inside
                first = first.__context__
            lines = str(first).strip().splitlines() or [""]
            return f"capture failed: {type(first).__name__}: {lines[0][:300]}"
        return ""

    def _recover(self, stream: torch.cuda.Stream) -> None:
        """After a failed capture torch may be left on its stream, its generator and its pool in capturing state."""
        torch.cuda.set_stream(stream)
        torch.cuda.synchronize(self.device)
        generator = torch.cuda.default_generators[self.device.index or 0]
        generator.graphsafe_set_state(generator.clone_state())
        torch.cuda.empty_cache()

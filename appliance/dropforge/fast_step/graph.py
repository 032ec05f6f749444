"""Recording work as a CUDA graph, running eagerly in the graphs' memory, and recovering when a recording fails."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


class GraphPool:
    """Memory that graphs share which never run at the same time, and the stream they are recorded on.

    An empty graph keeps the pool alive between recordings. (torch.cuda.MemPool would abort the process when it is
    destroyed before a graph.)
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.id = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        gc.collect()  # once: a large process takes a second for it, and work that ran in ``memory`` leaves nothing
        self._keeper = torch.cuda.CUDAGraph()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is empty
            with torch.cuda.graph(self._keeper, pool=self.id, stream=self.stream, capture_error_mode="thread_local"):
                pass

    @contextmanager
    def memory(self) -> Iterator[None]:
        """The block runs on the pool's stream and allocates in its memory, its backward included.

        What graphs that are not running have there is free memory: no result of theirs may be kept in it. The stream is
        ordered against the current one on both sides.
        """
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        pool: Any = self  # the function reads the id alone
        try:
            # A pool is entered by thread, so the backward must run in this one.
            with (
                torch.cuda.stream(self.stream),
                torch.cuda.use_mem_pool(pool, self.device),
                torch.autograd.set_multithreading_enabled(False),
            ):
                yield
        finally:  # after an exception too: what was queued may still write
            current.wait_stream(self.stream)

    def record(self, work: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph | None, str]:
        """(graph, "") or (None, why not). ``work`` must have run in ``memory`` before; recording computes nothing."""
        current = torch.cuda.current_stream(self.device)
        graph = torch.cuda.CUDAGraph()
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
            with (
                torch.cuda.graph(graph, pool=self.id, stream=self.stream, capture_error_mode="thread_local"),
                torch.autograd.set_multithreading_enabled(False),
            ):
                work()
        except Exception as error:  # noqa: BLE001  it ran eagerly just now: whatever fails here fails for the capture
            first: BaseException = error
            while first.__context__ is not None:  # leaving the block raises again, for what was raised inside
                first = first.__context__
            lines = str(first).strip().splitlines() or [""]
            return f"capture failed: {type(first).__name__}: {lines[0][:300]}"
        return ""

    def _recover(self, stream: torch.cuda.Stream) -> None:
        """A capture that was broken off leaves torch on its stream, its allocator and its generator in that state."""
        torch.cuda.set_stream(stream)
        index = self.device.index or 0
        with suppress(RuntimeError):  # it says so when the allocator has left the pool already
            torch._C._cuda_endAllocateToPool(index, self.id)
        torch.cuda.synchronize(self.device)
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())
        torch.cuda.empty_cache()

"""Where the time of one step goes: GPU time by kind of kernel, from torch's profiler."""

from __future__ import annotations

import torch
from _kernel_kinds import kernels_of, summary

from steps.engines import Loaded
from steps.measure import Bench
from steps.models import BatchShape


def profile(loaded: Loaded, shape: BatchShape) -> str:
    """Runs the step until warm, then once under the profiler."""
    note = loaded.prepare(shape)
    bench = Bench(loaded, shape)
    bench.first_step()
    times = sorted(bench.step()[0] for _ in range(4))
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.clock.cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        bench.step()
    kernels, busy_ms = kernels_of(profiler.events())
    head = f"{shape}: {note.get('memory_plan', '')}\n"
    return head + summary(kernels, step_ms=1e3 * times[len(times) // 2], busy_ms=busy_ms)

"""Where the time of one step goes: GPU time by kind of kernel, from torch's profiler."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

import torch

from steps.engines import Loaded
from steps.measure import Bench
from steps.models import BatchShape

KINDS = (
    ("between GPUs", r"nccl"),
    ("dequantise", r"dequant|nf4|kdequantize"),
    ("attention", r"flash|fmha|attention|_sdpa|mha_|attn|^(query|key)_kernel"),
    ("matrix product", r"gemm|nvjet|cutlass|cublas|splitk|xmma|matmul|_mm_|addmm"),
    ("optimizer", r"adam|optimizer|blockwise|8bit"),
    ("copy to or from the host", r"memcpy (dtoh|htod)"),
    ("loss", r"cross_entropy|nll|log_softmax|_loss|row_gradient|compact_kernel|move_rows|scale_rows"),
    ("norm, rotation, activation", r"rms|norm|rope|rotary|swiglu|glu|silu|^_?(forward|backward)_kernel"),
    ("other memory-bound", r"elementwise|copy|cat|reduce|fill|memset|memcpy|triton|index|embedding|vectorized|scatter"),
)
"""Kind -> pattern on the lower-case kernel name; the first match counts. Our own kernels of norms, rotation and
activation are called forward_kernel and backward_kernel."""


ANNOTATIONS = ("ProfilerStep", "Optimizer.", "## Call", "Torch-Compiled")
"""Events that cover others and would be counted twice."""


def kind_of(kernel: str) -> str:
    """The kind of one kernel by its name; "other" when none matches."""
    name = kernel.lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other")


def summary(kernels: Iterable[tuple[str, float, int]], *, step_ms: float, busy_ms: float, top: int = 25) -> str:
    """kernels: (name, milliseconds in all, launches). step_ms: wall time of the step without the profiler."""
    kinds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    found = sorted(kernels, key=lambda kernel: -kernel[1])
    for name, spent, count in found:
        kinds[kind_of(name)][0] += spent
        kinds[kind_of(name)][1] += count
    total = sum(spent for spent, _ in kinds.values())
    lines = [
        f"step {step_ms:.1f} ms without the profiler; kernels {total:.1f} ms in all, overlaps once {busy_ms:.1f} ms",
        "",
        f"{'kind':30} {'ms':>9} {'share':>6} {'launches':>8}",
    ]
    for kind, (spent, count) in sorted(kinds.items(), key=lambda entry: -entry[1][0]):
        lines.append(f"{kind:30} {spent:9.2f} {spent / max(total, 1e-9):6.1%} {int(count):8}")
    lines += ["", f"the {top} longest kernels:"]
    for name, spent, count in found[:top]:
        lines.append(f"{spent:9.2f} ms {count:6} x  [{kind_of(name)}] {name[:110]}")
    return "\n".join(lines)


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
    device = torch.autograd.DeviceType.CUDA if bench.clock.cuda else torch.autograd.DeviceType.CPU
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    spans = []
    for event in profiler.events():
        if event.device_type != device or event.name.startswith(ANNOTATIONS):
            continue
        spent = (event.device_time_total if bench.clock.cuda else event.self_cpu_time_total) / 1e3
        sums[event.name][0] += spent
        sums[event.name][1] += 1
        spans.append((event.time_range.start, event.time_range.end))
    kernels = [(name, spent, int(count)) for name, (spent, count) in sums.items()]
    head = f"{shape}: {note.get('memory_plan', '')}\n"
    return head + summary(kernels, step_ms=1e3 * times[len(times) // 2], busy_ms=_union(spans) / 1e3)


def _union(spans: list[tuple[float, float]]) -> float:
    """Length covered by the spans, overlaps once."""
    covered, reach = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return covered

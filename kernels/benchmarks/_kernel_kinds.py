"""GPU time by kind of kernel, out of torch's profiler: what the profiles of steps and of trainers are made of."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch.autograd import DeviceType

KINDS = (
    ("between GPUs", r"nccl"),
    ("dequantise", r"dequant|nf4|kdequantize"),
    ("attention", r"flash|fmha|attention|_sdpa|mha_|attn|^packed_|^sink_"),
    ("matrix product", r"gemm|nvjet|cutlass|cublas|splitk|xmma|matmul|_mm_|addmm"),
    ("optimizer", r"adam|optimizer|blockwise|8bit|square_sum|^_root"),
    ("copy to or from the host", r"memcpy (dtoh|htod)"),
    ("loss", r"cross_entropy|nll|log_softmax|_loss|row_gradient|compact_kernel|move_rows|scale_rows"),
    ("norm, rotation, activation", r"rms|norm|rope|rotary|swiglu|glu|silu|^heads_"),
    ("other memory-bound", r"elementwise|copy|cat|reduce|fill|memset|memcpy|triton|index|embedding|vectorized|scatter"),
)
"""Kind -> pattern on the lower-case kernel name; the first match counts."""

_COVERING = ("ProfilerStep", "Optimizer.", "## Call", "Torch-Compiled")
"""Events that cover others and would be counted twice."""

Kernel = tuple[str, float, int]
"""Name, milliseconds in all, launches."""


def kind_of(kernel: str) -> str:
    """The kind of one kernel by its name; "other" when none matches."""
    name = kernel.lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other")


def kernels_of(events: Iterable[Any], *, per: int = 1) -> tuple[list[Kernel], float]:
    """(kernels, milliseconds in which at least one ran) of a profiler's events, over ``per`` equal steps.

    Without a GPU in the events the operators of the CPU stand in for kernels.
    """
    events = [event for event in events if not event.name.startswith(_COVERING)]
    on_gpu = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in on_gpu or events:
        sums[event.name][0] += (event.device_time_total if on_gpu else event.self_cpu_time_total) / 1e3 / per
        sums[event.name][1] += 1 / per
    busy = union((event.time_range.start, event.time_range.end) for event in on_gpu or events)
    return [(name, spent, round(count)) for name, (spent, count) in sums.items()], busy / 1e3 / per


def union(spans: Iterable[tuple[float, float]]) -> float:
    """Length covered by the spans, overlaps once."""
    covered, reach = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return covered


def summary(kernels: Iterable[Kernel], *, step_ms: float, busy_ms: float, top: int = 25) -> str:
    """A table of kinds and the longest kernels. step_ms: wall time of the step without the profiler."""
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

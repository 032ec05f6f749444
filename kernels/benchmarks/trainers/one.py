"""One engine on one model and one kind of data, in this process; prints one line ``RESULT {json}``.

    PYTHONPATH=appliance:kernels python3 -m benchmarks.trainers.one ENGINE MODEL_FOLDER DATA [--steps 40] [--warm 12]

valid_tok_s: real tokens (no padding) per second over the steps after the warm-up, optimizer and data loading included.
cold_200_s: wall time of the first 200 optimizer steps from the trainer's creation on, compilation included; measured
when the run has so many, else its own time plus the rest at the steady rate (cold_measured says which).
gpu_ms: time in which kernels run, per micro-batch, from torch's profiler over three more steps (--profile).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.trainers.documents import documents
from benchmarks.trainers.engines import ENGINES, PACKED, build

COLD = 200
PROFILED = 3


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model", type=Path)
    parser.add_argument("data")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warm", type=int, default=12)
    parser.add_argument("--documents", type=int, default=6000)
    parser.add_argument("--seconds", type=float, default=90.0, help="stop measuring after so long, from 10 steps on")
    parser.add_argument("--length", type=int, default=PACKED, help="tokens of a packed row; small ones for a CPU")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    print("RESULT", json.dumps(measure(args)), flush=True)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one run."""
    rows = documents(args.data, count=args.documents)
    if args.engine.startswith("unsloth"):
        import unsloth  # noqa: F401  # before anything it patches
    import torch
    from transformers import set_seed

    set_seed(3407)
    counted = [0]
    extra = PROFILED + 1 if args.profile else 0

    def count(tokens: int) -> None:
        counted[0] += tokens

    with ExitStack() as stack, tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        trainer = build(args.engine, args.model, rows, steps=args.warm + args.steps + extra, out=Path(out), count=count,
                        stack=stack, length=args.length)  # fmt: skip
        clock = _clock(args, counted, began)
        trainer.add_callback(clock)
        trainer.train()
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    if not norms or not all(math.isfinite(norm) and norm > 0 for norm in norms):
        raise RuntimeError(f"{args.engine}: gradient norms {norms}: it does not train")
    micro = 1 if args.engine.endswith("_packed") else 4
    report = trainer.report.as_dict() if args.engine.startswith("dropforge") else {}
    steady = (clock.end - clock.start) / clock.measured
    return {
        "engine": args.engine, "model": args.model.name, "data": args.data, "class": type(trainer).__name__,
        "valid_tok_s": round((clock.tokens_end - clock.tokens_start) / (clock.end - clock.start), 1),
        "step_ms": round(1e3 * steady, 2), "steps": clock.measured,
        "first_step_s": round(clock.first - began, 2),
        "cold_200_s": round(clock.cold_200(steady), 1), "cold_measured": clock.cold is not None,
        "micro_batches": micro, "wall_ms_per_micro": round(1e3 * steady / micro, 2),
        "gpu_ms_per_micro": clock.gpu_ms and round(clock.gpu_ms / micro, 2),
        "host_ms_per_micro": report.get("host_ms_per_micro_batch"), "filled": report.get("filled"),
        "peak_allocated_gib": round(clock.allocated / 2**30, 2), "peak_reserved_gib": round(clock.reserved / 2**30, 2),
        "grad_norm": round(norms[-1], 5), "loss": round(losses[-1], 4),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions(args.engine), "report": report,
    }  # fmt: skip


def versions(engine: str) -> str:
    """What ran, for the table's reader."""
    names = ["torch", "transformers", "trl", "peft"]
    names += {"unsloth": ["unsloth", "unsloth_zoo"], "hf": ["liger_kernel"]}.get(engine.split("_")[0], [])
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _clock(args: argparse.Namespace, counted: list[int], began: float) -> Any:
    """A callback that reads the time at the ends of the warm-up and of the measured steps."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        first = start = end = 0.0
        tokens_start = tokens_end = measured = allocated = reserved = 0
        cold: float | None = None
        gpu_ms: float | None = None
        profiler: Any = None

        def sync(self) -> float:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.perf_counter()

        def cold_200(self, steady: float) -> float:
            done = args.warm + self.measured
            return self.cold if self.cold is not None else self.end - began + (COLD - done) * steady

        def on_step_end(self, a: Any, state: Any, control: Any, **others: Any) -> None:
            step = state.global_step
            if step == 1:
                self.first = self.sync()
            if step == args.warm:
                self.start, self.tokens_start = self.sync(), counted[0]
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
            if step == COLD:
                self.cold = self.sync() - began
            done = step - args.warm
            late = done >= 10 and time.perf_counter() - self.start > args.seconds
            if not self.end and (done == args.steps or late):
                self.end, self.tokens_end, self.measured = self.sync(), counted[0], done
                if torch.cuda.is_available():
                    self.allocated, self.reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
                if args.profile and torch.cuda.is_available():
                    self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                    self.profiler.start()
                    self.until = step + PROFILED
                else:
                    control.should_training_stop = True
            elif self.profiler is not None and step == self.until:
                self.sync()
                self.profiler.stop()
                total = sum(event.self_device_time_total for event in self.profiler.key_averages())
                self.gpu_ms = total / 1e3 / PROFILED
                control.should_training_stop = True

    return Clock()


if __name__ == "__main__":
    main()

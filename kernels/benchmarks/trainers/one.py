"""One engine on one model and one kind of data, in this process; prints one line ``RESULT {json}``.

    PYTHONPATH=appliance:kernels python3 -m benchmarks.trainers.one ENGINE MODEL_FOLDER DATA [--steps 40] [--warm 12]

valid_tok_s: real tokens (no padding) per second over the steps after the warm-up, optimizer and data loading included.
cold_200_s: wall time of the first 200 optimizer steps from the trainer's creation on, compilation included; measured
when the run has so many (--warm 12 --steps 190), else its own time plus the rest at the steady rate (cold_measured says
which).
gpu_ms_per_micro: time in which kernels or copies run, from torch's profiler over three more steps (--profile); with
--kernels FILE the time by kind of kernel is written there.
host_ms_per_micro: ours alone: time of the training thread in which it waits for nothing (dropforge.fast_step.meter).
host_share: host_ms_per_micro over gpu_ms_per_micro.
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

DOCUMENTS = {"chat": 2000, "fixed": 600}
"""Fewer where they are long: the tokens are what is trained."""


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model", type=Path)
    parser.add_argument("data")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warm", type=int, default=12)
    parser.add_argument("--documents", type=int, default=0, help="0: as many as suit the data")
    parser.add_argument("--seconds", type=float, default=90.0, help="stop measuring after so long, from 10 steps on")
    parser.add_argument("--length", type=int, default=PACKED, help="tokens of a packed row; small ones for a CPU")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--kernels", type=Path, help="where the table of kernels of an optimizer step goes")
    args = parser.parse_args()
    print("RESULT", json.dumps(measure(args)), flush=True)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one run."""
    rows = documents(args.data, count=args.documents or DOCUMENTS.get(args.data, 6000))
    if args.engine.startswith("unsloth"):
        import unsloth  # noqa: F401  # before anything it patches
    import torch
    from benchmarks._kernel_kinds import summary
    from benchmarks.trainers.clock import PROFILED, Clock
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
        clock = Clock(began=began, warm=args.warm, steps=args.steps, seconds=args.seconds, profile=args.profile,
                      counted=counted)  # fmt: skip
        trainer.add_callback(clock)
        trainer.train()
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    if not norms or not all(math.isfinite(norm) and norm > 0 for norm in norms):
        raise RuntimeError(f"{args.engine}: gradient norms {norms}: it does not train")
    report = trainer.report.as_dict() if args.engine.startswith("dropforge") else {}
    micro = _micro_batches(args.engine, report, trainer.state.global_step)
    gpu, host = clock.gpu_ms and clock.gpu_ms / micro, report.get("host_ms_per_micro_batch")
    steady = (clock.end - clock.start) / clock.measured
    if args.kernels and clock.gpu_ms:
        args.kernels.parent.mkdir(parents=True, exist_ok=True)
        args.kernels.write_text(summary(clock.kernels, step_ms=1e3 * steady, busy_ms=clock.gpu_ms) + "\n")
    return {
        "engine": args.engine, "model": args.model.name, "data": args.data, "class": type(trainer).__name__,
        "valid_tok_s": round((clock.tokens_end - clock.tokens_start) / (clock.end - clock.start), 1),
        "step_ms": round(1e3 * steady, 2), "steps": clock.measured,
        "first_step_s": round(clock.first - began, 2),
        "cold_200_s": round(clock.cold_200(steady), 1), "cold_measured": clock.cold is not None,
        "micro_batches": round(micro, 2), "wall_ms_per_micro": round(1e3 * steady / micro, 2),
        "gpu_ms_per_micro": gpu and round(gpu, 2), "host_ms_per_micro": host,
        "host_share": round(host / gpu, 3) if gpu and host else None, "filled": report.get("filled"),
        "peak_allocated_gib": round(clock.allocated / 2**30, 2), "peak_reserved_gib": round(clock.reserved / 2**30, 2),
        "grad_norm": round(norms[-1], 5), "loss": round(losses[-1], 4),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions(args.engine), "report": report,
    }  # fmt: skip


def _micro_batches(engine: str, report: dict[str, Any], steps: int) -> float:
    """Of an optimizer step. Ours packs the documents of a step into as few as they fit."""
    if report:
        return sum(bucket["runs"] for bucket in report["buckets"]) / steps
    return 1 if engine.endswith(("_packed", "_rows")) else 4


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


if __name__ == "__main__":
    main()

"""Whole trainers against each other: each engine in its own process, one CSV that grows row by row.

    PYTHONPATH=appliance:kernels python3 -m benchmarks.trainers.run run --models-dir DIR --csv FILE \
        --engines dropforge_packed,unsloth_packed,dropforge_packed --models qwen3-0.6b --data alpaca
    PYTHONPATH=appliance:kernels python3 -m benchmarks.trainers.run page FILE docs/reference/packed-speed.md

Engines run in the order given; name one twice to see the spread (A-B-A). A failed run leaves a row with its reason.
``--peer-path`` is put on PYTHONPATH for the peers' processes alone.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.trainers.engines import ENGINES
from benchmarks.trainers.models import MODELS, write
from benchmarks.trainers.page import page, plot

COLUMNS = (
    *("date", "engine", "model", "data", "status", "valid_tok_s", "step_ms", "steps", "first_step_s", "cold_200_s"),
    *("cold_measured", "micro_batches", "wall_ms_per_micro", "gpu_ms_per_micro", "host_ms_per_micro", "filled"),
    *("peak_allocated_gib", "peak_reserved_gib", "grad_norm", "loss", "class", "gpu", "versions", "commit"),
)


def main() -> None:
    """``run`` measures, ``page`` writes the documentation's page and plot from the CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    go = commands.add_parser("run")
    go.add_argument("--models-dir", type=Path, required=True)
    go.add_argument("--csv", type=Path, required=True)
    go.add_argument("--engines", default=",".join(ENGINES))
    go.add_argument("--models", default="qwen3-0.6b,qwen3-4b,llama-3.1-8b")
    go.add_argument("--data", default="alpaca")
    go.add_argument("--peer-path", default="")
    go.add_argument("--commit", default="")
    go.add_argument("--timeout", type=int, default=240, help="seconds for one run")
    go.add_argument("--budget", type=int, default=560, help="no further run starts after so many seconds")
    go.add_argument("others", nargs=argparse.REMAINDER, help="-- and options of benchmarks.trainers.one")
    out = commands.add_parser("page")
    out.add_argument("csv", type=Path)
    out.add_argument("markdown", type=Path)
    args = parser.parse_args()
    if args.command == "page":
        page(args.csv, args.markdown)
        plot(args.csv, args.csv.with_suffix(".png"))
        return
    measure(args)


def measure(args: argparse.Namespace) -> None:
    """Every engine on every model and data, in order, appended to the CSV as they end."""
    started = time.monotonic()
    unknown = set(args.models.split(",")) - set(MODELS)
    if unknown:
        raise SystemExit(f"unknown models: {', '.join(sorted(unknown))}; known: {', '.join(MODELS)}")
    for model in args.models.split(","):
        folder = write(model, args.models_dir)
        for data in args.data.split(","):
            for engine in args.engines.split(","):
                if time.monotonic() - started > args.budget:
                    print(f"left out for want of time: {engine} {model} {data}", flush=True)
                    continue
                row = one(engine, folder, data, args)
                _append(args.csv, {**row, "date": time.strftime("%Y-%m-%d"), "commit": args.commit})
                print(json.dumps(row), flush=True)


def one(engine: str, folder: Path, data: str, args: argparse.Namespace) -> dict[str, Any]:
    """One process; its figures, or why there are none."""
    environment = dict(os.environ, HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1")
    if not engine.startswith("dropforge") and args.peer_path:
        environment["PYTHONPATH"] = f"{args.peer_path}:{environment.get('PYTHONPATH', '')}"
    others = [word for word in args.others if word != "--"]
    command = [sys.executable, "-m", "benchmarks.trainers.one", engine, str(folder), data, *others]
    base = {"engine": engine, "model": folder.name, "data": data}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=args.timeout)
    except subprocess.TimeoutExpired as error:
        tail = (error.stderr or b"").decode(errors="replace")[-300:]
        return {**base, "status": f"more than {args.timeout} s; {tail}"}
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return {**json.loads(line.removeprefix("RESULT ")), "status": "ok"}
    print(done.stdout[-3000:], done.stderr[-3000:], sep="\n", flush=True)
    return {**base, "status": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}


def _append(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()

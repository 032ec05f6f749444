"""Whole trainers against each other: each engine in its own process, one CSV that grows row by row.

    PYTHONPATH=appliance:kernels python3 -m benchmarks.trainers.run run --models-dir DIR --csv FILE \
        --engines dropforge_packed,unsloth_packed,dropforge_packed --models qwen3-0.6b --data alpaca
    PYTHONPATH=appliance:kernels python3 -m benchmarks.trainers.run plan --models-dir DIR --csv FILE \
        --parts 4b,0.6b --limit-s 540 --done EARLIER.csv
    PYTHONPATH=appliance:kernels python3 -m benchmarks.trainers.run page FILE docs/reference/packed-speed.md

Engines run in the order given; name one twice to see the spread (A-B-A). ``plan`` takes its runs from
benchmarks.trainers.plan, leaves out what the results files have already, and ends within its limit. A failed run leaves
a row with its reason.
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
from benchmarks.trainers.plan import PARTS, pending

COLUMNS = (
    *("date", "engine", "model", "data", "status", "valid_tok_s", "step_ms", "steps", "first_step_s", "cold_200_s"),
    *("cold_measured", "micro_batches", "wall_ms_per_micro", "gpu_ms_per_micro", "host_ms_per_micro", "host_share"),
    "filled",
    *("peak_allocated_gib", "peak_reserved_gib", "grad_norm", "loss", "class", "gpu", "versions", "commit"),
)


def main() -> None:
    """``run`` and ``plan`` measure, ``page`` writes the documentation's page and plot from the CSV."""
    args = _arguments()
    if args.command == "page":
        page(args.csv, args.markdown)
        plot(args.csv, args.csv.with_suffix(".png"))
    elif args.command == "plan":
        by_plan(args)
    else:
        measure(args)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    go, planned = commands.add_parser("run"), commands.add_parser("plan")
    for command in (go, planned):
        command.add_argument("--models-dir", type=Path, required=True)
        command.add_argument("--csv", type=Path, required=True)
        command.add_argument("--peer-path", default="")
        command.add_argument("--commit", default="")
    go.add_argument("--engines", default=",".join(ENGINES))
    go.add_argument("--models", default="qwen3-0.6b,qwen3-4b,llama-3.1-8b")
    go.add_argument("--data", default="alpaca")
    go.add_argument("--timeout", type=int, default=240, help="seconds for one run")
    go.add_argument("--budget", type=int, default=560, help="no further run starts after so many seconds")
    go.add_argument("others", nargs=argparse.REMAINDER, help="-- and options of benchmarks.trainers.one")
    planned.add_argument("--parts", default=",".join(PARTS), help=", ".join(PARTS))
    planned.add_argument("--done", type=Path, nargs="*", default=[], help="results files whose rows are not run again")
    planned.add_argument("--limit-s", type=int, default=540, help="all ends within so many seconds")
    out = commands.add_parser("page")
    out.add_argument("csv", type=Path)
    out.add_argument("markdown", type=Path)
    return parser.parse_args()


def measure(args: argparse.Namespace) -> None:
    """Every engine on every model and data, in order, appended to the CSV as they end."""
    started = time.monotonic()
    unknown = set(args.models.split(",")) - set(MODELS)
    if unknown:
        raise SystemExit(f"unknown models: {', '.join(sorted(unknown))}; known: {', '.join(MODELS)}")
    options = [word for word in args.others if word != "--"]
    for model in args.models.split(","):
        folder = write(model, args.models_dir)
        for data in args.data.split(","):
            for engine in args.engines.split(","):
                if time.monotonic() - started > args.budget:
                    print(f"left out for want of time: {engine} {model} {data}", flush=True)
                    continue
                row = one(engine, folder, data, options, peer_path=args.peer_path, timeout=args.timeout)
                _keep(row, args)


def by_plan(args: argparse.Namespace) -> None:
    """The runs of the named parts that no results file has, in order, as far as the time goes."""
    ends = time.monotonic() + args.limit_s
    unknown = set(args.parts.split(",")) - set(PARTS)
    if unknown:
        raise SystemExit(f"unknown parts: {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    for run in pending(args.parts.split(","), [args.csv, *args.done]):
        folder = write(run.model, args.models_dir)
        left = ends - time.monotonic()
        if run.seconds > left:
            print(f"left out for want of time: {' '.join(run.key)} (about {run.seconds} s)", flush=True)
            continue
        options = ["--warm", str(run.warm), "--steps", str(run.steps), "--profile"]
        if run.engine.startswith("dropforge"):
            options += ["--kernels", str(args.csv.parent / f"trainer-kernels-{run.engine}-{run.model}-{run.data}.txt")]
        limit = int(min(left, 30 + 2 * run.seconds))
        began = time.monotonic()
        row = one(run.engine, folder, run.data, options, peer_path=args.peer_path, timeout=limit)
        _keep(row, args)
        print(f"{' '.join(run.key)}: {time.monotonic() - began:.0f} s, {run.seconds} expected", flush=True)


def _keep(row: dict[str, Any], args: argparse.Namespace) -> None:
    _append(args.csv, {**row, "date": time.strftime("%Y-%m-%d"), "commit": args.commit})
    print(json.dumps(row), flush=True)


def one(
    engine: str, folder: Path, data: str, options: list[str], *, peer_path: str = "", timeout: int
) -> dict[str, Any]:
    """One process; its figures, or why there are none."""
    environment = dict(os.environ, HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1")
    if not engine.startswith("dropforge") and peer_path:
        environment["PYTHONPATH"] = f"{peer_path}:{environment.get('PYTHONPATH', '')}"
    command = [sys.executable, "-m", "benchmarks.trainers.one", engine, str(folder), data, *options]
    base = {"engine": engine, "model": folder.name, "data": data}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        tail = (error.stderr or b"").decode(errors="replace")[-300:]
        return {**base, "status": f"more than {timeout} s; {tail}"}
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return {**json.loads(line.removeprefix("RESULT ")), "status": "ok"}
    print(done.stdout[-3000:], done.stderr[-3000:], sep="\n", flush=True)
    return {**base, "status": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}


def _append(path: Path, row: dict[str, Any]) -> None:
    """A file of older columns is brought to today's first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = [] if reader.fieldnames == [*COLUMNS] else list(reader)
    with path.open("w" if rows or not path.exists() else "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        if not file.tell():
            writer.writeheader()
        writer.writerows([*rows, row])


if __name__ == "__main__":
    main()

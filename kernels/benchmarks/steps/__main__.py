"""Whole-step benchmark. Each engine runs in a process of its own; rows reach the CSV as they are measured.

    run       parity, then every engine at every shape: --engines ours,unsloth,ours --weights nf4,bf16 --shapes 8x2048
    parity    the parity checks alone
    longest   the longest sequence on a card of --card-gib GiB
    profile   where the time of a step goes, one text file per engine and shape
    slices    bf16 gradients of two layers against fp32, every policy (a CSV of its own)
    products  the matrix products of LoRA alone (a CSV of its own)
    table     the CSV as text         page    the documentation page         plot    a PNG beside the CSV
    publish   both of these, into their places

Order: weights, then rounds, then engines, so that --engines ours,unsloth --rounds 3 runs A-B-A-B-A-B. ``--limit-s``
bounds the whole command: shapes that no longer fit are left out, and what was measured is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from steps import page, report
from steps.models import ENGINES, PARITY_LAYERS, SHAPES, TINY_SHAPES, parse_engines, same_process, truth_name
from steps.records import append
from steps.weights import is_complete

HERE = Path(__file__).parent
GRACE_S = 20.0


def parser() -> argparse.ArgumentParser:
    """The command line, for the parent and (hidden words) the child."""
    made = argparse.ArgumentParser(
        "steps", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="engines: " + "; ".join(f"{name}: {text}" for name, text in ENGINES.items()),
    )  # fmt: skip
    made.add_argument(
        "command",
        choices=(
            "run",
            "parity",
            "longest",
            "profile",
            "slices",
            "products",
            "table",
            "page",
            "plot",
            "publish",
            "child",
        ),
    )
    made.add_argument("csv", nargs="?", type=Path, help="for table, page, plot and publish")
    made.add_argument("--engines", default="ours,ours:equal,unsloth,liger,hf,ours")
    made.add_argument("--weights", default="nf4,bf16")
    made.add_argument("--shapes", default="", help=f"batch x length; default {SHAPES}")
    made.add_argument("--rounds", type=int, default=1, help="how often the list of engines is run")
    made.add_argument("--seconds", type=float, default=12.0, help="timed seconds per shape")
    made.add_argument("--limit-s", type=float, default=570.0, help="seconds for the whole command")
    made.add_argument("--out", type=Path, default=HERE.parent / "results" / "steps.csv")
    made.add_argument("--work", type=Path, default=Path("/tmp/dropforge-steps"), help="checkpoints and parity results")
    made.add_argument("--peer-path", default="", help="folder put on the path of liger's and unsloth's processes alone")
    made.add_argument("--ours-path", default="", help="folders put on the path of our processes alone (flash-attn-4)")
    made.add_argument("--commit", default="unknown")
    made.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    made.add_argument("--tiny", action="store_true", help="a tiny model at tiny shapes, to try the benchmark itself")
    made.add_argument("--layers", type=int, default=None, help="fewer layers than the model has")
    made.add_argument("--card-gib", type=float, default=0.0, help="emulate a card of this size")
    made.add_argument("--steal-gib", type=float, default=0.0, help="taken after planning, as another process would")
    made.add_argument("--no-parity", action="store_true", help="speeds without the parity check (marked in the CSV)")
    made.add_argument("--start", type=int, default=65536, help="longest: the first length")
    made.add_argument("--most", type=int, default=1048576, help="longest: no length above this")
    made.add_argument("--growth", type=float, default=1.5, help="longest: factor while bracketing")
    made.add_argument("--resolution", type=float, default=0.04, help="longest: stop at this share of the length")
    for hidden in ("--task", "--engine"):
        made.add_argument(hidden, default="", help=argparse.SUPPRESS)
    made.add_argument("--round", type=int, default=0, help=argparse.SUPPRESS)
    made.add_argument("--deadline", type=float, default=0.0, help=argparse.SUPPRESS)
    return made


def start(args: argparse.Namespace, task: str, engine: str, weights: str, number: int = 0) -> int:
    """Runs one child to its end, or kills it ``GRACE_S`` after the deadline. Returns its exit status."""
    words = [sys.executable, "-P", "-m", "steps", "child", "--task", task, "--engine", engine, "--weights", weights]
    for name in ("shapes", "seconds", "out", "work", "commit", "device", "card_gib", "steal_gib", "start", "most",
                 "growth", "resolution", "deadline"):  # fmt: skip
        words += ["--" + name.replace("_", "-"), str(getattr(args, name))]
    words += ["--round", str(number)]
    words += ["--layers", str(args.layers)] if args.layers else []
    words += [flag for flag, on in (("--tiny", args.tiny), ("--no-parity", args.no_parity)) if on]
    print(f"--- {task} {engine} {weights}, {args.deadline - time.time():.0f} s left", flush=True)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=_environment(args, engine))
    timer = threading.Timer(max(1.0, args.deadline + GRACE_S - time.time()), process.kill)
    timer.start()
    try:
        for line in process.stdout or ():
            if line.startswith("ROW "):
                row = json.loads(line[4:])
                append(args.out, row)
                print(_short(row), flush=True)
            else:
                print(line, end="", flush=True)
    finally:
        timer.cancel()
        status = process.wait()
    print(f"--- {task} {engine} {weights}: exit status {status}", flush=True)
    return status


def _environment(args: argparse.Namespace, engine: str) -> dict[str, str]:
    found = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    found.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    extra = {"liger": args.peer_path, "unsloth": args.peer_path, "ours": args.ours_path}.get(engine.partition(":")[0])
    found["PYTHONPATH"] = os.pathsep.join(
        [*filter(None, [extra]), str(HERE.parent), *filter(None, [found.get("PYTHONPATH", "")])]
    )
    return found


def _short(row: dict[str, object]) -> str:
    keys = ("kind", "engine", "setting", "weights", "batch", "length", "status", "tok_per_s", "step_ms", "host_ms",
            "peak_allocated_gib", "predicted_gib", "loss", "grad_norm", "memory_plan")  # fmt: skip
    values = {key: row[key] for key in keys if key in row}
    return " ".join(f"{k}={v:.5g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())


def check_parity(args: argparse.Namespace, engines: list[str], weights: str) -> None:
    """Every engine once; what an earlier command checked, its results still in --work, is not repeated."""
    if not (args.work / truth_name(weights)).exists():
        start(args, "truth", "hf", weights)
    # hf is what the reference file's bf16 errors are made of
    for group in same_process([engine for engine in dict.fromkeys(engines) if engine != "hf"]):
        start(args, "check", ",".join(group), weights)


def main() -> None:
    """Parent and child share one command line."""
    args = parser().parse_args()
    args.model = "tiny" if args.tiny else "llama-3.1-8b"
    args.shapes = args.shapes or (TINY_SHAPES if args.tiny else SHAPES)
    if args.command == "child":
        from steps import child

        child.main(args)
        return
    if args.command in ("slices", "products"):
        from importlib import import_module

        import_module(f"steps.{args.command}").main(args)
        return
    made = {"table": page.table, "page": report.page, "plot": page.plot, "publish": report.publish}.get(args.command)
    if made is not None:
        print(made(args.csv or args.out))
        return
    args.deadline = time.time() + args.limit_s
    args.work.mkdir(parents=True, exist_ok=True)
    engines = parse_engines(args.engines)
    if not all(is_complete(args.work, args.model, layers=layers) for layers in (args.layers, PARITY_LAYERS)):
        start(args, "write", "hf", "bf16")
    for weights in args.weights.split(","):
        if args.command == "parity" or (args.command == "run" and not args.no_parity):
            check_parity(args, engines, weights)
        if args.command != "parity":
            for number in range(args.rounds):
                for group in same_process(engines) if args.command == "run" else [[engine] for engine in engines]:
                    start(args, args.command, ",".join(group), weights, number)
    if args.out.exists():
        print(page.table(args.out))


if __name__ == "__main__":
    main()

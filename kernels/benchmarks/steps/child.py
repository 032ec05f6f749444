"""What runs in an engine's own process: load once, then every shape; each row is printed as soon as it is measured."""

from __future__ import annotations

import argparse
import json
import time

import torch

from steps import breakdown, longest, measure, parity
from steps.engines import Loaded, load, versions
from steps.models import MODELS, PARITY_LAYERS, parse_shapes, truth_name
from steps.weights import ensure_checkpoint

MOST_CONTEXT = 2 * measure.GIB
"""A process without a single kernel takes about 0.6 GiB of an H200."""


def emit(row: dict[str, object]) -> None:
    """To the parent, which writes the CSV."""
    print("ROW " + json.dumps(row), flush=True)


def common(args: argparse.Namespace, engine: str) -> dict[str, object]:
    """The columns that are the same in every row of one engine in this process."""
    name, _, setting = engine.partition(":")
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    return {
        "model": args.model, "layers": args.layers or MODELS[args.model]["num_hidden_layers"], "engine": name,
        "setting": setting, "weights": args.weights, "gpu": gpu, "commit": args.commit, "round": args.round,
        "optimizer": "AdamW8bit (bitsandbytes)", "card_gib": args.card_gib or "",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip


def emulate_card(gib: float) -> None:
    """Caps this process's allocations so that they and the CUDA context fit a card of ``gib`` GiB."""
    torch.cuda.init()
    torch.zeros(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    if context > MOST_CONTEXT:
        raise SystemExit(
            f"{context / measure.GIB:.1f} GiB of this GPU are taken already, more than a CUDA context: another process "
            "uses it, and a card is emulated on a GPU of one's own"
        )
    torch.cuda.set_per_process_memory_fraction((gib * measure.GIB - context) / total)
    print(f"emulated card: {gib:g} GiB, of which the CUDA context takes {context / measure.GIB:.2f}", flush=True)


def _load(args: argparse.Namespace, length: int) -> Loaded:
    path = ensure_checkpoint(args.work, args.model, layers=args.layers, device=args.device)
    start = time.time()
    loaded = load(args.engine.split(",")[0], path, weights=args.weights, device=args.device, longest=length)
    if args.device == "cuda":
        used = torch.cuda.memory_allocated() / measure.GIB
        print(f"{args.engine} {args.weights}: loaded in {time.time() - start:.0f} s, {used:.2f} GiB", flush=True)
    return loaded


def run(args: argparse.Namespace) -> None:
    """Step rows of every setting and shape; ours without a green parity check gets rows without speeds."""
    shapes = parse_shapes(args.shapes)
    loaded = None
    for engine in args.engine.split(","):
        verdict = parity.remembered(engine, args.work, weights=args.weights) or {"passed": False, "text": "not run"}
        row = common(args, engine) | {"kind": "step", "parity": verdict["text"]}
        if engine.startswith("ours") and not (verdict["passed"] or args.no_parity):
            for shape in shapes:
                emit(row | {"batch": shape.batch, "length": shape.length, "status": "parity failed"})
            continue
        loaded = loaded or _load(args, max(shape.length for shape in shapes))
        loaded.setting, loaded.steal_gib = engine.partition(":")[2], args.steal_gib
        row |= versions(engine, loaded.model)
        for shape in shapes:
            if time.time() > args.deadline - 10:
                print(f"no time left for {engine} {shape}", flush=True)
                break
            emit(row | measure.measure(loaded, shape, seconds=args.seconds, deadline=args.deadline))


def check(args: argparse.Namespace) -> None:
    """Parity of the engines, remembered for the processes that follow."""
    path = ensure_checkpoint(args.work, args.model, layers=PARITY_LAYERS, device=args.device)
    for engine in args.engine.split(","):
        found = parity.verdict(engine, args.work, path, weights=args.weights, device=args.device)
        print(f"parity {engine} {args.weights}: {found}", flush=True)


def truth(args: argparse.Namespace) -> None:
    """The fp32 reference of the parity check, in a process that only transformers and PEFT have touched."""
    path = ensure_checkpoint(args.work, args.model, layers=PARITY_LAYERS, device=args.device)
    target = args.work / truth_name(args.weights)
    if not target.exists():
        parity.write_truth(path, target, weights=args.weights, device=args.device)


def write(args: argparse.Namespace) -> None:
    """The checkpoints, before a process that must import its engine first needs them."""
    for layers in (args.layers, PARITY_LAYERS):
        ensure_checkpoint(args.work, args.model, layers=layers, device=args.device)


def find_longest(args: argparse.Namespace) -> None:
    """Rows of kind longest: one per tried length, and the longest that trained once more with status longest."""
    loaded = _load(args, args.most)
    row = common(args, args.engine) | versions(args.engine, loaded.model) | {"kind": "longest"}
    longest.find(
        loaded, lambda found: emit(row | found), start=args.start, resolution=args.resolution, growth=args.growth,
        most=args.most, deadline=args.deadline,
    )  # fmt: skip


def profile(args: argparse.Namespace) -> None:
    """The breakdown of one step per shape, into a text file per shape."""
    shapes = parse_shapes(args.shapes)
    loaded = _load(args, max(shape.length for shape in shapes))
    for shape in shapes:
        text = f"{common(args, args.engine)}\n{versions(args.engine, loaded.model)}\n" + breakdown.profile(
            loaded, shape
        )
        file = args.out.parent / f"profile-{args.engine.replace(':', '-')}-{args.weights}-{shape}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
        print(text, flush=True)


TASKS = {"write": write, "run": run, "check": check, "truth": truth, "longest": find_longest, "profile": profile}


def main(args: argparse.Namespace) -> None:
    """Entry of the process."""
    if args.card_gib and args.device == "cuda":
        emulate_card(args.card_gib)
    TASKS[args.task](args)

"""docs/reference/engine-speed.md from the CSV: every case that was run, the targets met and missed, the notes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from steps.models import ENGINES
from steps.page import Key, cell, plot, speed, steps_of, typical
from steps.records import read

DOCS, PAGE = Path(__file__).parents[3] / "docs", "reference/engine-speed.md"
NOTES = "steps-notes.md"
"""Beside the CSV, written by hand: for every missed row what the profile shows and what to try next."""


LEAN = ("ours:lean", "ours:equal", "ours:output", "ours:recompute")


@dataclass(frozen=True)
class Target:
    """One promise: ours at least ``factor`` times Unsloth's tokens/s, with at most its memory if ``memory``.

    ours: settings; of several the fastest that keeps the promise on memory, or the leanest when none does.
    """

    text: str
    weights: str
    shape: tuple[str, str]
    ours: tuple[str, ...]
    factor: float
    memory: bool = False


TARGETS = (
    Target("QLoRA, planner", "nf4", ("8", "2048"), ("ours:planner",), 1.45),
    Target("bf16 LoRA, planner", "bf16", ("8", "2048"), ("ours:planner",), 1.45),
    Target("QLoRA, Unsloth's recompute policy", "nf4", ("8", "2048"), ("ours:equal",), 1.1, memory=True),
    Target("bf16 LoRA, Unsloth's recompute policy", "bf16", ("8", "2048"), ("ours:equal",), 1.1, memory=True),
    Target("QLoRA, 32K", "nf4", ("1", "32768"), LEAN, 1.2, memory=True),
    Target("QLoRA, 128K", "nf4", ("1", "131072"), LEAN, 1.2, memory=True),
)
LONGEST = ((24, 100_000), (80, 400_000))
"""Card in GiB and the tokens promised on it, QLoRA."""


def page(path: Path) -> str:
    """The page as Markdown."""
    rows = read(path)
    first = rows[0]
    versions = ", ".join(
        f"{name} {first[name]}" for name in ("torch", "triton", "transformers", "peft", "bitsandbytes")
    )
    peers = ", ".join(dict.fromkeys(row["peer"] for row in rows if row.get("peer")))
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    lines = [
        "<!-- Generated from the CSV by `python -m steps publish`; change kernels/benchmarks/steps or the notes. -->",
        "# Engine: speed and memory of whole training steps",
        "",
        f"{first['gpu']}, {versions}, {peers}; commit {commits}. Random weights of the shape of {first['model']} "
        f"({first['layers']} layers), LoRA r=32 on all linear layers with B not zero, AdamW with 8-bit states, "
        "random tokens. A step is forward, backward and optimizer. Every engine ran in its own process; rates are "
        "medians over processes of medians over steps. Compare only within this page: rates move with the host, ratios "
        "count.",
        f"Rows: [{path.name}](../../kernels/benchmarks/results/{path.name}). [How memory is planned]"
        "(../concepts/memory.md). To measure again: `make bench-steps`.",
        "",
        f"![speed and memory](../../kernels/benchmarks/results/{path.with_suffix('.png').name})",
        "",
        "## Engines",
        "",
        *(f"- `{name}`: {ENGINES[name]}" for name in _names(rows)),
        "",
        "## Targets",
        "",
        *_targets(rows),
        "",
        "## All cases",
        "",
        *_cases(rows),
        *_longest(rows),
    ]
    lines += _profiles(path.parent)
    notes = path.with_name(NOTES)
    if notes.exists():
        lines += ["", notes.read_text().rstrip()]
    return "\n".join(lines)


def publish(path: Path) -> str:
    """Writes the page into docs/, and the plot where matplotlib is installed. Returns what was written."""
    target = DOCS / PAGE
    target.write_text(page(path) + "\n")
    try:
        made = f" and {plot(path)}"
    except ModuleNotFoundError:
        made = "; no plot: matplotlib is not installed"
    return f"{target}{made}"


def _names(rows: list[dict[str, str]]) -> list[str]:
    found = dict.fromkeys(row["engine"] + (f":{row['setting']}" if row["setting"] else "") for row in rows)
    return [name for name in ENGINES if name in found]


def _targets(rows: list[dict[str, str]]) -> Iterator[str]:
    steps = steps_of(rows)
    yield "| case | promised | measured | memory, ours / Unsloth | |"
    yield "|---|---|---|---|---|"
    for target in TARGETS:
        engines = steps.get((target.weights, *target.shape), {})
        promise = f"{target.factor} x Unsloth" + (", at most its memory" if target.memory else "")
        case = f"{target.text}, {'x'.join(target.shape)}"
        peer, limit = speed(engines, "unsloth"), _peak(engines, "unsloth")
        ours = [(speed(engines, name) or 0.0, _peak(engines, name), name) for name in target.ours]
        ours = [found for found in ours if found[0]]
        if not ours or peer is None:
            yield f"| {case} | {promise} | not measured | | open |"
            continue
        within = [found for found in ours if not target.memory or found[1] <= limit]
        rate, used, name = max(within) if within else min(ours, key=lambda found: found[1])
        verdict = "met" if within and rate / peer >= target.factor else "**missed**"
        yield f"| {case} | {promise} | {rate / peer:.2f} x (`{name}`) | {used:.1f} / {limit:.1f} GiB | {verdict} |"
    yield from _offload(steps)
    for size, promised in LONGEST:
        found = [int(row["length"]) for row in rows if row["kind"] == "longest" and row["status"] == "longest"
                 and row["engine"] == "ours" and row["card_gib"] and float(row["card_gib"]) == size]  # fmt: skip
        verdict = "open" if not found else "met" if max(found) >= promised else "**missed**"
        measured = f"{max(found):,} tokens" if found else "not measured"
        yield f"| longest context, QLoRA, {size} GiB emulated | {promised:,} tokens | {measured} | | {verdict} |"


def _peak(engines: dict[str, list[dict[str, str]]], name: str) -> float:
    return typical(engines.get(name, []), "peak_allocated_gib") or 0.0


def _offload(steps: dict[Key, dict[str, list[dict[str, str]]]]) -> Iterator[str]:
    """Tensors in host memory against the same on the GPU, everything else equal."""
    pairs = (
        ("layer inputs", "ours:equal", "ours:recompute"),
        ("inputs and attention outputs", "ours:lean", "ours:output"),
    )
    for ((weights, batch, length), engines), (what, host, gpu) in product(steps.items(), pairs):
        there, here = (typical(engines.get(name, []), "step_ms") for name in (host, gpu))
        if there and here and int(batch) * int(length) >= 8192:
            slower = there / here - 1
            verdict = "met" if slower <= 0.005 else "**missed**"
            case = f"offloaded {what}, {weights}, {batch}x{length}"
            yield f"| {case} | at most 0.5% slower | {100 * slower:+.2f}% | | {verdict} |"


def _cases(rows: list[dict[str, str]]) -> Iterator[str]:
    yield ("| weights | shape | engine | tokens/s | x Unsloth | step ms | host ms | peak GiB allocated | reserved | "
           "planned | loss | gradient norm | runs |")  # fmt: skip
    yield "|---" * 13 + "|"
    for (weights, batch, length), engines in steps_of(rows).items():
        base = speed(engines, "unsloth")
        for name, found in engines.items():
            rate = speed(engines, name)
            states = [state for state in dict.fromkeys(row["status"] for row in found) if state != "ok"]
            cells = [cell(typical(found, column), digits) for column, digits in (
                ("step_ms", 1), ("host_ms", 0), ("peak_allocated_gib", 1), ("peak_reserved_gib", 1),
                ("predicted_gib", 1), ("loss", 4), ("grad_norm", 4))]  # fmt: skip
            ratio = f"{rate / base:.2f}" if rate and base else ""
            shown = cell(rate, 0) or ", ".join(states)
            yield f"| {weights} | {batch}x{length} | {name} | {shown} | {ratio} | {' | '.join(cells)} | {len(found)} |"


def _longest(rows: list[dict[str, str]]) -> Iterator[str]:
    tried = [row for row in rows if row["kind"] == "longest"]
    if not tried:
        return
    yield from ("", "## Longest context", "",
                "Each length was trained for a whole step with the optimizer's states in place; the allocator was held "
                "to the card's size less the CUDA context.", "",
                "| card | engine | weights | tokens | | tokens/s | peak GiB | planned | host GiB |",
                "|---" * 9 + "|")  # fmt: skip
    for row in tried:
        size = f"{row['card_gib']} GiB" if row["card_gib"] else "whole"
        name = row["engine"] + (f":{row['setting']}" if row["setting"] else "")
        numbers = [cell(float(row[column]) if row[column] else None, digits) for column, digits in (
            ("tok_per_s", 0), ("peak_allocated_gib", 1), ("predicted_gib", 1), ("host_store_gib", 1))]  # fmt: skip
        yield (f"| {size} | {name} | {row['weights']} | {int(row['length']):,} | {row['status']} | "
               f"{' | '.join(numbers)} |")  # fmt: skip


def _profiles(folder: Path) -> Iterator[str]:
    """The table of kinds out of every profile beside the CSV."""
    files = sorted(folder.glob("profile-*.txt"))
    if not files:
        return
    yield from ("", "## Where the time of a step goes", "",
                "GPU time by kind of kernel under torch's profiler; whole lists are beside the CSV.")  # fmt: skip
    for file in files:
        kinds = file.read_text().split("\n\nthe ", 1)[0].splitlines()[2:]
        yield from ("", f"[{file.stem.removeprefix('profile-')}](../../kernels/benchmarks/results/{file.name})", "",
                    "```text", *kinds, "```")  # fmt: skip

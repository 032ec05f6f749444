"""The documentation's page and plot of a results file of whole trainers."""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import median

NUMBERS = ("valid_tok_s", "cold_200_s", "wall_ms_per_micro", "gpu_ms_per_micro", "host_ms_per_micro",
           "peak_reserved_gib", "grad_norm")  # fmt: skip
HEAD = """# Packed training: speed of whole trainers

LoRA r=16 on all linear layers, bf16, 8-bit AdamW, random weights of the true architecture; documents of random tokens
with the lengths named. Every engine in its own process on one machine; the median where one ran more than once.
*valid tok/s*: real tokens, no padding, optimizer and data loading included. *cold 200*: the first 200 optimizer steps
from the trainer's creation on, compilation and captures included. *wall*, *GPU*, *host*: milliseconds per micro-batch;
GPU is the time in which kernels run, host the training thread's own time in steps that find the GPU's queue empty (a
launch into a full queue waits inside the driver). What the engines are set to:
`kernels/benchmarks/trainers/engines.py`.

Source: `{name}`; {machine}.
"""


def _cases(path: Path) -> dict[tuple[str, str], dict[str, list[dict[str, str]]]]:
    cases: dict[tuple[str, str], dict[str, list[dict[str, str]]]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            cases.setdefault((row["model"], row["data"]), {}).setdefault(row["engine"], []).append(row)
    return cases


def _figure(rows: list[dict[str, str]], name: str) -> float | None:
    values = [float(row[name]) for row in rows if row["status"] == "ok" and row[name] not in ("", "None")]
    return median(values) if values else None


def page(path: Path, out: Path) -> None:
    """Write the page: one table per model and data, engines from fastest to slowest; then NAME-notes.md, if there."""
    cases = _cases(path)
    rows = [row for engines in cases.values() for found in engines.values() for row in found]
    machine = "; ".join(sorted({f"{row['gpu']}, commit {row['commit'] or 'unknown'}" for row in rows if row["gpu"]}))
    parts = [HEAD.format(name=path.name, machine=machine)]
    for (model, data), engines in cases.items():
        parts.append(f"\n## {model}, {data}\n")
        parts.append("| engine | valid tok/s | cold 200, s | wall | GPU | host | peak GiB | gradient norm | runs |")
        parts.append("|---|---|---|---|---|---|---|---|---|")
        for engine, found in sorted(engines.items(), key=lambda item: -(_figure(item[1], "valid_tok_s") or 0)):
            cells = [_figure(found, name) for name in NUMBERS]
            texts = ["" if cell is None else f"{cell:,.0f}" if cell >= 1000 else f"{cell:.3g}" for cell in cells]
            failed = [row["status"] for row in found if row["status"] != "ok"]
            runs = f"{len(found) - len(failed)}" + (f"; failed: {failed[0][:80]}" if failed else "")
            parts.append("| " + " | ".join([engine, *texts, runs]) + " |")
    versions = sorted({row["versions"] for row in rows if row["versions"]})
    parts.append("\nVersions: " + "; ".join(versions) + ".\n")
    notes = path.with_name(f"{path.stem}-notes.md")
    if notes.exists():
        parts.append(notes.read_text())
    out.write_text("\n".join(parts))


def plot(path: Path, out: Path) -> None:
    """Bars of valid tokens per second, one group per model and data; logarithmic, for the engines differ tenfold."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    cases = _cases(path)
    engines = list(dict.fromkeys(engine for found in cases.values() for engine in found))
    figure, axes = pyplot.subplots(figsize=(1.5 + 2.2 * len(cases), 4))
    width = 0.8 / len(engines)
    for number, engine in enumerate(engines):
        heights = [_figure(found.get(engine, []), "valid_tok_s") or 0 for found in cases.values()]
        axes.bar([at + number * width for at in range(len(cases))], heights, width, label=engine)
    axes.set_yscale("log")
    axes.set_ylabel("valid tokens / s")
    axes.set_xticks([at + 0.4 for at in range(len(cases))], [f"{m}\n{d}" for m, d in cases])
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out, dpi=120)

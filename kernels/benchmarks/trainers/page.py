"""The documentation's page and plot of a results file of whole trainers."""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import median

NUMBERS = ("wall_ms_per_micro", "gpu_ms_per_micro", "host_ms_per_micro", "host_share", "peak_reserved_gib",
           "grad_norm")  # fmt: skip
HEAD = """# Packed training: speed of whole trainers

LoRA r=16 on all linear layers, bf16, 8-bit AdamW, random weights of the true architecture; documents of random tokens
with the lengths named. Every engine in its own process on one machine; the median where one ran more than once.
*valid tok/s*: real tokens, no padding, optimizer and data loading included. *cold 200*: the first 200 optimizer steps
from the trainer's creation on, compilation and captures included; with ~ fewer were run, and the rest is taken at the
steady rate. *wall*, *GPU*, *host*: milliseconds per micro-batch. GPU: in which kernels or copies run. Host: what the
training thread itself does for a micro-batch, its share of optimizer, callbacks and logging included, measured where it
waits for nothing: in launches that find the GPU's queue empty (into a full queue they wait inside the driver).
*share*: host over GPU. What the engines are set to: `kernels/benchmarks/trainers/engines.py`.

Source: `{name}`; {machine}.
"""


def _cases(path: Path) -> dict[tuple[str, str], dict[str, list[dict[str, str]]]]:
    cases: dict[tuple[str, str], dict[str, list[dict[str, str]]]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            cases.setdefault((row["model"], row["data"]), {}).setdefault(row["engine"], []).append(row)
    return cases


def _figure(rows: list[dict[str, str]], name: str) -> float | None:
    values = [float(row[name]) for row in rows if row["status"] == "ok" and row.get(name) not in (None, "", "None")]
    return median(values) if values else None


def _text(figure: float | None) -> str:
    return "" if figure is None else f"{figure:,.0f}" if figure >= 1000 else f"{figure:.3g}"


def _cold(rows: list[dict[str, str]]) -> str:
    measured = [row for row in rows if row["cold_measured"] == "True"]
    text = _text(_figure(measured or rows, "cold_200_s"))
    return text if measured or not text else f"~{text}"


def page(path: Path, out: Path) -> None:
    """Write the page: one table per model and data, engines from fastest to slowest; then NAME-notes.md, if there."""
    cases = _cases(path)
    rows = [row for engines in cases.values() for found in engines.values() for row in found]
    machine = "; ".join(sorted({f"{row['gpu']}, commit {row['commit'] or 'unknown'}" for row in rows if row["gpu"]}))
    parts = [HEAD.format(name=path.name, machine=machine)]
    for (model, data), engines in cases.items():
        parts.append(f"\n## {model}, {data}\n")
        parts.append(
            "| engine | valid tok/s | cold 200, s | wall | GPU | host | share | peak GiB | gradient norm | runs |"
        )
        parts.append("|---|---|---|---|---|---|---|---|---|---|")
        for engine, found in sorted(engines.items(), key=lambda item: -(_figure(item[1], "valid_tok_s") or 0)):
            texts = [_text(_figure(found, "valid_tok_s")), _cold(found)]
            texts += [_text(_figure(found, name)) for name in NUMBERS]
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

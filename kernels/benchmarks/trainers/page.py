"""The documentation's page and plot of a results file of whole trainers."""

from __future__ import annotations

import csv
from collections.abc import Iterator
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
*share*: host over GPU. *ours to it*: the fastest of ours over that row. A commit is a run on one machine; hosts differ,
so only rows of one table are compared. What the engines are set to: `kernels/benchmarks/trainers/engines.py`.

Source: `{name}`; {machine}.
"""


Cases = dict[tuple[str, str, str], dict[str, list[dict[str, str]]]]
"""(model, data, commit) -> engine -> rows. Hosts differ from run to run, so only rows of one commit are compared."""


def _cases(path: Path) -> Cases:
    cases: Cases = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            key = row["model"], row["data"], row["commit"] or "unknown"
            cases.setdefault(key, {}).setdefault(row["engine"], []).append(row)
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
    """Write the page: a table per model, data and commit, newest first; then NAME-notes.md, if there is one."""
    cases = _cases(path)
    rows = [row for engines in cases.values() for found in engines.values() for row in found]
    machine = "; ".join(sorted({row["gpu"] for row in rows if row["gpu"]}))
    parts = [HEAD.format(name=path.name, machine=machine)]
    for (model, data, commit), engines in reversed(cases.items()):
        parts.append(f"\n## {model}, {data} (commit {commit})\n")
        parts += _table(engines)
    parts += kernels(path.parent)
    versions = sorted({row["versions"] for row in rows if row["versions"]})
    parts.append("\nVersions: " + "; ".join(versions) + ".\n")
    notes = path.with_name(f"{path.stem}-notes.md")
    if notes.exists():
        parts.append(notes.read_text())
    out.write_text("\n".join(parts))


def kernels(folder: Path) -> Iterator[str]:
    """The tables of kernels that ``one --kernels`` left in ``folder``, without the lists of single kernels."""
    files = sorted(folder.glob("trainer-kernels-*.txt"))
    if files:
        yield "\n## Where the time of an optimizer step goes\n"
        yield "GPU time by kind of kernel under torch's profiler, over three steps; whole lists are beside the CSV."
    for file in files:
        link = f"[{file.stem.removeprefix('trainer-kernels-')}](../../kernels/benchmarks/results/{file.name})"
        yield f"\n{link}\n\n```text\n{file.read_text().split(chr(10) * 2 + 'the ', 1)[0]}\n```"


def _table(engines: dict[str, list[dict[str, str]]]) -> Iterator[str]:
    rates = {engine: _figure(found, "valid_tok_s") or 0.0 for engine, found in engines.items()}
    ours = max((rate for engine, rate in rates.items() if engine.startswith("dropforge")), default=0.0)
    columns = ("engine", "valid tok/s", "ours to it", "cold 200, s", "wall", "GPU", "host", "share", "peak GiB",
               "gradient norm", "runs")  # fmt: skip
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for engine, found in sorted(engines.items(), key=lambda item: -rates[item[0]]):
        ratio = f"{ours / rates[engine]:.2f}x" if ours and rates[engine] and not engine.startswith("dropforge") else ""
        texts = [_text(rates[engine] or None), ratio, _cold(found)]
        texts += [_text(_figure(found, name)) for name in NUMBERS]
        failed = [row["status"] for row in found if row["status"] != "ok"]
        runs = f"{len(found) - len(failed)}" + (f"; failed: {failed[0][:80]}" if failed else "")
        yield "| " + " | ".join([engine, *texts, runs]) + " |"


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
    axes.set_xticks([at + 0.4 for at in range(len(cases))], [f"{m}\n{d}, {c}" for m, d, c in cases])
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out, dpi=120)

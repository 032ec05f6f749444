"""A text table and a plot of the CSV; ``report`` makes the documentation page of the same rows."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from steps.records import read

Key = tuple[str, ...]


def _number(row: dict[str, str], column: str) -> float | None:
    return float(row[column]) if row.get(column) else None


def steps_of(rows: list[dict[str, str]]) -> dict[Key, dict[str, list[dict[str, str]]]]:
    """(weights, batch, length) -> engine -> its rows, one per process."""
    found: dict[Key, dict[str, list[dict[str, str]]]] = {}
    for row in rows:
        if row["kind"] == "step":
            key = (row["weights"], row["batch"], row["length"])
            name = row["engine"] + (f":{row['setting']}" if row["setting"] else "")
            found.setdefault(key, {}).setdefault(name, []).append(row)
    return found


def typical(rows: list[dict[str, str]], column: str) -> float | None:
    """Median over the processes of one engine; None when none has the number."""
    values = [value for row in rows if (value := _number(row, column)) is not None]
    return median(values) if values else None


def speed(engines: dict[str, list[dict[str, str]]], name: str) -> float | None:
    """Median tokens/s of one engine at one shape."""
    return typical(engines.get(name, []), "tok_per_s")


def table(path: Path) -> str:
    """One line per engine and shape, and one per tried length."""
    head = f"{'weights':6} {'shape':>9} {'engine':16} {'tok/s':>8} {'x unsloth':>9} {'host ms':>8} {'alloc':>6} "
    lines = [head + f"{'resvd':>6} {'plan':>6} {'loss':>8} {'|grad|':>9}  status"]
    rows = read(path)
    for (weights, batch, length), engines in steps_of(rows).items():
        base = speed(engines, "unsloth")
        for name, found in engines.items():
            rate = speed(engines, name)
            ratio = f"{rate / base:9.2f}" if rate and base else " " * 9
            cells = [f"{cell(typical(found, column)):>{width}}" for column, width in (
                ("host_ms", 8), ("peak_allocated_gib", 6), ("peak_reserved_gib", 6), ("predicted_gib", 6),
                ("loss", 8), ("grad_norm", 9))]  # fmt: skip
            states = ",".join(dict.fromkeys(row["status"] for row in found))
            lines.append(
                f"{weights:6} {batch + 'x' + length:>9} {name:16} {cell(rate, 0):>8} {ratio} {' '.join(cells)}  "
                f"{states} ({len(found)})"
            )
    for row in rows:
        if row["kind"] == "longest":
            size = f"{row['card_gib']} GiB" if row["card_gib"] else "whole card"
            lines.append(
                f"longest {row['engine']}:{row['setting']} {row['weights']} {size} {row['length']:>8} {row['status']} "
                f"{row['tok_per_s']} tok/s, peak {row['peak_allocated_gib']} GiB, planned {row['predicted_gib']}"
            )
    return "\n".join(lines)


def cell(value: float | None, digits: int = 2) -> str:
    """A number for a table; empty for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if digits == 0 or abs(value) >= 1000 else f"{value:.{digits}f}"


def plot(path: Path) -> Path:
    """Tokens/s and peak memory over the shapes, one row of panels per kind of weights, beside the CSV."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = steps_of(read(path))
    kinds = list(dict.fromkeys(key[0] for key in found))
    figure, axes = pyplot.subplots(len(kinds), 2, figsize=(13, 4 * len(kinds)), squeeze=False)
    for row, weights in enumerate(kinds):
        shapes = [key for key in found if key[0] == weights]
        names = list(dict.fromkeys(name for key in shapes for name in found[key]))
        for column, (field, label) in enumerate((("tok_per_s", "tokens/s"), ("peak_allocated_gib", "peak GiB"))):
            axis = axes[row][column]
            for number, name in enumerate(names):
                values = [typical(found[key].get(name, []), field) or 0.0 for key in shapes]
                places = [at + (number - len(names) / 2) * 0.8 / len(names) for at in range(len(shapes))]
                axis.bar(places, values, width=0.8 / len(names), align="edge", label=name)
            axis.set_xticks(range(len(shapes)), [f"{key[1]}x{key[2]}" for key in shapes])
            axis.set(title=f"{weights}: {label}")
            axis.legend(fontsize=7)
    first = read(path)[0]
    figure.suptitle(f"{first['model']}, LoRA r=32, {first['gpu']}, torch {first['torch']}, commit {first['commit']}")
    figure.tight_layout()
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=90)
    return target

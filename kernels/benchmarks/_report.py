"""What is made of a results file: a text table, the tables of docs/reference/kernels.md, and a plot."""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import median

LARGE = "16384"
SHAPE = "llama-8b"  # of the plot
PEERS = ("copy", "torch", "compile", "liger", "unsloth")


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def _cases(rows: list[dict[str, str]]) -> dict[tuple[str, ...], dict[str, list[dict[str, str]]]]:
    """Rows by (op, direction, shape, tokens), then provider; a provider that ran twice (A-B-A) has two rows."""
    cases: dict[tuple[str, ...], dict[str, list[dict[str, str]]]] = {}
    for row in rows:
        key = (row["op"], row["direction"], row["shape"], row["tokens"])
        cases.setdefault(key, {}).setdefault(row["provider"], []).append(row)
    return cases


def _time(rows: list[dict[str, str]] | None) -> float | None:
    """Median GPU time over the runs of one provider, in microseconds."""
    times = [float(r["gpu_us"]) for r in rows or () if r["status"] == "ok"]
    return median(times) if times else None


def _share(rows: list[dict[str, str]]) -> float | None:
    """Median share of the copy speed, or of the matrix product's rate."""
    shares = [float(r["share_of_copy"] or r["share_of_product"]) for r in rows if r["status"] == "ok"]
    return median(shares) if shares else None


def markdown(path: Path) -> str:
    """One table per kind: memory-bound operations at 16,384 tokens against the peers, and the attention backends."""
    head = ["operation", "direction", "shapes", "us", "share of copy", *(f"{p}, times ours" for p in PEERS)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    attention = []
    for (op, direction, shape, tokens), found in _cases(_rows(path)).items():
        ours = found.get("ours", [])
        time, share = _time(ours), _share(ours) if ours else None
        if time is None or share is None:
            continue
        if op.startswith("attention"):
            others = ", ".join(f"{p} {_time(r):,.0f}" for p, r in found.items() if p != "ours" and _time(r))
            attention.append(
                f"| {op.removeprefix('attention ')} | {direction} | {shape} | {time:,.0f} | {share:.2f} | {others} |"
            )
        elif tokens == LARGE:
            ratios = [_time(found.get(p)) for p in PEERS]
            cells = [f"{r / time:.2f}" if r else "" for r in ratios]
            lines.append("| " + " | ".join([op, direction, shape, f"{time:,.1f}", f"{share:.2f}", *cells]) + " |")
    header = [
        "",
        "| case | direction | shapes | us | share of product | each backend, us |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + header + attention)


def table(path: Path) -> str:
    """The CSV as one line per case: the GPU time of each provider in microseconds, and our share of the ceiling.

    Where a process ran twice (A-B-A), the first run is shown.
    """
    rows = _rows(path)
    providers = list(dict.fromkeys(r["provider"] for r in rows))
    cases = {key: {p: r[0] for p, r in found.items()} for key, found in _cases(rows).items()}
    lines = ["op direction shape tokens | share | " + " ".join(f"{p}(gpu/host us)" for p in providers)]
    for key, found in cases.items():
        ours = found.get("ours", {})
        share = ours.get("share_of_copy") or ours.get("share_of_product") or ours.get("status", "-")
        cells = [f"{found[p]['gpu_us']}/{found[p]['host_us']}" if p in found else "-" for p in providers]
        lines.append(" ".join(key) + f" | {share} | " + " ".join(cells))
    return "\n".join(lines)


def plot(path: Path) -> Path:
    """Draws share of the ceiling over tokens, one panel per operation and direction (Llama-8B shapes), beside the
    CSV.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [
        r for r in _rows(path) if r["status"] == "ok" and r["shape"] == SHAPE and not r["op"].startswith("attention")
    ]
    panels = list(dict.fromkeys((r["op"], r["direction"]) for r in rows))
    columns = 4
    figure, axes = pyplot.subplots(
        -(-len(panels) // columns), columns, figsize=(16, 3 * -(-len(panels) // columns)), squeeze=False
    )
    for axis, panel in zip(axes.flat, panels, strict=False):
        for provider in dict.fromkeys(r["provider"] for r in rows):
            points = {
                int(r["tokens"]): float(r["share_of_copy"] or r["share_of_product"])
                for r in rows
                if (r["op"], r["direction"]) == panel and r["provider"] == provider
            }
            if points:
                axis.plot(sorted(points), [points[t] for t in sorted(points)], marker="o", label=provider)
        axis.axhline(0.85, color="grey", linewidth=0.8, linestyle="--")
        axis.set(title=" ".join(panel), xscale="log", ylim=(0, 1.1), xlabel="tokens", ylabel="share of copy or product")
        axis.legend(fontsize=7)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(f"{rows[0]['gpu']}, torch {rows[0]['torch']}, commit {rows[0]['commit']}, {SHAPE} shapes")
    figure.tight_layout()
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=90)
    return target

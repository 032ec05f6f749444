"""What is made of a results file: a text table and plots; the tables of the documentation are in ``_tables``."""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import median

SHAPE = "llama-8b"  # of the plots
PEERS = ("copy", "torch", "compile", "liger", "unsloth")
LOSSES = ("cross_entropy", "linear_cross_entropy", "linear_logprobs", "grpo_loss")

Rows = list[dict[str, str]]
Cases = dict[tuple[str, ...], dict[str, Rows]]
"""Rows by (op, direction, shape, tokens), then provider; a provider that ran twice (A-B-A) has two."""


def read(path: Path) -> Rows:
    """The rows of a results file."""
    with path.open() as file:
        return list(csv.DictReader(file))


def cases(path: Path) -> Cases:
    """The rows of a results file, in its order."""
    found: Cases = {}
    for row in read(path):
        key = (row["op"], row["direction"], row["shape"], row["tokens"])
        found.setdefault(key, {}).setdefault(row["provider"], []).append(row)
    return found


def time_of(rows: Rows | None) -> float | None:
    """Median GPU time over the runs of one provider, in microseconds."""
    times = [float(r["gpu_us"]) for r in rows or () if r["status"] == "ok"]
    return median(times) if times else None


def share_of(rows: Rows) -> float:
    """Median share of the copy speed, or of the matrix product's rate; 0 without a yardstick or a time."""
    shares = [float(r["share_of_copy"] or r["share_of_product"] or 0) for r in rows if r["status"] == "ok"]
    return median(shares) if shares else 0.0


def table(path: Path) -> str:
    """The CSV as one line per case: the GPU time of each provider in microseconds, and our share of the ceiling.

    Where a process ran twice (A-B-A), the first run is shown.
    """
    rows = read(path)
    providers = list(dict.fromkeys(r["provider"] for r in rows))
    firsts = {key: {p: r[0] for p, r in found.items()} for key, found in cases(path).items()}
    lines = ["op direction shape tokens | share | " + " ".join(f"{p}(gpu/host us)" for p in providers)]
    for key, found in firsts.items():
        ours = found.get("ours", {})
        share = ours.get("share_of_copy") or ours.get("share_of_product") or ours.get("status", "-")
        cells = [f"{found[p]['gpu_us']}/{found[p]['host_us']}" if p in found else "-" for p in providers]
        lines.append(" ".join(key) + f" | {share} | " + " ".join(cells))
    return "\n".join(lines)


def plots(path: Path) -> list[Path]:
    """Share of the ceiling over tokens beside the CSV: one picture of the elementwise and normalising operations
    (Llama-8B shapes), one of the losses (every model). Of a file with packed attention alone: its times.
    """
    if all(r["op"].startswith("packed") for r in read(path)):
        return [_bars(path.with_suffix(".png"), cases(path))]
    rows = [r for r in read(path) if r["status"] == "ok" and r["provider"] not in ("copy", "gemm")]
    small = [
        r
        for r in rows
        if r["shape"] == SHAPE and not r["op"].startswith(("attention", "packed", "steady", *LOSSES, "nf4"))
    ]
    losses = [r for r in rows if r["op"] in LOSSES]
    return [
        _panels(path.with_suffix(".png"), small, ("op", "direction")),
        _panels(path.with_name(f"{path.stem}-losses.png"), losses, ("op", "direction", "shape")),
    ]


def _bars(target: Path, found: Cases) -> Path:
    """One panel per direction and model, one group of bars per kind of documents: times over that of ours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({(key[1], key[2]) for key in found}, reverse=True)
    figure, axes = pyplot.subplots(2, -(-len(panels) // 2), figsize=(16, 7), squeeze=False)
    colors = {"ours": "C0", "flash": "C1", "flex": "C2", "fa4": "C3"}
    for axis, (direction, shape) in zip(axes.flat, panels, strict=True):
        mine = {
            key[0].removeprefix("packed_attention "): p for key, p in found.items() if key[1:3] == (direction, shape)
        }
        for place, providers in enumerate(mine.values()):
            ours = time_of(providers["ours"]) or 1.0
            for offset, (name, color) in enumerate(colors.items()):
                if (time := time_of(providers.get(name))) is not None:
                    axis.bar(place + 0.2 * (offset - 1.5), time / ours, 0.2, color=color)
        axis.set_xticks(range(len(mine)), [name.replace(" ", "\n", 1) for name in mine], fontsize=8)
        axis.set(title=f"{direction} {shape}", ylabel="time over ours")
        axis.axhline(1.0, color="grey", linewidth=0.8, linestyle="--")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=c) for c in colors.values()]
    figure.legend(handles=handles, labels=list(colors), loc="upper right", ncols=len(colors))
    row = next(iter(found.values()))["ours"][0]
    title = (
        f"Packed attention, 16,384 tokens; {row['gpu']}, torch {row['torch']}, commit {row['commit']}; documents below"
    )
    figure.suptitle(title, x=0.4)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(target, dpi=70)
    pyplot.close(figure)
    return target


def _panels(target: Path, rows: Rows, by: tuple[str, ...]) -> Path:
    """One panel per value of the columns ``by``, one line per provider."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys(tuple(r[name] for name in by) for r in rows))
    providers = [p for p in ("ours", *PEERS) if any(r["provider"] == p for r in rows)]
    columns = 4
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(16, 3 * lines), squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        mine = [r for r in rows if tuple(r[name] for name in by) == panel]
        for provider in providers:
            points: dict[int, Rows] = {}
            for row in mine:
                if row["provider"] == provider:
                    points.setdefault(int(row["tokens"]), []).append(row)
            if points:
                shares = [share_of(points[t]) for t in sorted(points)]
                color = f"C{('ours', *PEERS).index(provider)}"
                axis.plot(sorted(points), shares, marker="o", label=provider, color=color)
        axis.axhline(0.85, color="grey", linewidth=0.8, linestyle="--")
        unit = "copy" if mine[0]["share_of_copy"] else "product"
        axis.set(xscale="log", ylim=(0, 1.1), ylabel=f"share of {unit}")
        axis.set_title(" ".join(panel), fontsize=9)
        tokens = sorted({int(r["tokens"]) for r in mine})
        axis.set_xticks(tokens, [f"{t // 1024}K" for t in tokens])
        axis.minorticks_off()
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    colors = [f"C{('ours', *PEERS).index(p)}" for p in providers]
    handles = [pyplot.Line2D([], [], marker="o", color=c, label=p) for c, p in zip(colors, providers, strict=True)]
    figure.legend(handles=handles, loc="upper right", ncols=len(providers))
    figure.suptitle(f"{rows[0]['gpu']}, torch {rows[0]['torch']}, commit {rows[0]['commit']}; tokens below", x=0.3)
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    figure.savefig(target, dpi=70)
    pyplot.close(figure)
    return target

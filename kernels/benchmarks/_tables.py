"""The tables of docs/reference/kernels.md and kernels-losses.md, made from the results file that the pages name.

A page has ``<!-- table NAME -->`` and ``<!-- end -->``; ``fill`` puts the table between them. The pages are checked
against the file by tests/kernels/test_results_page.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from _report import LOSSES, PEERS, Cases, cases, share_of, time_of

PAGES = [Path(__file__).parents[2] / "docs" / "reference" / name for name in ("kernels.md", "kernels-losses.md")]
LARGE = "16384"
MUST = 0.85
ATTENTION = ("attention", "packed_attention")
RIVALS = ("liger", "unsloth")
MARKED = re.compile(r"(<!-- table (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def _table(head: list[str], rows: Iterator[list[str]] | list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _us(time: float | None) -> str:
    if time is None:
        return ""
    return f"{time:,.1f}" if time < 1000 else f"{time:,.0f}"


def _is_own_table(op: str) -> bool:
    return op in LOSSES or op.startswith(ATTENTION) or op.startswith(("nf4", "fp8", "adamw", "steady"))


def memory_bound(found: Cases) -> str:
    """Elementwise and normalising operations at 16,384 tokens, with every other provider's time over ours."""
    rows = []
    for (op, direction, shape, tokens), providers in found.items():
        ours = time_of(providers.get("ours"))
        if tokens != LARGE or ours is None or _is_own_table(op):
            continue
        others = [time_of(providers.get(p)) for p in PEERS]
        cells = [f"{t / ours:.2f}" if t else "" for t in others]
        rows.append([op, direction, shape, _us(ours), f"{share_of(providers['ours']):.2f}", *cells])
    return _table(
        ["operation", "direction", "shapes", "us", "share of copy", *(f"{p}, times ours" for p in PEERS)], rows
    )


def attention(found: Cases) -> str:
    """Every attention case with the time of each backend."""
    rows = []
    for (op, direction, shape, _), providers in found.items():
        ours = time_of(providers.get("ours"))
        if ours is None or not op.startswith(ATTENTION):
            continue
        each = ", ".join(f"{p} {time_of(r):,.0f}" for p, r in providers.items() if p != "ours" and time_of(r))
        share = f"{share_of(providers['ours']):.2f}" if share_of(providers["ours"]) else ""
        rows.append([op.removeprefix("attention "), direction, shape, f"{ours:,.0f}", share, each])
    return _table(["case", "direction", "shapes", "us", "share of product", "each backend, us"], rows)


def steady(found: Cases) -> str:
    """The share of the copy speed of operations that follow each other, beside that of copies that do."""
    rows = []
    for (op, direction, shape, _), providers in found.items():
        if op.startswith("steady "):
            ours, copies = (providers[name] for name in ("ours", "copies"))
            cold = found[op.removeprefix("steady "), direction, shape, LARGE]["ours"]
            each = _us((time_of(ours) or 0) / 16)
            shares = (f"{share_of(rows_of):.2f}" for rows_of in (ours, copies, cold))
            rows.append([op.removeprefix("steady "), direction, shape, each, *shares])
    head = ["operation", "direction", "shapes", "us each", "share of copy", "share of copies", "share when cold"]
    return _table(head, rows)


def _one_operation(op: str) -> Callable[[Cases], str]:
    def make(found: Cases) -> str:
        mine = {key: providers for key, providers in found.items() if key[0] == op and "ours" in providers}
        names = list(dict.fromkeys(p for providers in mine.values() for p in providers if p != "copy"))
        extra = any(rows[0]["extra_mib"] for providers in mine.values() for rows in providers.values())
        head = ["what", "model", "tokens", *names, "host, ours", "share"] + (["extra MiB: " + ", ".join(names)] * extra)
        rows = []
        for (_, direction, shape, tokens), providers in mine.items():
            if providers["ours"][0]["status"] != "ok":
                continue
            times = [_us(time_of(providers.get(p))) or ("failed" if p in providers else "") for p in names]
            host = _us(float(providers["ours"][0]["host_us"]))
            row = [direction, shape, tokens, *times, host, f"{share_of(providers['ours']):.2f}"]
            if extra:
                mib = [providers[p][0]["extra_mib"] if p in providers else "" for p in names]
                row.append(", ".join(f"{float(m):,.0f}" if m else "-" for m in mib))
            rows.append(row)
        return _table(head, rows)

    return make


class Comparison(NamedTuple):
    """One case of ours beside one peer's: ``ratio`` is the peer's time over ours."""

    ratio: float
    ours: float
    peer: str
    case: tuple[str, ...]


def comparisons(found: Cases) -> list[Comparison]:
    """Every case that Liger or Unsloth ran too, slowest of ours first."""
    made = []
    for case, providers in found.items():
        ours = time_of(providers.get("ours"))
        for peer in RIVALS:
            theirs = time_of(providers.get(peer))
            if ours and theirs:
                made.append(Comparison(theirs / ours, ours, peer, case))
    return sorted(made)


def slower(found: Cases) -> str:
    """How often ours is slower than a peer, and each case where it is by more than 1%."""
    made = comparisons(found)
    worse = [c for c in made if c.ratio < 1 / 1.01]
    text = f"{len(made)} comparisons; ours is faster or within 1% in {len(made) - len(worse)}.\n\n"
    head = ["operation", "direction", "shapes", "tokens", "peer", "ours, us", "slower by, us", "slower by"]
    rows = [
        [*c.case, c.peer, _us(c.ours), f"{c.ours * (1 - c.ratio):.2f}", f"{100 * (1 / c.ratio - 1):.1f}%"]
        for c in worse
    ]
    return text + _table(head, rows)


def below(found: Cases) -> str:
    """Memory-bound cases of ours at 16,384 tokens below 85% of the large copy, with the copy of the same size."""
    rows = []
    for (op, direction, shape, tokens), providers in found.items():
        ours = time_of(providers.get("ours"))
        if ours is None or not providers["ours"][0]["share_of_copy"] or op.startswith("steady"):
            continue
        large = tokens == LARGE or op.startswith(("nf4", "adamw"))
        share, copy = share_of(providers["ours"]), time_of(providers.get("copy"))
        if large and share < MUST:
            own_size = f"{copy / ours:.2f}" if copy else ""
            rows.append([op, direction, shape, tokens, _us(ours), f"{share:.3f}", f"{MUST - share:.3f}", own_size])
    head = [
        "operation",
        "direction",
        "shapes",
        "tokens",
        "us",
        "share of copy",
        "missing",
        "share of a copy of its size",
    ]
    return _table(head, rows)


class Target(NamedTuple):
    """One line of the targets: the share of the copy speed that a case must reach."""

    text: str
    case: tuple[str, ...]


LINEAR = ("linear_cross_entropy", "loss+gradient", "llama-8b", LARGE)
SHARES = (
    Target("cross_entropy forward, 16K x 128,256, share of copy", ("cross_entropy", "forward", "llama-8b", LARGE)),
    Target("cross_entropy backward", ("cross_entropy", "backward", "llama-8b", LARGE)),
    Target("cross_entropy, loss + gradient in place", ("cross_entropy", "loss+gradient", "llama-8b", LARGE)),
    Target("NF4 dequantise, a Llama-8B layer in one launch", ("nf4_dequantize", "one launch", "llama-8b", "7")),
    Target("the same, one launch per matrix (seven)", ("nf4_dequantize", "forward", "llama-8b", "7")),
    Target("adamw, 32-bit states", ("adamw", "32-bit step", "flat", "104")),
    Target("adamw, 8-bit states", ("adamw", "8-bit step", "flat", "104")),
)


def targets(found: Cases) -> str:
    """The stated targets of the losses, quantised weights and the optimizer, beside what was measured."""

    def line(text: str, must: str, value: str, missed_by: float, form: str) -> list[str]:
        return [text, must, value, f"missed by {missed_by:{form}}" if missed_by > 0 else "met"]

    linear = found[LINEAR]
    ratio = (time_of(linear["ours"]) or 0) / (time_of(linear["gemm"]) or 1)
    extra = max(float(row["extra_mib"]) for row in linear["ours"])
    rows = [
        line(
            "linear_cross_entropy, 16K x 128,256 x 4,096, over its GEMMs", "1.15x", f"{ratio:.3f}x", ratio - 1.15, ".3f"
        ),
        line("the same, extra memory (gradient included)", "512 MiB", f"{extra:.0f} MiB", extra - 512, ".0f"),
    ]
    for text, case in SHARES:
        share = share_of(found[case]["ours"])
        rows.append(line(text, str(MUST), f"{share:.2f}", MUST - share, ".2f"))
    worst = next(c for c in comparisons(found) if _is_own_table(c.case[0]))
    named = f"{worst.ratio:.3f}x ({worst.peer}, {' '.join(worst.case)})"
    rows.append(line("least time of Liger or Unsloth over ours", "1x", named, 1 - worst.ratio, ".3f"))
    return _table(["target", "must", "measured", ""], rows)


TABLES: dict[str, Callable[[Cases], str]] = {
    "memory_bound": memory_bound,
    "attention": attention,
    "packed": attention,
    "steady": steady,
    "slower": slower,
    "below": below,
    "targets": targets,
    **{op: _one_operation(op) for op in (*LOSSES, "nf4_dequantize", "fp8", "adamw")},
}


SIDE_FILES = {"packed": "packed"}
"""Tables made of another file than the page's own: FILE-NAME.csv beside FILE.csv."""


def fill(page: str, results: Path) -> str:
    """The page with every marked table made anew; KeyError for a name that is not in TABLES."""
    found = cases(results)

    def made(match: re.Match[str]) -> str:
        side = SIDE_FILES.get(match[2])
        rows = cases(results.with_name(f"{results.stem}-{side}.csv")) if side else found
        return f"{match[1]}{TABLES[match[2]](rows)}\n{match[4]}"

    return MARKED.sub(made, page)

"""STYLE.md rule 2: the files of one operation carry one name in ops, reference, tests and benchmarks."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels" / "dropforge_kernels"


# Measured beside the operation it groups, in the same table.
BENCHMARKED_WITH = {"nf4_group": "nf4_dequantize"}


def names(folder: Path, prefix: str = "") -> set[str]:
    return {p.stem.removeprefix(prefix) for p in folder.glob(f"{prefix}*.py") if not p.stem.startswith("_")}


def test_every_operation_has_its_four_files():
    ops = names(KERNELS / "ops")
    assert ops, "no operation found"
    missing = {
        "reference": ops - names(KERNELS / "reference"),
        "tests": ops - names(ROOT / "tests" / "kernels", "test_"),
        "benchmarks": {BENCHMARKED_WITH.get(op, op) for op in ops} - names(ROOT / "kernels" / "benchmarks"),
    }
    assert {kind: sorted(found) for kind, found in missing.items() if found} == {}


def test_every_reference_belongs_to_an_operation():
    assert names(KERNELS / "reference") - names(KERNELS / "ops") == set()

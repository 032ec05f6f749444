"""Every GGUF type this release offers, on a random and on a trained model: the table of docs/guides/exports.md.

python -m pytest tests/export/test_every_type.py -m slow -s
"""

from __future__ import annotations

import pytest
from dropforge.export import export_one
from dropforge.export.stage import Stage
from dropforge.export.tolerances import bounds
from dropforge.export_kinds import GGUF_NEEDS_IMATRIX, GGUF_TYPES
from dropforge.paths import ResultFolder
from export_harness import memorise

TYPES = [name for name in GGUF_TYPES if name not in GGUF_NEEDS_IMATRIX]


def table(bench, tmp_path, **changes) -> dict[str, dict]:
    result = ResultFolder(tmp_path / "result")
    result.path.mkdir()
    stage = Stage(bench.request((), result=result, work=tmp_path / "work", **changes), log=lambda text: None)
    rows = {}
    for name in TYPES:
        report = export_one(stage, f"gguf:{name}")
        assert report.ok, f"{name}: {report.problem}"
        rows[name] = report.checks
        close, limit = report.checks["logits"], bounds(name)
        print(
            f"{name:8} error {close['relative_error']:.4f} (allowed {limit.relative_error:g})  "
            f"KL {close['mean_kl']:.5f} (allowed {limit.mean_kl:g})  same first token {close['top1']:.2f}  "
            f"greedy {report.checks['greedy_equal']}/{report.checks['greedy_prompts']}  "
            f"weights {report.checks['worst_weight_error']:.4f}  {report.bytes / 1e6:.2f} MB"
        )
    return rows


def check_order(rows) -> None:
    """More bits, less error: if this breaks, a type is not what its name says."""
    errors = [rows[name]["logits"]["relative_error"] for name in ("f32", "f16", "q8_0", "q6_k", "q4_k_m", "q2_k")]
    assert errors == sorted(errors)


@pytest.mark.slow
def test_random_models(bench, llama_cpp, tmp_path):
    print(f"\n{bench.name}, random weights and a random adapter")
    check_order(table(bench, tmp_path))


@pytest.mark.slow
def test_a_trained_model(bench, llama_cpp, tmp_path):
    print(f"\n{bench.name}, every weight trained until a few answers are known by heart")
    memorise(bench, tmp_path / "full")
    check_order(table(bench, tmp_path, adapter=None, full=tmp_path / "full"))

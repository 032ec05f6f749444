"""Every kind of quantised export, on random and on trained models: docs/reference/export-errors.md is made from this.

python -m pytest tests/export/test_every_type.py -m slow -s
"""

from __future__ import annotations

import pytest
from dropforge.export import export_one
from dropforge.export.stage import Stage
from dropforge.export_kinds import GGUF_TYPES
from dropforge.paths import ResultFolder
from export_harness import fact_rows, measured, memorise

KINDS = (*(f"gguf:{name}" for name in GGUF_TYPES), "fp8", "fp8:block", "merged_4bit")
# More bits, less error: if this breaks, a type is not what its name says.
FALLING = [f"gguf:{name}" for name in ("f32", "f16", "q8_0", "q6_k", "q4_k_m", "q2_k")]


def check_every_kind(bench, tmp_path, record_property, *, weights, **changes) -> None:
    result = ResultFolder(tmp_path / "result")
    result.path.mkdir()
    request = bench.request((), result=result, work=tmp_path / "work", samples=fact_rows(bench), **changes)
    stage = Stage(request, log=lambda text: None)
    errors = {}
    for kind in KINDS:
        report = export_one(stage, kind)
        assert report.ok, f"{kind}: {report.problem}"
        record_property("measured", measured(report, model=bench.name, weights=weights))
        errors[kind] = report.checks["logits"]["relative_error"]
    in_order = [errors[kind] for kind in FALLING]
    assert in_order == sorted(in_order)


@pytest.mark.slow
def test_random_models(bench, llama_cpp, tmp_path, record_property):
    check_every_kind(bench, tmp_path, record_property, weights="random")


@pytest.mark.slow
def test_a_trained_model(bench, llama_cpp, tmp_path, record_property):
    memorise(bench, tmp_path / "full")
    check_every_kind(bench, tmp_path, record_property, weights="trained", adapter=None, full=tmp_path / "full")

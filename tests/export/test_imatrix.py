"""The importance matrix: its sums, its names, and a type that llama.cpp makes only with one."""

from __future__ import annotations

import pytest
from dropforge.errors import ExportError
from dropforge.export.export_gguf import export_gguf
from dropforge.export.imatrix import write_imatrix
from dropforge.export.reference import merged_model
from dropforge.export.samples import TrainingRow
from dropforge.export.stage import Stage

ROWS = (TrainingRow(ids=tuple(range(5, 60)), prompt=4), TrainingRow(ids=tuple(range(90, 120)), prompt=9))


@pytest.fixture(scope="module")
def stage(benches, llama_cpp, tmp_path_factory) -> Stage:
    bench = benches["tiny-qwen3"]
    return Stage(bench.request((), work=tmp_path_factory.mktemp("imatrix"), samples=ROWS), log=bench.log.append)


def test_sums_are_those_of_the_inputs(stage):
    import gguf
    import torch

    path, tokens = stage.imatrix
    assert tokens == 55 + 30
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    assert len(tensors) == 2 * 14, "seven matrices in each of two layers; the tied head has no tensor of its own"
    with merged_model(stage.merged.folder) as (model, _), torch.no_grad():
        first = model.model.layers[0]
        wanted = sum(
            first.input_layernorm(model.model.embed_tokens(torch.tensor([row.ids]))).pow(2).sum((0, 1)) for row in ROWS
        )
    for name in ("attn_q", "attn_k", "attn_v"):
        found = torch.tensor(tensors[f"blk.0.{name}.weight.in_sum2"]).flatten()
        assert torch.allclose(found, wanted, rtol=1e-4)
        assert tensors[f"blk.0.{name}.weight.counts"].item() == tokens


def test_a_type_that_needs_it_is_made_and_verified(stage, tmp_path):
    checks = export_gguf(stage, tmp_path, "iq2_xxs").checks
    assert checks["imatrix_tokens"] == 85
    assert checks["tensors_by_type"]["IQ2_XXS"] >= 8
    assert 0.2 < checks["worst_weight_error"] < 0.5


def test_without_training_rows_it_is_refused(tmp_path):
    with pytest.raises(ExportError) as error:
        write_imatrix(tmp_path, (), gguf=tmp_path / "x", target=tmp_path / "y")
    assert error.value.code == "export-imatrix"

"""GGUF files in parts, the mixed type q2_k_l, FP8 with fixed input scales: asked for in a spec, made and verified."""

from __future__ import annotations

import pytest
from dropforge.chat import choose_gguf
from dropforge.errors import ExportError
from dropforge.export import export_one
from dropforge.export.samples import TrainingRow
from dropforge.export.stage import Stage
from dropforge.export_kinds import check_export, normalise_exports, split_detail
from dropforge.llama_cpp.split import compare_parts, split_gguf
from dropforge.paths import ResultFolder


def stage_of(bench, tmp_path, **changes) -> Stage:
    """A stage that shares the bench's merged folder and 16-bit GGUF."""
    result = ResultFolder(tmp_path / "result")
    result.path.mkdir()
    stage = Stage(bench.request((), result=result, work=tmp_path / "work", **changes), log=bench.log.append)
    stage._results = {"merged": bench.stage.merged, "base gguf": bench.stage.base_gguf}
    return stage


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("gguf:Q4_K:2GB", (("gguf:q4_k_m:2gb",), ("q4_k_m", 2 * 10**9))),
        ("gguf:f16,q8_0:500MB", (("gguf:f16", "gguf:q8_0:500mb"), ("f16", 0))),
    ],
)
def test_how_parts_are_asked_for(entry, expected):
    entries = normalise_exports([entry])
    assert (entries, split_detail(check_export(entries[0])[5:])) == expected


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("gguf:q4_km", "did you mean 'q4_k_m'"), ("ggfu:q8_0", "did you mean 'gguf'"), ("gguf:q8_0:2", "size of a part"),
        ("gguf:q8_0:", "size of a part"), ("gguf:zzz", "unknown GGUF type 'zzz'; write"), ("fp8:blok", "fp8:block"),
    ],
)  # fmt: skip
def test_unknown_words_name_the_nearest(entry, why):
    with pytest.raises(ValueError, match=why):
        check_export(entry)


def test_parts_are_made_loaded_and_answer(llama, llama_cpp, tmp_path):
    stage = stage_of(llama, tmp_path)
    report = export_one(stage, "gguf:q8_0:1mb")
    assert report.ok, report.problem
    folder = stage.request.result.path / report.path
    names = sorted(path.name for path in folder.iterdir())
    count = len(names)
    assert report.path == "gguf/test-model-Q8_0"
    assert report.checks["parts"] == count >= 2
    assert names == [f"test-model-Q8_0-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    assert report.checks["logits"]["relative_error"] < 0.05 and report.checks["conversations_equal"] == 7
    assert report.bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert choose_gguf(stage.request.result.path).name == names[0]


def test_a_file_that_fits_stays_whole(llama, llama_cpp, tmp_path):
    report = export_one(stage_of(llama, tmp_path), "gguf:f16:1gb")
    assert report.ok and report.path == "gguf/test-model-F16.gguf" and "parts" not in report.checks


def test_a_damaged_part_is_noticed(llama, llama_cpp, tmp_path):
    source = llama.stage.base_gguf.path
    parts = split_gguf(source, tmp_path, stem="x", largest=10**6)
    assert compare_parts(source, parts) > 10
    data = bytearray(parts[1].read_bytes())
    data[-100] ^= 1
    parts[1].write_bytes(data)
    with pytest.raises(ExportError, match="parts") as error:
        compare_parts(source, parts)
    assert error.value.code == "gguf-split"
    with pytest.raises(ExportError, match="parts"):
        compare_parts(source, parts[:1])


def test_q2_k_l_keeps_embeddings_and_head_in_q8_0(llama, llama_cpp, tmp_path):
    report = export_one(stage_of(llama, tmp_path), "gguf:q2_k_l")
    assert report.ok, report.problem
    assert report.path == "gguf/test-model-Q2_K_L.gguf"
    assert report.checks["tensors_by_type"]["Q8_0"] >= 2


ROWS = tuple(TrainingRow(ids=tuple(range(start, start + 40)), prompt=4) for start in range(5, 200, 20))


def test_fixed_input_scales(llama, tmp_path):
    from dropforge.export.safetensors_stream import index_folder

    stage = stage_of(llama, tmp_path, samples=ROWS)
    report = export_one(stage, "fp8:static")
    assert report.ok, report.problem
    assert report.path == "fp8-static"
    assert report.checks["calibration_tokens"] == 400
    info = index_folder(stage.request.result.fp8_static)["model.layers.0.mlp.up_proj.input_scale"]
    assert (info.dtype, info.shape) == ("F32", (1,))
    assert report.checks["logits"]["relative_error"] < 0.4


def test_fixed_scales_need_data(llama, tmp_path):
    report = export_one(stage_of(llama, tmp_path), "fp8:static")
    assert report.problem.code == "export-calibration"

"""Exports that cannot come out are refused before the training, and a disk that fills up loses nothing made before."""

from __future__ import annotations

import errno

import pytest
from dropforge.errors import ExportError
from dropforge.export import export_one
from dropforge.export.precheck import precheck
from dropforge.export.stage import Stage
from dropforge.llama_cpp.architectures import architectures
from dropforge.paths import ResultFolder
from export_harness import copy, edit_json


def test_the_tables_of_the_converter(llama_cpp):
    known = architectures(llama_cpp)
    assert {"LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM", "Phi3ForCausalLM"} <= known.text
    assert {"Gemma3ForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"} <= known.projector
    assert len(known.text) > 200 and len(known.projector) > 40


@pytest.mark.parametrize(
    ("kinds", "changes", "options", "code", "why"),
    [
        (("gguf:q8_0",), {"architectures": ["NobodysForCausalLM"]}, {}, "export-unsupported", "none of them"),
        (("gguf:f16",), {"architectures": ["Gemma3nForConditionalGeneration"], "audio_config": {}}, {}, "export-unsupported", "also reads sounds"),
        (("mmproj",), {"architectures": ["ArceeForCausalLM"], "model_type": "gemma3", "vision_config": {}}, {}, "export-unsupported", "does not know a projector"),
        (("merged",), {"quantization_config": {"quant_method": "gptq"}}, {}, "export-base-quantized", "this format is not read"),
        (("lora_gguf",), {}, {"use_dora": True}, "export-lora-gguf", "DoRA"),
        (("lora_gguf",), {}, {"modules_to_save": ("lm_head",)}, "export-lora-gguf", "lm_head"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_first(llama, llama_cpp, tmp_path, kinds, changes, options, code, why):
    base = copy(llama.base, tmp_path / "base")
    edit_json(base / "config.json", **changes)
    with pytest.raises(ExportError) as error:
        precheck(kinds, base=base, **options)
    assert error.value.code == code
    assert why in error.value.problems[0].why


def test_shapes_that_no_block_fits(llama, tmp_path, monkeypatch):
    from dropforge.export import precheck as module

    monkeypatch.setattr(module, "NF4_BLOCK", 512)
    with pytest.raises(ExportError) as error:
        precheck(("merged_4bit",), base=llama.base)
    assert error.value.code == "export-quantize-unsupported"


def test_missing_base_weights(llama, tmp_path):
    base = copy(llama.base, tmp_path / "base")
    (base / "model.safetensors").unlink()
    with pytest.raises(ExportError) as error:
        precheck(("merged",), base=base)
    assert error.value.code == "export-weights-missing"
    precheck(("adapter",), base=base)


def test_everything_that_works_passes(llama, llama_cpp):
    precheck(
        ("adapter", "merged", "gguf:q8_0", "fp8", "fp8:block", "merged_4bit", "lora_gguf", "ollama"), base=llama.base
    )


@pytest.fixture
def stage(llama, llama_cpp, tmp_path):
    result = ResultFolder(tmp_path / "result")
    result.path.mkdir()
    stage = Stage(llama.request((), result=result, work=tmp_path / "work"), log=llama.log.append)
    stage._results = {"merged": llama.stage.merged, "base gguf": llama.stage.base_gguf}
    return stage


def test_a_full_disk_halfway_loses_nothing(stage, monkeypatch):
    """The sixth write of the FP8 folder finds no space; what was made before stays, and a second try needs only FP8."""
    from dropforge.export import export_fp8 as module

    assert export_one(stage, "merged").ok
    quantize, calls = module.quantize, []

    def full(weight, **options):
        calls.append(1)
        if len(calls) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return quantize(weight, **options)

    monkeypatch.setattr(module, "quantize", full)
    report = export_one(stage, "fp8")
    assert (report.ok, report.problem.code) == (False, "export-io")
    assert "space" in report.problem.fix
    assert sorted(path.name for path in stage.request.result.path.iterdir()) == ["merged"], "no half folder"
    assert export_one(stage, "fp8").ok
    assert sorted(path.name for path in stage.request.result.path.iterdir()) == ["fp8", "merged"]


def test_too_little_space_is_said_with_numbers(stage, monkeypatch):
    from dropforge.export import disk as module

    monkeypatch.setattr(module, "free_bytes", lambda path: 10 * 2**20)
    report = export_one(stage, "fp8")
    assert report.problem.code == "export-disk"
    assert "GiB needed, 0.01 GiB free" in report.problem.what
    assert list(stage.request.result.path.iterdir()) == []

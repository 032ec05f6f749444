"""All exports of one training, through the public entry: made, verified, placed; and what happens when one fails."""

from __future__ import annotations

import json

import pytest
from dropforge.export.modelfile import read_modelfile

KINDS = ["adapter", "merged", "gguf:f16", "gguf:bf16", "gguf:q8_0", "gguf:q4_k_m", "ollama"]


@pytest.fixture
def made(bench, exports):
    return exports[bench.name]


def test_every_export_is_made_and_verified(bench, made):
    assert list(made) == KINDS
    assert {kind: str(report.problem) for kind, report in made.items() if not report.ok} == {}
    for report in made.values():
        assert (bench.result.path / report.path).exists()
        assert report.bytes > 0
    json.dumps([report.as_dict() for report in made.values()], allow_nan=False)


def test_nothing_else_is_left_in_the_result(bench, made):
    names = sorted(path.name for path in bench.result.path.iterdir())
    assert names == ["Modelfile", "adapter", "gguf", "merged"]
    assert sorted(path.name for path in bench.result.gguf.iterdir()) == [
        f"test-model-{name}.gguf" for name in ("BF16", "F16", "Q4_K_M", "Q8_0")
    ]


def test_the_measured_numbers_are_reported(made):
    merged = made["merged"].checks
    assert merged["modules_merged"] == merged["modules_in_adapter"] >= 7, "seven matrices in each layer"
    assert merged["tensors_compared"] == merged["tensors"]
    assert 0 < merged["logits"]["relative_error"] < 0.002
    errors = [made[kind].checks["logits"]["relative_error"] for kind in KINDS[2:6]]
    assert errors[0] < 0.002 < errors[1] < 0.012 < errors[2] < 0.04 < errors[3] < 0.35
    for kind in KINDS[2:6]:
        assert made[kind].checks["conversations_equal"] == 7
        assert made[kind].checks["texts_equal"] > 50
        assert made[kind].checks["logits"]["positions"] >= 16
    assert made["gguf:f16"].checks["greedy_equal"] == 4


def test_no_path_of_this_machine_is_in_the_exports(bench, made):
    here = str(bench.folder)
    texts = [p for p in bench.result.path.rglob("*") if p.suffix in {".json", ".jinja", ".md"} or p.name == "Modelfile"]
    assert len(texts) > 5
    assert [path.name for path in texts if here in path.read_text(encoding="utf-8")] == []
    config = json.loads((bench.result.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"builtin:{bench.name}"


def test_a_gguf_says_where_it_comes_from(bench, made):
    import gguf

    fields = gguf.GGUFReader(bench.result.path / made["gguf:q4_k_m"].path).fields
    said = {name: fields[f"general.{name}"].contents() for name in ("name", "license", "base_model.0.name")}
    assert said == {"name": "Test model", "license": "apache-2.0", "base_model.0.name": f"builtin:{bench.name}"}
    assert fields["general.base_model.count"].contents() == 1
    assert fields["tokenizer.chat_template"].contents().strip()


def test_byte_level_pre_tokenizer_is_named_by_definition(exports):
    checks = exports["tiny-qwen3"]["gguf:f16"].checks
    assert (checks["pre_tokenizer"], checks["pre_tokenizer_by"]) == ("qwen2", "definition")


def test_modelfile_names_the_gguf_and_stops(bench, made):
    found = read_modelfile(bench.result.modelfile.read_text())
    assert found.gguf == "./gguf/test-model-Q4_K_M.gguf"
    assert found.system == "Be brief."
    assert found.stops == ("<|im_end|>",)
    assert found.template is not None and "{{ .Content }}" in found.template
    assert made["ollama"].checks["conversations_equal"] == 7


def test_a_failing_export_leaves_the_others_alone(qwen, llama_cpp, tmp_path):
    """iq1_s needs training data for its importance matrix; the adapter and a later type still come out."""
    result = type(qwen.result)(tmp_path / "result")
    kinds = ("gguf:iq1_s", "adapter", "gguf:q8_0")
    reports = {r.kind: r for r in qwen.export(kinds, result=result, work=tmp_path / "work")}
    assert not reports["gguf:iq1_s"].ok
    assert reports["gguf:iq1_s"].problem.code == "export-imatrix"
    assert reports["adapter"].ok and reports["gguf:q8_0"].ok
    assert sorted(path.name for path in result.path.iterdir()) == ["adapter", "gguf"]
    assert [path.name for path in result.gguf.iterdir()] == ["test-model-Q8_0.gguf"]
    again = qwen.export(("ollama",), result=result, work=tmp_path / "work2")
    assert [(r.kind, r.ok) for r in again] == [("ollama", True)], "the existing GGUF is used, not made again"


def test_ollama_alone_brings_its_gguf(memorised):
    result, reports = memorised
    assert [(r.kind, r.ok) for r in reports] == [("merged", True), ("gguf:q8_0", True), ("ollama", True)]
    assert reports[2].checks["left_out"] == ["SYSTEM is left out: it holds three double quotes"]
    assert read_modelfile(result.modelfile.read_text()).system is None
    assert read_modelfile(result.modelfile.read_text()).gguf == "./gguf/test-model-Q8_0.gguf"


def test_full_training_has_no_adapter(memorised, benches, tmp_path):
    bench, (result, _) = benches["tiny-llama"], memorised
    request = {"adapter": None, "full": result.merged, "result": type(result)(tmp_path / "r"), "work": tmp_path / "w"}
    (report,) = bench.export(("adapter",), **request)
    assert report.problem.code == "export-no-adapter"


def test_a_broken_adapter_fails_everything_made_from_it(llama, llama_cpp, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text((llama.adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"not weights")
    result = type(llama.result)(tmp_path / "result")
    reports = llama.export(
        ("adapter", "merged", "gguf:q8_0", "ollama"),
        adapter=tmp_path / "adapter",
        result=result,
        work=tmp_path / "work",
    )
    assert [(r.kind, r.ok) for r in reports] == [(k, False) for k in ("adapter", "merged", "gguf:q8_0", "ollama")]
    assert reports[0].problem.code == "export-adapter-broken"
    assert reports[1].problem == reports[2].problem
    assert list(result.path.iterdir()) == []

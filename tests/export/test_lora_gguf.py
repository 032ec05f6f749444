"""GGUF adapters: applied by llama-server to the base model, they must make the trained model."""

from __future__ import annotations

import pytest
from dropforge.errors import ExportError
from dropforge.export import export_one
from dropforge.export.adapter_file import read_adapter
from dropforge.export.export_lora_gguf import export_lora_gguf, refuse, write_scaled
from dropforge.export.stage import Stage
from dropforge.paths import ResultFolder
from export_harness import copy, edit_gguf, edit_json, make_adapter

KINDS = {
    "plain": {},
    "rslora with patterns": {
        "use_rslora": True, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.1.mlp.up_proj": 40},
    },
}  # fmt: skip


def stage_of(bench, tmp_path, **changes) -> Stage:
    result = ResultFolder(tmp_path / "result")
    result.path.mkdir()
    request = bench.request(("lora_gguf",), result=result, work=tmp_path / "work", **changes)
    return Stage(request, log=bench.log.append)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tiny-llama", "rslora with patterns"),
        pytest.param("tiny-qwen3", "plain", marks=pytest.mark.slow),
    ],
)
def test_base_and_adapter_make_the_trained_model(benches, llama_cpp, name, kind, tmp_path):
    bench = benches[name]
    make_adapter(bench.base, tmp_path / "adapter", **KINDS[kind])
    report = export_one(stage_of(bench, tmp_path, adapter=tmp_path / "adapter"), "lora_gguf")
    assert report.ok, report.problem
    assert report.path == "lora_gguf/test-model-lora-F32.gguf"
    assert report.checks["logits"]["relative_error"] < 0.003
    assert report.checks["greedy_equal"] == 4
    assert not (tmp_path / "result" / "gguf").exists(), "an adapter is no model to talk to"


@pytest.mark.slow  # test_gguf_sabotage.py shows the same check refuse in less time
def test_a_changed_adapter_does_not_pass(llama, llama_cpp, tmp_path, monkeypatch):
    """The converter's file is damaged before the check: its one scale is a tenth too large."""
    from dropforge.export import export_lora_gguf as module

    convert = module.convert_lora

    def damaged(adapter, target, **options):
        convert(adapter, target, **options)
        alpha = edit_gguf(target).fields["adapter.lora.alpha"]
        alpha.parts[alpha.data[0]][0] *= 1.1

    monkeypatch.setattr(module, "convert_lora", damaged)
    with pytest.raises(ExportError) as error:
        export_lora_gguf(llama.stage, tmp_path)
    assert error.value.code == "gguf-logits"


def test_plain_lora_keeps_its_numbers(llama, tmp_path):
    adapter = read_adapter(llama.adapter)
    write_scaled(llama.adapter, adapter, tmp_path / "scaled")
    again = read_adapter(tmp_path / "scaled")
    assert set(again.changes) == set(adapter.changes)
    for module, change in adapter.changes.items():
        for mine, other in zip(again.changes[module].low_rank[:2], change.low_rank[:2], strict=True):
            assert mine.equal(other.float())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head trained in full"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embedding"),
    ],
)
def test_more_than_low_rank_pairs_is_refused(llama, config, why, tmp_path):
    make_adapter(llama.base, tmp_path / "adapter", **config)
    with pytest.raises(ExportError) as error:
        refuse(read_adapter(tmp_path / "adapter"))
    assert error.value.code == "export-lora-gguf"
    assert why in error.value.problems[0].why


def test_transposed_bases_are_refused(llama, tmp_path):
    adapter = copy(llama.adapter, tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", fan_in_fan_out=True)
    with pytest.raises(ExportError, match="GGUF of its own"):
        refuse(read_adapter(adapter))

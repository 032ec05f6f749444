"""Merging: every kind of LoRA equals PEFT's own arithmetic, and what cannot be merged whole is refused."""

from __future__ import annotations

import json

import pytest
from dropforge.errors import ExportError
from dropforge.export.merge import merge
from dropforge.export.safetensors_stream import index_folder, read_tensor, write_file
from dropforge.export.verify_merged import verify_merged
from export_harness import change_tensor, copy, edit_json, make_adapter

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [300, 301, 302]]

KINDS = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora and rslora": {"use_dora": True, "use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
    "head trained in full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding trained in full": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "lora on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
}


def merged(bench, adapter, target):
    target.mkdir()
    report = merge(bench.base, adapter, target)
    checked = verify_merged(target, base=bench.base, adapter=adapter, full=None, prompts=PROMPTS, stop=None)
    return report, checked.checks


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's hints about tied embeddings, while the adapter is made
@pytest.mark.parametrize("kind", KINDS)
def test_equals_peft(bench, kind, tmp_path):
    make_adapter(bench.base, tmp_path / "adapter", **KINDS[kind])
    report, checks = merged(bench, tmp_path / "adapter", tmp_path / "merged")
    assert report.modules_merged == report.modules_in_adapter > 0
    assert report.dtype == "float16"
    assert checks["tensors"] == report.tensors
    # PEFT's own merge is wrong for a head tied to an embedding under LoRA; there the logits decide.
    assert checks["tensors"] - checks["tensors_compared"] == 2 * int(report.untied and kind == "lora on the embedding")
    assert checks["logits"]["relative_error"] < 0.002


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_head_trained_apart_from_its_embedding_is_untied(qwen, tmp_path):
    make_adapter(qwen.base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    report, _ = merged(qwen, tmp_path / "adapter", tmp_path / "merged")
    assert report.untied
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in index_folder(tmp_path / "merged")


def test_an_ordinary_adapter_leaves_the_head_tied(qwen, tmp_path):
    report, _ = merged(qwen, qwen.adapter, tmp_path / "merged")
    assert not report.untied
    assert "lm_head.weight" not in index_folder(tmp_path / "merged")


def test_full_weights_are_only_rounded(bench, tmp_path):
    (tmp_path / "merged").mkdir()
    report = merge(bench.base, None, tmp_path / "merged")
    assert report.modules_in_adapter == 0
    checked = verify_merged(
        tmp_path / "merged", base=bench.base, adapter=None, full=bench.base, prompts=PROMPTS, stop=None
    )
    assert checked.checks["logits"]["relative_error"] < 0.002


def test_bfloat16_bases_stay_bfloat16(llama, tmp_path):
    import torch

    base = copy(llama.base, tmp_path / "base")
    infos = index_folder(base)
    tensors = {name: read_tensor(info, name).bfloat16() for name, info in infos.items()}
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    write_file(base / "model.safetensors", shapes, dtype=torch.bfloat16, tensor=tensors.__getitem__)
    edit_json(base / "config.json", dtype="bfloat16")
    (tmp_path / "merged").mkdir()
    assert merge(base, llama.adapter, tmp_path / "merged").dtype == "bfloat16"
    checked = verify_merged(
        tmp_path / "merged", base=base, adapter=llama.adapter, full=None, prompts=PROMPTS, stop=None
    )
    assert checked.checks["dtype"] == "bfloat16"
    assert 0.002 < checked.checks["logits"]["relative_error"] < 0.02


def test_values_beyond_float16_switch_to_bfloat16(llama, tmp_path):
    base = copy(llama.base, tmp_path / "base")
    change_tensor(base, "model.layers.0.mlp.up_proj.weight", lambda t: t * 1e7)
    (tmp_path / "merged").mkdir()
    assert merge(base, None, tmp_path / "merged").dtype == "bfloat16"


def test_shards_stay_shards(llama, tmp_path):
    import torch

    base = copy(llama.base, tmp_path / "base")
    infos = index_folder(base)
    names = sorted(infos)
    tensors = {name: read_tensor(infos[name], name) for name in names}
    (base / "model.safetensors").unlink()
    weight_map = {}
    for number, part in enumerate((names[:20], names[20:]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        shapes = {name: tuple(tensors[name].shape) for name in part}
        write_file(base / file, shapes, dtype=torch.float32, tensor=tensors.__getitem__)
        weight_map.update(dict.fromkeys(part, file))
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (tmp_path / "merged").mkdir()
    merge(base, llama.adapter, tmp_path / "merged")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) == 2
    verify_merged(tmp_path / "merged", base=base, adapter=llama.adapter, full=None, prompts=PROMPTS, stop=None)


def refused(bench, adapter, target):
    target.mkdir()
    with pytest.raises(ExportError) as error:
        merge(bench.base, adapter, target)
    assert list(target.iterdir()) == []
    return error.value


def rename_key(adapter, old, new):
    from safetensors.torch import load_file, save_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({key.replace(old, new): value for key, value in tensors.items()}, adapter / "adapter_model.safetensors")


def test_an_unmatched_module_is_refused(bench, tmp_path):
    adapter = copy(bench.adapter, tmp_path / "adapter")
    rename_key(adapter, "layers.1.mlp.up_proj", "layers.9.mlp.up_proj")
    error = refused(bench, adapter, tmp_path / "merged")
    assert error.code == "export-merge-partial"
    assert error.problems[0].where == "model.layers.9.mlp.up_proj"


def test_the_adapter_export_refuses_an_unmatched_module_too(llama, tmp_path):
    adapter = copy(llama.adapter, tmp_path / "adapter")
    rename_key(adapter, "layers.1.mlp.up_proj", "layers.9.mlp.up_proj")
    result = type(llama.result)(tmp_path / "result")
    (report,) = llama.export(("adapter",), adapter=adapter, result=result, work=tmp_path / "work")
    assert not report.ok
    assert report.problem.code == "export-adapter-wrong"


def test_a_tensor_of_an_unknown_kind_is_refused(llama, tmp_path):
    adapter = copy(llama.adapter, tmp_path / "adapter")
    rename_key(adapter, "layers.0.mlp.up_proj.lora_A.weight", "layers.0.mlp.up_proj.lora_C.extra")
    assert refused(llama, adapter, tmp_path / "merged").code == "export-adapter-broken"


@pytest.mark.parametrize("change", [{"init_lora_weights": "pissa"}, {"use_qalora": True}, {"peft_type": "LOHA"}])
def test_adapters_that_are_not_w_plus_ba_are_refused(llama, change, tmp_path):
    adapter = copy(llama.adapter, tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", **change)
    assert refused(llama, adapter, tmp_path / "merged").code == "export-adapter-unsupported"


def test_a_nan_in_the_adapter_is_refused(llama, tmp_path):
    from safetensors.torch import load_file, save_file

    adapter = copy(llama.adapter, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert refused(llama, adapter, tmp_path / "merged").code == "export-adapter-broken"

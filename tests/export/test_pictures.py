"""Models that read pictures, trained on text: what is trained, what stays, and what the merged folder holds."""

from __future__ import annotations

import json

import pytest
from dropforge.errors import ExportError, ModelError
from dropforge.export import export_one, reference
from dropforge.export.precheck import precheck
from dropforge.export.processor_files import compare_towers
from dropforge.export.safetensors_stream import index_folder, read_tensor
from dropforge.facts import model_facts
from dropforge.models.load import attach_adapter
from dropforge.models.pictures import auto_class, language_part
from dropforge.paths import ResultFolder
from dropforge.spec import AdapterSpec, ModelSpec
from export_harness import change_tensor, copy
from picture_models import load, picture_bench

TOWER = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return picture_bench("gemma3", tmp_path_factory.mktemp("gemma3"))


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "k_proj", "v_proj")])
def test_text_gives_an_adapter_to_the_language_model_alone(gemma, targets):
    model = attach_adapter(load(gemma.base), AdapterSpec(target_modules=targets), seed=0, checkpointing=False)
    names = trained(model)
    assert names and all(".language_model.layers." in name for name in names)
    assert len(names) == 2 * 2 * (7 if targets == "all-linear" else 3)


def test_some_layers_of_the_language_model(gemma):
    spec = AdapterSpec(layers_to_transform=(1,))
    names = trained(attach_adapter(load(gemma.base), spec, seed=0, checkpointing=False))
    assert len(names) == 14 and all(".language_model.layers.1." in name for name in names)


def test_a_layer_that_only_the_tower_has_is_refused(gemma):
    with pytest.raises(ModelError) as error:
        attach_adapter(load(gemma.base), AdapterSpec(target_modules=("q_proj", "fc1")), seed=0, checkpointing=False)
    problem = error.value.problems[0]
    assert problem.code == "adapter-target-unknown" and "fc1 lies outside the language model" in problem.what


def test_training_every_weight_leaves_the_tower_alone(gemma):
    model = load(gemma.base)
    part = language_part(model)
    names = trained(attach_adapter(model, AdapterSpec(type="full"), seed=0, checkpointing=False))
    assert part == "model.language_model"
    assert names == {name for name, _ in model.named_parameters() if name.startswith((f"{part}.", "lm_head"))}


def test_the_plan_counts_what_is_trained(gemma):
    model = attach_adapter(load(gemma.base), AdapterSpec(r=8), seed=0, checkpointing=False)
    facts = model_facts(ModelSpec(id="x"), folder=gemma.base)
    counted = sum(8 * (out + inside) for out, inside in facts.linear_shapes)
    assert counted == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert (facts.hidden_size, facts.num_layers, facts.shape) == (256, 2, None)


def test_the_merged_folder(gemma):
    import torch
    from transformers import AutoProcessor

    report = export_one(gemma.stage, "merged")
    assert report.ok, report.problem
    base, merged = index_folder(gemma.base), index_folder(gemma.result.merged)
    assert list(base) == list(merged)
    equal = {name for name in base if torch.equal(read_tensor(base[name], name), read_tensor(merged[name], name))}
    towers = {name for name in base if not name.startswith("language_model.")}
    assert towers <= equal and len(base) - len(equal) == 14, "seven matrices of two layers were trained"
    assert report.checks["tensors_for_pictures_unchanged"] == len(towers) == 39
    assert report.checks["tensors_compared"] == len(base)
    model, loading = auto_class(gemma.result.merged).from_pretrained(gemma.result.merged, output_loading_info=True)
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    assert not any(loading.values())
    processor = AutoProcessor.from_pretrained(gemma.result.merged)
    assert processor.image_processor.size == {"height": 112, "width": 112}
    assert processor.chat_template == gemma.stage.tokenizer.chat_template


def test_the_adapter(gemma):
    report = export_one(gemma.stage, "adapter")
    assert report.ok, report.problem
    assert report.checks["modules"] == 14


def test_a_tower_that_changed_is_refused(gemma, tmp_path):
    folder = copy(gemma.stage.merged.folder, tmp_path / "merged")
    assert compare_towers(folder, base=gemma.base, adapter=gemma.adapter) == 39
    change_tensor(folder, TOWER, lambda tensor: tensor * 1.01)
    with pytest.raises(ExportError, match="is not the base model's"):
        compare_towers(folder, base=gemma.base, adapter=gemma.adapter)
    assert compare_towers(folder, base=gemma.base, adapter=None) == 38, "every weight may have been trained"


def test_an_adapter_of_the_tower_made_in_python_is_merged(gemma, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(gemma.base).float(), LoraConfig(target_modules=["fc1"], r=4, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "adapter")
    (report,) = gemma.export(
        ("merged",), adapter=tmp_path / "adapter", result=ResultFolder(tmp_path / "r"), work=tmp_path / "w"
    )
    assert report.ok, report.problem
    assert report.checks["tensors_for_pictures_unchanged"] == 37


def test_read_from_disk_as_it_runs_it_says_the_same(gemma, tmp_path, monkeypatch):
    whole = gemma.stage.merged.checks
    monkeypatch.setattr(reference, "WHOLE_BYTES", 0)
    (report,) = gemma.export(("merged",), result=ResultFolder(tmp_path / "result"), work=tmp_path / "work")
    assert report.ok, report.problem
    assert report.checks["checked_in_pieces"] and not whole["checked_in_pieces"]
    assert report.checks["tensors_compared"] == whole["tensors_compared"]
    assert report.checks["logits"]["relative_error"] == pytest.approx(whole["logits"]["relative_error"], rel=1e-3)


def test_all_weights_of_the_language_model(gemma, tmp_path):
    import torch

    model = load(gemma.base).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".language_model.layers." in name:
                parameter.mul_(1.01)
    model.save_pretrained(tmp_path / "full")
    (report,) = gemma.export(
        ("merged",), adapter=None, full=tmp_path / "full", result=ResultFolder(tmp_path / "r"), work=tmp_path / "w"
    )
    assert report.ok, report.problem
    assert list(index_folder(tmp_path / "r" / "merged")) == list(index_folder(gemma.base))


def test_an_embedding_trained_in_full(tmp_path):
    spec = AdapterSpec(modules_to_save=("embed_tokens",))
    bench = picture_bench("gemma3", tmp_path, spec=spec)
    report = export_one(bench.stage, "merged")
    assert report.ok, report.problem
    config = json.loads((bench.result.merged / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["text_config"]["vocab_size"] == len(bench.stage.tokenizer)


@pytest.mark.parametrize("kind", ["fp8", "merged_4bit"])
def test_matrices_are_not_quantised(gemma, kind):
    with pytest.raises(ExportError) as error:
        precheck((kind,), base=gemma.base)
    assert error.value.problems[0].code == "export-quantize-unsupported"
    assert "reads pictures" in error.value.problems[0].why


def test_what_training_rows_feed_its_layers_has_the_names_of_a_model_of_text(gemma):
    """A GGUF's importance matrix is of the language model alone."""
    from dropforge.export.calibration import input_statistics
    from dropforge.export.samples import TrainingRow

    found = input_statistics(gemma.stage.merged.folder, (TrainingRow(ids=tuple(range(5, 30)), prompt=0),))
    assert found.layers == 2 and found.tokens == 25
    assert {name for name in found.squares if name != "lm_head"} == {
        f"model.layers.{layer}.{name}" for layer in range(2)
        for name in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
            "mlp.up_proj", "mlp.down_proj",
        )
    }  # fmt: skip

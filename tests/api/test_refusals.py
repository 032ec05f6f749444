"""Bad arguments are refused by name, before any weight is loaded where that is possible."""

from __future__ import annotations

import pytest
import torch
from dropforge.errors import CommandError, DataError, DropforgeError, ModelError


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test when weights are loaded."""
    from transformers import AutoModelForCausalLM

    def loaded(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)


@pytest.mark.parametrize(
    ("arguments", "code", "where"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "api-two-precisions", "load_in_4bit, load_in_8bit"),
        ({"load_in_4bit": True, "full_finetuning": True}, "api-two-precisions", "load_in_4bit, full_finetuning"),
        ({"max_seq_length": 4096}, "api-length", "max_seq_length"),
        ({"load_in_16bit": True, "full_finetuning": True}, "api-two-precisions", "load_in_16bit, full_finetuning"),
        ({"max_seq_length": 0}, "api-length", "max_seq_length"),
        ({"max_seq_length": "2048"}, "api-length", "max_seq_length"),
        ({"max_seq_len": 512}, "api-argument", "max_seq_len"),
        ({"dtype": "bf16"}, "api-dtype", "dtype"),
        ({"kernels": "yes"}, "api-kernels", "kernels"),
    ],
)
def test_arguments_of_from_pretrained(arguments, code, where, no_weights):
    from dropforge import FastLanguageModel

    with pytest.raises(CommandError) as caught:
        FastLanguageModel.from_pretrained("builtin:tiny-llama", **arguments)
    assert (caught.value.code, caught.value.problems[0].where) == (code, where)


@pytest.mark.parametrize(
    ("name", "code"), [("builtin:tiny-lama", "model-unknown-builtin"), ("/no/such/folder", "model-unknown")]
)
def test_unknown_model(name, code, no_weights):
    from dropforge import FastLanguageModel

    with pytest.raises(DropforgeError) as caught:
        FastLanguageModel.from_pretrained(name)
    assert caught.value.code == code


def load(name="builtin:tiny-llama", **arguments):
    from dropforge import FastLanguageModel

    return FastLanguageModel.from_pretrained(name, load_in_4bit=False, **arguments)


def test_target_modules_and_second_adapter():
    from dropforge import FastLanguageModel

    model, _ = load()
    with pytest.raises(ModelError) as caught:
        FastLanguageModel.get_peft_model(model, target_modules=["q_proj", "gate"])
    problem = caught.value.problems[0]
    assert (problem.code, problem.where) == ("adapter-target-unknown", "target_modules")
    assert problem.fix == "did you mean 'gate_proj'?"
    with pytest.raises(ModelError, match="modules_to_save"):
        FastLanguageModel.get_peft_model(model, modules_to_save=["embeddings"])
    assert not any("lora_" in name for name, _ in model.named_parameters())
    model = FastLanguageModel.get_peft_model(model, target_modules="all-linear")
    with pytest.raises(CommandError, match="has an adapter already, with another r"):
        FastLanguageModel.get_peft_model(model, r=8)


@pytest.mark.parametrize(
    ("arguments", "code", "where", "fix"),
    [
        ({"target_modules": ["qproj"]}, "adapter-target-unknown", "target_modules", "did you mean 'q_proj'?"),
        ({"target_modules": "q_prj"}, "adapter-target-unknown", "target_modules", "write ['q_proj'], as a list"),
        ({"target_modules": "q_(proj"}, "adapter-target-unknown", "target_modules", "write ['q_proj'], as a list"),
        ({"r": 0}, "api-lora", "r", "at least 1"),
        ({"r": "16"}, "api-lora", "r", "at least 1"),
        ({"lora_alpha": -1}, "api-lora", "lora_alpha", "above 0"),
        ({"lora_dropout": 1.5}, "api-lora", "lora_dropout", "from 0 to less than 1"),
        ({"bias": "some"}, "api-lora", "bias", "none, all, lora_only"),
        ({"rank_pattern": {"q_prj": 4}}, "adapter-target-unknown", "rank_pattern", "did you mean 'q_proj'?"),
        ({"alpha_pattern": {"(q": 4}}, "adapter-target-unknown", "alpha_pattern", "end of a module's path"),
        ({"exclude_modules": ["v_prj"]}, "adapter-target-unknown", "exclude_modules", "did you mean 'v_proj'?"),
        ({"exclude_modules": "up_proj"}, "adapter-target-unknown", "exclude_modules", "write ['up_proj'], as a list"),
    ],
)
def test_arguments_of_get_peft_model(arguments, code, where, fix, loaded):
    from dropforge import FastLanguageModel

    before = [name for name, _ in loaded.named_parameters()]
    with pytest.raises(DropforgeError) as caught:
        FastLanguageModel.get_peft_model(loaded, **arguments)
    problem = caught.value.problems[0]
    assert (problem.code, problem.where) == (code, where) and fix in problem.fix
    assert [name for name, _ in loaded.named_parameters()] == before


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A model that no refusal changes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DROPFORGE_DATA", str(tmp_path_factory.mktemp("data")))
        return load()[0]


def test_nothing_that_can_be_trained(caplog):
    """4 bits without an adapter cannot be trained; 16 bits can, but hardly anybody means it."""
    from datasets import Dataset
    from dropforge import FastLanguageModel
    from dropforge.trainers import SFTConfig, SFTTrainer

    rows, config = Dataset.from_dict({"text": ["a b c"]}), SFTConfig(output_dir="x", report_to="none", max_steps=1)
    model, tokenizer = FastLanguageModel.from_pretrained("builtin:tiny-llama", load_in_4bit=True)
    with pytest.raises(CommandError) as caught:
        SFTTrainer(model, config, tokenizer=tokenizer, train_dataset=rows)
    assert caught.value.code == "api-no-adapter" and "get_peft_model(model)" in caught.value.problems[0].fix
    model, tokenizer = load()
    SFTTrainer(model, config, tokenizer=tokenizer, train_dataset=rows)
    assert "every weight of the model is trained, in float32" in caplog.text


@pytest.mark.parametrize(
    ("columns", "field", "code", "fix"),
    [
        ({"text": []}, "text", "api-no-rows", "filter()"),
        ({"txt": ["a"]}, "text", "api-no-column", "dataset_text_field='txt'"),
        ({"body": ["a"]}, "text", "api-no-column", "formatting_func"),
    ],
)
def test_rows_that_cannot_be_read(columns, field, code, fix, loaded):
    from datasets import Dataset
    from dropforge.trainer_checks import check_rows
    from dropforge.trainers import SFTConfig

    config = SFTConfig(output_dir="x", dataset_text_field=field)
    with pytest.raises(DataError) as caught:
        check_rows(Dataset.from_dict(columns), config, argument="train_dataset")
    problem = caught.value.problems[0]
    assert (problem.code, problem.where.split(",")[0]) == (code, "train_dataset") and fix in problem.fix
    config.dataset_kwargs = {"skip_prepare_dataset": True}
    check_rows(Dataset.from_dict(columns), config, argument="train_dataset")


def test_required_kernels_that_do_not_fit():
    from dropforge import FastLanguageModel

    model, _ = load(kernels="required")
    with pytest.raises(ModelError) as caught:
        FastLanguageModel.get_peft_model(model, r=2, target_modules=r".*(q_proj|lm_head)")
    assert caught.value.code == "api-kernels-required"
    assert "linear_cross_entropy in 1 modules" in caught.value.problems[0].why


def test_a_model_that_is_not_ours():
    from dropforge import FastLanguageModel

    with pytest.raises(CommandError) as caught:
        FastLanguageModel.for_inference(torch.nn.Linear(2, 2))
    assert caught.value.code == "api-not-loaded"


def test_scaled_positions_lift_the_limit():
    model, _ = load(max_seq_length=4096, rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert model.config.max_position_embeddings == 4096
    assert model.model.rotary_emb.rope_type == "linear"


def test_adapter_of_another_architecture(tmp_path):
    import json

    from dropforge import FastLanguageModel

    model, _ = load()
    model = FastLanguageModel.get_peft_model(model, r=2, target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["qkv_proj"]}))
    with pytest.raises(ModelError) as caught:
        load(str(tmp_path / "adapter"))
    problem = caught.value.problems[0]
    assert problem.code == "adapter-target-unknown"
    assert problem.where == "model_name: target_modules of adapter/adapter_config.json"
    assert "another architecture" in problem.fix and "base_model_name_or_path" in problem.fix


def test_methods_that_other_libraries_have_say_what_to_do(tmp_path):
    from dropforge import FastLanguageModel

    model, _ = load()
    model = FastLanguageModel.get_peft_model(model, r=2, target_modules=["q_proj"])
    for name, fix in (("load_lora", "model.load_adapter("), ("fast_generate", "model.generate("),
                      ("save_pretrained_torchao", "save_pretrained_merged(")):  # fmt: skip
        with pytest.raises(CommandError) as caught:
            getattr(model, name)("x", lora_request=None)
        problem = caught.value.problems[0]
        assert (problem.code, problem.where) == ("api-not-built", f"model.{name}") and fix in problem.fix
    model.save_lora(tmp_path / "saved")
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()
    for argument in ("auto_model", "text_only", "whisper_task"):
        with pytest.raises(CommandError) as caught:
            load(**{argument: "something"})
        assert (caught.value.code, caught.value.problems[0].where) == ("api-not-built", argument)


def test_names_that_other_libraries_have_say_what_to_do():
    with pytest.raises(ImportError, match="generated code"):
        from dropforge import check_python_modules  # noqa: F401
    with pytest.raises(ImportError, match="import DropforgeTrainer"):
        from dropforge import UnslothTrainer  # noqa: F401
    with pytest.raises(ImportError, match="vision models are not trained in this release"):
        from dropforge import FastVisionModel  # noqa: F401
    with pytest.raises(ImportError, match="from trl import GRPOTrainer"):
        from dropforge.trainers import GRPOTrainer  # noqa: F401


def test_names_of_the_package():
    import dropforge

    assert {"FastLanguageModel", "is_bfloat16_supported"} <= set(dir(dropforge))
    with pytest.raises(AttributeError, match="no attribute 'FastLanguageModle'"):
        dropforge.FastLanguageModle  # noqa: B018

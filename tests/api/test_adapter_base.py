"""An adapter of another architecture is refused before weights are loaded, also where every width is the same."""

from __future__ import annotations

import json

import pytest
import torch
from dropforge.errors import ModelError

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.fixture
def bases(checkpoint):
    """Name -> folder of a base whose adapted matrices are all of the same shapes."""
    from transformers import LlamaConfig, MistralConfig, Qwen2Config

    made = {
        "llama": LlamaConfig(**SIZES), "mistral": MistralConfig(**SIZES), "qwen2": Qwen2Config(**SIZES),
        "deeper": LlamaConfig(**SIZES | {"num_hidden_layers": 3}),
        "shallower": LlamaConfig(**SIZES | {"num_hidden_layers": 1}),
        "heads": LlamaConfig(**SIZES | {"num_attention_heads": 2, "num_key_value_heads": 1}),
    }  # fmt: skip
    return {name: checkpoint(name, config) for name, config in made.items()}


def load(name, **arguments):
    from dropforge import FastLanguageModel

    arguments.setdefault("load_in_16bit", "load_in_4bit" not in arguments)
    return FastLanguageModel.from_pretrained(str(name), max_seq_length=64, **arguments)


def trained_on(base, folder, *, tokenizer=True, **arguments):
    from dropforge import FastLanguageModel

    model, tokens = load(base)
    model = FastLanguageModel.get_peft_model(model, r=2, **arguments)
    model.save_pretrained(folder)
    if tokenizer:
        tokens.save_pretrained(folder)
    return folder


def rewrite(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


@pytest.fixture
def no_weights(monkeypatch):
    """After it was called, loading weights fails the test."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def forbid():
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded"))
        monkeypatch.setattr(PeftModel, "load_adapter", lambda *a, **k: pytest.fail("weights were loaded"))

    return forbid


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ("mistral", "it was trained on a llama model, this is mistral"),
        ("qwen2", "it was trained on a llama model, this is qwen2"),
        ("deeper", "num_hidden_layers was 2 there, and is 3 here"),
        ("heads", "num_attention_heads was 4 there, and is 2 here"),
    ],
)
def test_equal_widths_are_not_enough(bases, other, why, tmp_path, no_weights):
    folder = rewrite(
        trained_on(bases["llama"], tmp_path / "adapter", tokenizer=False), base_model_name_or_path=str(bases[other])
    )
    no_weights()
    with pytest.raises(ModelError) as caught:
        load(folder)
    problem = caught.value.problems[0]
    assert (problem.code, problem.why) == ("adapter-wrong-base", why)
    assert problem.where == "model_name: adapter/adapter_config.json, auto_mapping"
    assert other in problem.what and "base_model_name_or_path" in problem.fix


def test_a_job_writes_the_base_into_its_adapter(bases):
    from dropforge.models.load import attach_adapter
    from dropforge.spec import AdapterSpec

    model, _ = load(bases["mistral"])
    told = attach_adapter(model, AdapterSpec(), seed=1, checkpointing=False).peft_config["default"].auto_mapping
    assert told["parent_library"] == "transformers.models.mistral.modeling_mistral"
    assert told["base_config"]["model_type"] == "mistral" and told["base_config"]["num_hidden_layers"] == 2


def test_other_copies_of_the_same_base_are_accepted(bases, tmp_path, recwarn):
    """Renamed, quantised, with scaled positions; trained on and saved once more; and by PEFT alone, without a word."""
    import shutil

    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = trained_on(bases["llama"], tmp_path / "adapter")
    quantised = tmp_path / "llama-bnb-4bit"
    AutoModelForCausalLM.from_pretrained(
        bases["llama"], quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    ).save_pretrained(quantised)
    for path in bases["llama"].glob("tokenizer*"):
        shutil.copy(path, quantised)
    rewrite(folder, base_model_name_or_path=str(quantised))
    load(folder, load_in_4bit=True)
    shutil.move(bases["llama"], tmp_path / "renamed")
    rewrite(folder, base_model_name_or_path=str(tmp_path / "renamed"))
    load(folder, rope_scaling={"rope_type": "linear", "factor": 2.0})
    model, _ = load(folder)
    model.save_pretrained(tmp_path / "again")
    stored = [json.loads((path / "adapter_config.json").read_text())["auto_mapping"] for path in
              (folder, tmp_path / "again")]  # fmt: skip
    assert stored[0] == stored[1] and stored[0]["base_config"]["num_key_value_heads"] == 2
    recwarn.clear()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "renamed"), folder)
    assert not [str(warning.message) for warning in recwarn if "eyword" in str(warning.message)]


def foreign(folder, **fields):
    """As PEFT alone writes it: nothing about the base but its name."""
    return rewrite(folder, auto_mapping=None, **fields)


def test_an_adapter_from_elsewhere_shows_its_depth(bases, tmp_path, no_weights):
    whole = foreign(
        trained_on(bases["llama"], tmp_path / "whole", tokenizer=False), base_model_name_or_path=str(bases["deeper"])
    )
    long = foreign(
        trained_on(bases["llama"], tmp_path / "long", tokenizer=False), base_model_name_or_path=str(bases["shallower"])
    )
    some = foreign(
        trained_on(bases["llama"], tmp_path / "some", layers_to_transform=[0]),
        base_model_name_or_path=str(bases["deeper"]),
    )
    load(some)  # these layers alone were chosen
    no_weights()
    for folder, code, why in (
        (whole, "adapter-wrong-base", "it has no matrices for model.layers.2.self_attn.q_proj"),
        (long, "adapter-wrong-size", "the model has no such layer"),
    ):
        with pytest.raises(ModelError) as caught:
            load(folder)
        assert (caught.value.code, caught.value.problems[0].why) == (code, why)


def test_an_adapter_from_elsewhere_shows_its_class(bases, tmp_path, no_weights):
    """PEFT writes the class of the base where the adapter has no task."""
    folder = rewrite(
        trained_on(bases["llama"], tmp_path / "adapter", tokenizer=False),
        base_model_name_or_path=str(bases["qwen2"]), task_type=None,
        auto_mapping={"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"},
    )  # fmt: skip
    no_weights()
    with pytest.raises(ModelError, match="not trained on qwen2"):
        load(folder)


def shuffled(folder):
    """The same number of tokens under other ids."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    ids = list(vocabulary.values())
    tokenizer["model"]["vocab"] = dict(zip(vocabulary, ids[300:] + ids[:300], strict=True))
    path.write_text(json.dumps(tokenizer))


def test_another_tokenizer_is_another_model(bases, tmp_path, no_weights):
    folder = foreign(trained_on(bases["llama"], tmp_path / "adapter"), base_model_name_or_path=str(bases["mistral"]))
    load(folder)  # one tokenizer, and nothing else is known
    shuffled(folder)
    no_weights()
    with pytest.raises(ModelError) as caught:
        load(folder)
    problem = caught.value.problems[0]
    assert (problem.code, problem.where) == ("adapter-wrong-base", "model_name: adapter/tokenizer.json")


def test_another_vocabulary_is_another_model(bases, tmp_path, no_weights):
    folder = trained_on(bases["llama"], tmp_path / "adapter", tokenizer=False)
    path = folder / "adapter_config.json"
    told = json.loads(path.read_text())["auto_mapping"]
    stored = told["base_config"]["vocab_size"]
    for rows, fits in ((stored + 200, True), (stored + 768, False)):
        rewrite(folder, auto_mapping=told | {"base_config": told["base_config"] | {"vocab_size": rows}})
        if fits:
            load(folder)
            continue
        no_weights()
        with pytest.raises(ModelError, match="not trained on") as caught:
            load(folder)
        assert f"vocab_size was {rows} there" in caught.value.problems[0].why


def test_a_stored_vocabulary_needs_its_rows(bases, tmp_path, no_weights):
    from dropforge import FastLanguageModel, add_new_tokens

    model, tokenizer = load(bases["llama"])
    add_new_tokens(model, tokenizer, ["<a>", "<b>"])
    rows = len(tokenizer)
    model = FastLanguageModel.get_peft_model(model, r=2, modules_to_save=["embed_tokens", "lm_head"])
    model.save_pretrained(tmp_path / "adapter")
    again, _ = load(tmp_path / "adapter", resize_model_vocab=rows)
    assert again.get_input_embeddings().weight.shape[0] == rows
    no_weights()
    with pytest.raises(ModelError) as caught:
        load(tmp_path / "adapter")
    problem = caught.value.problems[0]
    assert problem.code == "adapter-wrong-size" and f"resize_model_vocab={rows}" in problem.fix


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_further_adapter_is_compared_too(bases, wrapped, tmp_path):
    from dropforge import FastLanguageModel

    own = trained_on(bases["llama"], tmp_path / "own")
    other = trained_on(bases["mistral"], tmp_path / "other")
    silent = foreign(trained_on(bases["qwen2"], tmp_path / "silent"))
    model, _ = load(bases["llama"])
    if wrapped:
        model = FastLanguageModel.get_peft_model(model, r=2)
    model.load_adapter(str(own), adapter_name="reference")
    before = {name for name, _ in model.named_parameters()}
    for folder, family in ((other, "mistral"), (silent, "qwen2")):
        with pytest.raises(ModelError) as caught:
            model.load_adapter(str(folder), adapter_name="wrong")
        problem = caught.value.problems[0]
        assert problem.code == "adapter-wrong-base" and f"trained on a {family} model, this is llama" in problem.why
        assert "load an adapter of this model; this one names" in problem.fix
    assert {name for name, _ in model.named_parameters()} == before
    assert any(".reference." in name for name in before)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))

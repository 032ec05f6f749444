"""The helpers of scripts, with the meanings people know from notebooks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from datasets import Dataset, IterableDataset
from dropforge.chat_templates import (
    CHAT_TEMPLATES,
    add_new_tokens,
    apply_chat_template,
    get_chat_template,
    standardize_data_formats,
    standardize_sharegpt,
    to_sharegpt,
    train_on_responses_only,
)
from dropforge.errors import CommandError, DataError
from dropforge.models.builtin import build_builtin
from dropforge.models.templates import TEMPLATES
from transformers import AutoTokenizer

TITANIC = "[[The passenger embarked from {Embarked}.]] [[Their age is {Age}.]] [[Their fare is ${Fare}.]]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    build_builtin("tiny-llama", folder)
    return folder


@pytest.fixture
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def chat(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


TURNS = chat(("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye"), ("assistant", "See you"))


def test_titanic_sentences_with_missing_values():
    """The two sentences of the tutorial, character for character; CSV numbers with gaps arrive as floats."""
    rows = Dataset.from_dict(
        {"Embarked": ["S", None, "", "C"], "Age": [23.0, 18.0, None, None], "Fare": [None, 7.25, None, 8], "Survived": [0, 1, 1, 0]}
    )  # fmt: skip
    done = to_sharegpt(rows, merged_prompt=TITANIC, output_column_name="Survived")
    assert done.column_names == ["conversations"]
    assert [row["conversations"][0]["value"] for row in done] == [
        "The passenger embarked from S. Their age is 23.",
        "Their age is 18. Their fare is $7.25.",
        "",
        "The passenger embarked from C. Their fare is $8.",
    ]
    assert done[0]["conversations"][1] == {"from": "gpt", "value": "0"}


def test_titanic_with_the_blanks_inside_the_optional_parts():
    rows = Dataset.from_dict({"E": ["S", None], "A": [23, 18], "F": [None, 7.25], "y": ["0", "1"]})
    prompt = "[[The passenger embarked from {E}.]][[ Their age is {A}.]][[ Their fare is ${F}.]]"
    done = to_sharegpt(rows, merged_prompt=prompt, output_column_name="y")
    assert [row["conversations"][0]["value"] for row in done] == [
        "The passenger embarked from S. Their age is 23.",
        "Their age is 18. Their fare is $7.25.",
    ]


ALPACA = Dataset.from_dict(
    {"instruction": ["Add", "Name", "Say"], "input": ["1 and 2", None, ""], "output": ["3", "Ann", "hi"]}
)


def test_alpaca_columns_and_literal_braces():
    done = to_sharegpt(ALPACA, merged_prompt="{{x}} {instruction}[[\nInput: {input}]]", output_column_name="output")
    assert [row["conversations"][0]["value"] for row in done] == ["{x} Add\nInput: 1 and 2", "{x} Name", "{x} Say"]
    assert to_sharegpt(ALPACA)[1]["conversations"][0] == {"from": "human", "value": "Name"}
    assert "input" in to_sharegpt(ALPACA, remove_unused_columns=False).column_names


def test_conversation_extension_joins_shuffled_rows():
    done = to_sharegpt(ALPACA, conversation_extension=3)
    first, second = ALPACA.shuffle(seed=3407), ALPACA.shuffle(seed=3408)
    expected = [[ALPACA[i]["output"], first[i]["output"], second[i]["output"]] for i in range(3)]
    assert [[turn["value"] for turn in row["conversations"][1::2]] for row in done] == expected
    assert [turn["from"] for turn in done[0]["conversations"]] == ["human", "gpt"] * 3
    assert done[:] == to_sharegpt(ALPACA, conversation_extension=3)[:]


def test_to_sharegpt_refuses():
    with pytest.raises(KeyError, match="Age"):
        to_sharegpt(ALPACA, merged_prompt="{Age}")
    with pytest.raises(ValueError, match="must name a column"):
        to_sharegpt(ALPACA, merged_prompt="[[nothing]]")
    with pytest.raises(TypeError, match="conversations already"):
        to_sharegpt(Dataset.from_list([{"conversations": [{"from": "human", "value": "a"}], "output": "b"}]))


@pytest.mark.parametrize(
    ("role", "text", "names"),
    [("from", "value", (" Human ", "GPT")), ("who", "said", ("user", "assistant")), ("role", "content", ("user", "model"))],
)  # fmt: skip
def test_any_two_keys_become_role_and_content(role, text, names):
    rows = [
        {"conversations": [{text: f"text {i}", role: names[0]}, {text: f"answer {i}", role: names[1]}]}
        for i in range(3)
    ]
    done = standardize_data_formats(Dataset.from_list(rows))
    assert done[1]["conversations"] == chat(("user", "text 1"), ("assistant", "answer 1"))


def test_aliases_of_ones_own():
    rows = [{"conversations": [{"from": "kunde", "value": "a"}, {"from": "berater", "value": "b"}]}]
    done = standardize_sharegpt(Dataset.from_list(rows), aliases_for_user=["Kunde"], aliases_for_assistant=["berater"])
    assert done[0]["conversations"] == chat(("user", "a"), ("assistant", "b"))


def test_a_round_trip_loses_nothing():
    from dropforge.data.convert import convert
    from dropforge.data.detect import Match
    from dropforge.data.rows import Row

    shared = to_sharegpt(ALPACA, merged_prompt="{instruction}[[\n\n{input}]]")
    standard = standardize_sharegpt(shared)
    for index, row in enumerate(ALPACA):
        match = Match(
            format="alpaca", reason="", columns={"instruction": "instruction", "input": "input", "output": "output"}
        )
        own = convert(Row(file="a", number=1, fields=row), match)
        assert own.turns == standard[index]["conversations"]


def as_trainer(tokenizer, turns=TURNS, **row):
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    rows = Dataset.from_list([{"input_ids": tokenizer(text, add_special_tokens=False)["input_ids"], **row}])
    return SimpleNamespace(
        train_dataset=rows, eval_dataset=None, processing_class=tokenizer, args=SimpleNamespace(packing=False)
    )


def kept(tokenizer, trainer):
    return tokenizer.decode([label for label in trainer.train_dataset[0]["labels"] if label != -100])


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_markers_are_found_in_every_template(tokenizer, name):
    """Without markers given, the labels kept are the answers and their end, for every template."""
    template = TEMPLATES[name]
    tokenizer.add_special_tokens({"additional_special_tokens": list(template.markers)})
    get_chat_template(tokenizer, name)
    end = tokenizer.eos_token
    end = " " + end if name == "llama" else end
    lead = [template.lead, template.lead] if "think" not in template.lead else ["", template.lead]
    done = kept(tokenizer, train_on_responses_only(as_trainer(tokenizer)))
    if name == "gpt-oss":  # earlier answers end with <|end|>, which is not what stops the model
        assert done.endswith("<|channel|>final<|message|>See you<|return|>")
        return
    assert done == f"{lead[0]}Hello!{end}{lead[1]}See you{end}"
    last = kept(tokenizer, train_on_responses_only(as_trainer(tokenizer), last_response_only=True))
    assert last == f"{lead[1]}See you{end}"


def test_markers_given_by_hand_as_in_notebooks(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": list(TEMPLATES["llama-3.1"].markers)})
    get_chat_template(tokenizer, chat_template="llama-3.1")
    trainer = train_on_responses_only(
        as_trainer(tokenizer),
        instruction_part="<|start_header_id|>user<|end_header_id|>\n\n",
        response_part="<|start_header_id|>assistant<|end_header_id|>\n\n",
    )
    assert kept(tokenizer, trainer) == "Hello!<|eot_id|>See you<|eot_id|>"


@pytest.mark.parametrize("written", ["\n\n", "\n", ""])
def test_markers_whose_blanks_differ(tokenizer, written):
    """force_match=False: the blanks around a marker are neither required nor learnt; True: they must be there."""
    text = f"### Question:{written}a{written}### Answer:{written}b{tokenizer.eos_token}{written}### Question:{written}c"
    text += f"{written}### Answer:{written}d{tokenizer.eos_token}"
    rows = Dataset.from_list([{"input_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}])

    def masked(**options):
        trainer = SimpleNamespace(
            args=SimpleNamespace(packing=False), processing_class=tokenizer, train_dataset=rows, eval_dataset=None
        )
        return train_on_responses_only(trainer, "### Question:\n\n", "### Answer:\n\n", **options)

    end = tokenizer.eos_token
    assert kept(tokenizer, masked(force_match=False)) == f"b{end}d{end}"
    if written != "\n\n":
        with pytest.raises(DataError) as caught:
            masked(force_match=True)
        assert caught.value.code == "api-no-responses"
    with pytest.raises(DataError) as caught:
        train_on_responses_only(None, "\n", "\n", False, tokenizer, True)
    assert caught.value.code == "api-no-markers"


def test_labels_masked_before_stay_and_tokens_can_be_left_out(tokenizer):
    trainer = as_trainer(tokenizer)
    ids = trainer.train_dataset[0]["input_ids"]
    answer = tokenizer("Hello!", add_special_tokens=False)["input_ids"]
    labels = list(ids)
    labels[ids.index(answer[1])] = -100
    trainer = train_on_responses_only(as_trainer(tokenizer, labels=labels), mask_out_tokens=["<|im_end|>"])
    expected = [*answer[:1], *answer[2:], *tokenizer("See you", add_special_tokens=False)["input_ids"]]
    assert [label for label in trainer.train_dataset[0]["labels"] if label != -100] == expected


def test_the_function_alone_and_a_stream(tokenizer):
    trainer = as_trainer(tokenizer)
    label = train_on_responses_only(None, tokenizer=tokenizer, return_function=True)
    rows = list(trainer.train_dataset)
    trainer.train_dataset = IterableDataset.from_generator(lambda: iter(rows))
    done = next(iter(train_on_responses_only(trainer).train_dataset))
    assert done["labels"] == label(rows[0])["labels"]


def test_nothing_to_learn_is_an_error_that_says_why(tokenizer):
    trainer = as_trainer(tokenizer, TURNS[:1] + chat(("assistant", "x")))
    ids = trainer.train_dataset[0]["input_ids"]
    trainer.train_dataset = Dataset.from_list([{"input_ids": ids[: len(ids) - 3]}])
    with pytest.raises(DataError) as caught:
        train_on_responses_only(trainer)
    assert caught.value.code == "api-no-responses" and "max_seq_length" in caught.value.problems[0].fix
    with pytest.raises(CommandError) as caught:
        train_on_responses_only(as_trainer(tokenizer), response_part="a")
    assert caught.value.code == "api-markers"
    tokenizer.chat_template = None
    with pytest.raises(DataError) as caught:
        train_on_responses_only(as_trainer_of_ids(tokenizer))
    assert caught.value.code == "api-no-markers"


def as_trainer_of_ids(tokenizer):
    rows = Dataset.from_list([{"input_ids": [1, 2, 3]}])
    return SimpleNamespace(
        train_dataset=rows, eval_dataset=None, processing_class=tokenizer, args=SimpleNamespace(packing=False)
    )


def test_a_template_written_as_an_example(tokenizer):
    example = "{SYSTEM}\nQ: {INPUT}\nA: {OUTPUT}\nQ: {INPUT}\nA: {OUTPUT}"
    rows = apply_chat_template(to_sharegpt(ALPACA), tokenizer, chat_template=example, default_system_message="Answer.")
    assert rows[0]["text"] == "<s>Answer.\nQ: Add\nA: 3<|im_end|>"
    extended = apply_chat_template(to_sharegpt(ALPACA, conversation_extension=2), tokenizer, chat_template=example)
    assert extended[0]["text"].count("\nQ: ") == 2
    trainer = train_on_responses_only(as_trainer(tokenizer))
    assert kept(tokenizer, trainer) == " Hello!<|im_end|> See you<|im_end|>"


def test_an_end_that_is_no_special_token(tokenizer):
    """extra_eos_tokens: such a token behind {OUTPUT} is the end, and no other is written behind it."""
    assert "end" in tokenizer.get_vocab() or tokenizer.add_tokens(["end"])
    example = "Q: {INPUT}\nA: {OUTPUT}end\nQ: {INPUT}\nA: {OUTPUT}end"
    rows = Dataset.from_list([{"conversations": chat(("user", "a"), ("assistant", "b"))}])
    was = tokenizer.eos_token
    assert apply_chat_template(rows, tokenizer, example)[0]["text"].rstrip().endswith(f"bend\n{was}")
    done = apply_chat_template(rows, tokenizer, example, extra_eos_tokens=["end"])[0]["text"]
    assert done.rstrip().endswith("A: bend") and tokenizer.eos_token == "end"
    with pytest.raises(DataError) as caught:
        apply_chat_template(rows, tokenizer, example, extra_eos_tokens=["no such token"])
    assert caught.value.code == "template-invalid" and "no such token" in str(caught.value)


def test_a_pair_of_jinja_and_end_marker(tokenizer):
    text = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
    get_chat_template(tokenizer, chat_template=(text, "</s>"))
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.apply_chat_template(TURNS[:2], tokenize=False) == "<s>user: Hi</s>assistant: Hello!</s>"


def test_every_name_is_offered():
    assert {"llama-3.1", "llama-3.3", "qwen3", "gemma3", "phi-3.5"} <= set(CHAT_TEMPLATES)


@pytest.mark.parametrize("method", ["mean", "interpolation"])
def test_new_tokens_start_where_the_model_has_meaning(folder, tokenizer, method):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    before, head = (m.weight.detach().clone() for m in (model.get_input_embeddings(), model.get_output_embeddings()))
    pieces = tokenizer("<|price|>", add_special_tokens=False)["input_ids"]
    assert add_new_tokens(model, tokenizer, ["<|price|>", "hello", "<|price|>"], method=method) == 2
    assert add_new_tokens(model, tokenizer, ["<|price|>"]) == 0
    index = tokenizer.convert_tokens_to_ids("<|price|>")
    for table, old in ((model.get_input_embeddings().weight, before), (model.get_output_embeddings().weight, head)):
        assert table.shape[0] == len(tokenizer) and torch.equal(table[: len(old)], old)
        expected = old.mean(0) if method == "mean" else 0.5 * old.mean(0) + 0.5 * old[pieces].mean(0)
        torch.testing.assert_close(table[index], expected)
    assert tokenizer("a<|price|>", add_special_tokens=False)["input_ids"][-1] == index

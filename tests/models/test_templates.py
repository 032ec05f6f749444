"""Every chat template: what it writes, that the labels kept are the answers, and the names people know."""

from __future__ import annotations

import random

import pytest
from dropforge.data.render import Renderer
from dropforge.data.tokenize import tokenize_conversations
from dropforge.errors import DataError
from dropforge.models.builtin import build_builtin
from dropforge.models.templates import ALIASES, TEMPLATES, find_template
from dropforge.models.templates.apply import apply_template
from dropforge.models.tokenizer import load_tokenizer, use_template
from transformers import AutoTokenizer

# The names of the tool that people come from (research of its public interface), each with its aliases.
NAMES = [
    "unsloth",
    "zephyr",
    "chatml",
    "mistral",
    "llama",
    "vicuna",
    "vicuna_old",
    "alpaca",
    "gemma",
    "gemma_chatml",
    "gemma2",
    "gemma2_chatml",
    "llama-3",
    "llama3",
    "phi-3",
    "phi-35",
    "phi-3.5",
    "llama-3.1",
    "llama-31",
    "llama-3.2",
    "llama-3.3",
    "llama-32",
    "llama-33",
    "qwen-2.5",
    "qwen-25",
    "qwen25",
    "qwen2.5",
    "qwen-2.5-coder",
    "qwen-25-coder",
    "qwen25-coder",
    "qwen2.5-coder",
    "phi-4",
    "gemma-3",
    "gemma3",
    "qwen-3",
    "qwen3",
    "gemma-3n",
    "gemma3n",
    "gemma-4",
    "gemma4",
    "gemma-4-thinking",
    "gemma4-thinking",
    "gpt-oss",
    "gptoss",
    "qwen3-instruct",
    "qwen3-thinking",
    "lfm-2",
    "lfm-2.5",
    "starling",
    "yi-chat",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    build_builtin("tiny-llama", folder)
    return folder


@pytest.fixture
def fresh(folder):
    """The tiny Llama tokenizer; with `</s>` as its end token, as base models have it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "</s>"
    return tokenizer


def fitted(tokenizer, name, **options):
    """As if the vocabulary were the family's: its markers are single special tokens."""
    template = find_template(name)
    tokenizer.add_special_tokens({"additional_special_tokens": list(template.markers)})
    apply_template(tokenizer, template, **options)
    return template


def chat(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


TWO = chat(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye"), ("assistant", "See you"))
ONE = chat(("user", "Hi"), ("assistant", "Hello!"))
H = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>".format
OSS = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
    "Current date: 2025-08-05\n\nReasoning: medium\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>"
)
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
CHATML = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n" \
         "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nSee you<|im_end|>\n"  # fmt: skip
GEMMA = (
    "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
    "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\nSee you<end_of_turn>\n"
)
GEMMA_4 = "<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\nHello!<turn|>\n<|turn>user\nBye<turn|>\n<|turn>model\nSee you<turn|>\n"
THINK = "<think>\n\n</think>\n\n"

# Template -> TWO as the model's publisher documents it (the tokenizer's begin token is <s>, its end token </s>).
PUBLISHED = {
    "chatml": "<s>" + CHATML,
    "chatml-bos": "<s>" + CHATML,
    "yi-chat": "<s>" + CHATML,
    "zephyr": "<s><|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello!</s>\n<|user|>\nBye</s>\n<|assistant|>\nSee you</s>\n",
    "mistral": "<s>[INST] Be brief.\n\nHi [/INST] Hello!</s>[INST] Bye [/INST] See you</s>",
    "llama": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello! </s><s>[INST] Bye [/INST] See you </s>",
    "vicuna": "<s>Be brief. USER: Hi ASSISTANT: Hello!</s>USER: Bye ASSISTANT: See you</s>",
    "vicuna_old": "<s>Be brief.\n### Human: Hi\n### Assistant: Hello!</s>\n### Human: Bye\n### Assistant: See you</s>\n",
    "alpaca": "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello!</s>\n\n### Instruction:\nBye\n\n### Response:\nSee you</s>\n\n",
    "unsloth": "<s>Be brief.\n>>> User: Hi\n>>> Assistant: Hello!</s>\n>>> User: Bye\n>>> Assistant: See you</s>\n",
    "gemma": GEMMA,
    "gemma_chatml": "<s>" + CHATML,
    "gemma-4": "<s><|turn>system\nBe brief." + GEMMA_4,
    "gemma-4-thinking": "<s><|turn>system\n<|think|>\nBe brief." + GEMMA_4,
    "llama-3": "<s>" + H("system", "Be brief.") + H("user", "Hi") + H("assistant", "Hello!") + H("user", "Bye") + H("assistant", "See you"),
    "llama-3.1": "<s>" + H("system", DATES + "Be brief.") + H("user", "Hi") + H("assistant", "Hello!") + H("user", "Bye") + H("assistant", "See you"),
    "phi-3": "<s><|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello!<|end|>\n<|user|>\nBye<|end|>\n<|assistant|>\nSee you<|end|>\n",
    "phi-4": "<s><|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>Hello!<|im_end|>"
    "<|im_start|>user<|im_sep|>Bye<|im_end|><|im_start|>assistant<|im_sep|>See you<|im_end|>",
    "qwen-2.5": "<s>" + CHATML,
    "qwen-3": "<s>" + CHATML.replace("See you", THINK + "See you"),
    "qwen3-instruct": "<s>" + CHATML,
    "qwen3-thinking": "<s>" + CHATML.replace("See you", THINK + "See you"),
    "gpt-oss": "<s>" + OSS + "<|start|>developer<|message|># Instructions\n\nBe brief.\n\n<|end|><|start|>user<|message|>Hi<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Hello!<|end|><|start|>user<|message|>Bye<|end|>"
    "<|start|>assistant<|channel|>final<|message|>See you<|return|>",
    "lfm-2": "<s>" + CHATML,
    "lfm-2.5": "<s>" + CHATML,
    "starling": "<s>GPT4 Correct System: Be brief.<|end_of_turn|>GPT4 Correct User: Hi<|end_of_turn|>GPT4 Correct Assistant: Hello!<|end_of_turn|>"
    "GPT4 Correct User: Bye<|end_of_turn|>GPT4 Correct Assistant: See you<|end_of_turn|>",
}  # fmt: skip

# What stands between the last question and the answer when the model is used, and the default system texts.
PROMPTS = {
    "mistral": "<s>[INST] Hi [/INST]",
    "llama": "<s>[INST] Hi [/INST]",
    "vicuna": "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: Hi ASSISTANT:",
    "vicuna_old": "<s>A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the human's questions.\n### Human: Hi\n### Assistant:",
    "alpaca": "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nHi\n\n### Response:\n",
    "unsloth": "<s>You are a helpful assistant to the user\n>>> User: Hi\n>>> Assistant:",
    "gemma": "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "llama-3": "<s>" + H("user", "Hi") + "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "llama-3.1": "<s>" + H("system", DATES) + H("user", "Hi") + "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "qwen-2.5": "<s><|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "qwen-3": "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "qwen3-thinking": "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n",
    "gemma-4": "<s><|turn>user\nHi<turn|>\n<|turn>model\n",
    "gemma-4-thinking": "<s><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n",
    "phi-4": "<s><|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>",
    "zephyr": "<s><|user|>\nHi</s>\n<|assistant|>\n",
    "starling": "<s>GPT4 Correct User: Hi<|end_of_turn|>GPT4 Correct Assistant:",
    "gpt-oss": "<s>" + OSS + "<|start|>user<|message|>Hi<|end|><|start|>assistant",
}  # fmt: skip


def test_every_known_name_is_there():
    assert [name for name in NAMES if find_template(name) is None] == []
    assert not set(ALIASES) & set(TEMPLATES)
    assert set(PUBLISHED) == set(TEMPLATES)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_conversation_as_published(fresh, name):
    template = fitted(fresh, name)
    expected = PUBLISHED[name]
    if template.own_end is False and fresh.eos_token != "</s>":
        expected = expected.replace("</s>", fresh.eos_token)
    assert fresh.apply_chat_template(TWO, tokenize=False) == expected


def test_gemmas_markers_stand_in_for_those_of_chatml(folder, tmp_path):
    for path in folder.iterdir():
        text = path.read_bytes().replace(b"<|im_start|>", b"<start_of_turn>").replace(b"<|im_end|>", b"<end_of_turn>")
        (tmp_path / path.name).write_bytes(text)
    tokenizer, choice = load_tokenizer(tmp_path, template="gemma_chatml")
    expected = "<s>" + CHATML.replace("<|im_start|>", "<start_of_turn>").replace("<|im_end|>", "<end_of_turn>")
    assert tokenizer.apply_chat_template(TWO, tokenize=False) == expected
    assert tokenizer.eos_token == "<end_of_turn>" and any("written as '<end_of_turn>'" in r for r in choice.repairs)


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_a_prompt_as_published(fresh, name):
    fitted(fresh, name)
    assert fresh.apply_chat_template(ONE[:1], tokenize=False, add_generation_prompt=True) == PROMPTS[name]


def _runs(tokenizer, row):
    out, current = [], []
    for token, label in zip([*row.input_ids, None], [*row.labels, -100], strict=True):
        assert label in (-100, token)
        if label == -100:
            out, current = (out + [current], []) if current else (out, [])
        else:
            current.append(token)
    return [tokenizer.decode(run) for run in out]


def _text(generator):
    alphabet = "ab cd\n  .,é水😀\t<|>{}[]'\"0123#:/"
    return "".join(generator.choice(alphabet) for _ in range(generator.randrange(1, 40)))


def _expected(tokenizer, template, conversation):
    """Each answer as the template writes it, with what the model writes before it and the marker that ends it."""
    found = []
    last = max(i for i, turn in enumerate(conversation) if turn["role"] == "assistant")
    for index, turn in enumerate(conversation):
        if turn["role"] != "assistant":
            continue
        content = turn["content"].strip() if template.trims else turn["content"]
        lead = template.lead if "think" not in template.lead or index == last else ""
        end = tokenizer.eos_token
        if template.name == "llama":
            end = " " + end
        if template.name == "gpt-oss" and index != last:
            end = ""  # <|end|> does not stop the model, so it is not taught
        found.append(lead + content + end)
    return found


@pytest.mark.parametrize("known", [True, False], ids=["markers in the vocabulary", "markers as text"])
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_labels_kept_are_the_answers_and_their_end(fresh, name, known):
    """Random conversations; decoding the kept labels gives each answer and its end marker, nothing else."""
    template = fitted(fresh, name) if known else find_template(name)
    if not known:
        apply_template(fresh, template)
    renderer = Renderer(fresh)
    generator = random.Random(name)
    for _ in range(25):
        conversation = chat(("system", _text(generator))) if generator.random() < 0.3 else []
        for _ in range(generator.randrange(1, 4)):
            conversation += chat(("user", _text(generator)), ("assistant", _text(generator)))
        rendered = renderer.render(conversation, where="test:1")
        row = tokenize_conversations(fresh, [rendered])[0]
        assert _runs(fresh, row) == _expected(fresh, template, conversation)
        assert fresh.decode(row.input_ids) == rendered.text


def test_the_check_above_can_fail(fresh):
    template = fitted(fresh, "llama-3.1")
    rendered = Renderer(fresh).render(TWO, where="test:1")
    row = tokenize_conversations(fresh, [rendered])[0]
    row.labels[row.labels.index(fresh.eos_token_id)] = -100
    assert _runs(fresh, row) != _expected(fresh, template, TWO)


def test_the_end_marker_becomes_the_end_token_or_stays(fresh):
    fitted(fresh, "llama-3.1", map_eos_token=False)
    assert fresh.eos_token == "</s>"
    fitted(fresh, "llama-3.1")
    assert fresh.eos_token == "<|eot_id|>"


def test_a_missing_end_marker_is_written_as_the_end_token_and_said(fresh):
    repairs = apply_template(fresh, TEMPLATES["llama-3.1"])
    assert any("turns end with '</s>'" in repair for repair in repairs)
    assert any("written as text" in repair and "<|start_header_id|>" in repair for repair in repairs)
    assert "<|eot_id|>" not in fresh.apply_chat_template(TWO, tokenize=False)


def test_a_system_text_of_ones_own(fresh):
    fitted(fresh, "qwen-2.5", system='Say "ok".')
    assert fresh.apply_chat_template(ONE, tokenize=False).startswith('<s><|im_start|>system\nSay "ok".<|im_end|>\n')
    assert "Say" not in fresh.apply_chat_template(TWO, tokenize=False)


def test_messages_with_other_key_names(fresh):
    fitted(fresh, "llama-3.1", mapping={"role": "from", "content": "value", "user": "human", "assistant": "gpt"})
    shared = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]
    assert fresh.apply_chat_template(shared, tokenize=False) == fresh.apply_chat_template(ONE, tokenize=False)


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALLS = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "Four."},
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "call", "result"),
    [
        ("llama-3.1", '{"name": "add", "parameters": {"a": 2}}<|eot_id|>', "ipython<|end_header_id|>\n\n4<|eot_id|>"),
        ("qwen-2.5", '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>', "<tool_response>\n4\n</tool_response>"),
        ("qwen-3", '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>', "<tool_response>\n4\n</tool_response>"),
        ("lfm-2", "<|tool_call_start|>[add(a=2)]<|tool_call_end|><|im_end|>", "<|tool_response_start|>4<|tool_response_end|>"),
        ("lfm-2.5", "<|tool_call_start|>[add(a=2)]<|tool_call_end|><|im_end|>", "<|im_start|>tool\n4<|im_end|>"),
    ],
)  # fmt: skip
def test_tools_as_published(fresh, name, call, result):
    fitted(fresh, name)
    text = fresh.apply_chat_template(CALLS, tools=TOOLS, tokenize=False)
    assert call in text and result in text and '"name": "add"' in text.partition("2+2?")[0]


def test_reasoning_of_qwen_stands_before_the_last_answer(fresh):
    fitted(fresh, "qwen-3")
    turns = [ONE[0], {"role": "assistant", "content": "Hello!", "reasoning_content": "a greeting"}]
    assert "<think>\na greeting\n</think>\n\nHello!<|im_end|>" in fresh.apply_chat_template(turns, tokenize=False)
    prompt = fresh.apply_chat_template(ONE[:1], tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert prompt.endswith("<|im_start|>assistant\n" + THINK)


@pytest.mark.parametrize("name", ["mistral", "llama"])
def test_formats_of_alternating_turns_refuse_others(fresh, name):
    fitted(fresh, name)
    with pytest.raises(DataError) as caught:
        Renderer(fresh).render([*ONE, ONE[1]], where="a.jsonl:1")
    assert caught.value.code == "data-template-refused"


CUSTOM = {
    "alpaca, two turns": (
        "{SYSTEM}\n\n### Instruction:\n{INPUT}\n\n### Response:\n{OUTPUT}\n\n### Instruction:\n{INPUT}\n\n### Response:\n{OUTPUT}",
        "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello!</s>\n\n### Instruction:\nBye\n\n### Response:\nSee you</s>",
    ),
    "chatml": (
        "<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{INPUT}<|im_end|>\n<|im_start|>assistant\n{OUTPUT}<|im_end|>\n"
        "<|im_start|>user\n{INPUT}<|im_end|>\n<|im_start|>assistant\n{OUTPUT}<|im_end|>\n",
        "<s>" + CHATML,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CUSTOM)
def test_a_template_written_as_an_example(fresh, name):
    text, expected = CUSTOM[name]
    use_template(fresh, text)
    assert fresh.apply_chat_template(TWO, tokenize=False) == expected
    row = tokenize_conversations(fresh, [Renderer(fresh).render(TWO, where="test:1")])[0]
    end = "<|im_end|>" if "im_end" in expected else "</s>"
    assert _runs(fresh, row) == ["Hello!" + end, "See you" + end]


def test_a_blank_before_the_answer_belongs_to_it(fresh):
    use_template(fresh, "Q: {INPUT}\nA: {OUTPUT}")
    assert fresh.apply_chat_template(ONE[:1], tokenize=False, add_generation_prompt=True) == "<s>Q: Hi\nA:"
    row = tokenize_conversations(fresh, [Renderer(fresh).render(ONE, where="test:1")])[0]
    assert _runs(fresh, row) == [" Hello!</s>"]


def test_an_example_with_one_pair_is_for_one_turn(fresh):
    use_template(fresh, "Q: {INPUT}\nA: {OUTPUT}")
    assert fresh.apply_chat_template(ONE, tokenize=False) == "<s>Q: Hi\nA: Hello!</s>"
    with pytest.raises(DataError) as caught:
        Renderer(fresh).render(TWO[1:], where="a.jsonl:1")
    assert "twice" in caught.value.problems[0].why


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{OUTPUT} {INPUT}", "in this order"),
        ("{INPUT} only", "in this order"),
        ("{INPUT}a{OUTPUT}b{INPUT}c{OUTPUT}b", "differs"),
        ("{INPUT}a{OUTPUT} {SYSTEM}", "before the first"),
    ],
)
def test_an_example_that_cannot_be_read(fresh, text, why):
    with pytest.raises(DataError) as caught:
        use_template(fresh, text)
    assert caught.value.code == "template-invalid" and why in caught.value.problems[0].why


def test_aliases_and_examples_in_a_job(folder):
    tokenizer, choice = load_tokenizer(folder, template="llama-3.3")
    assert choice.name == "llama-3.1" and tokenizer.chat_template.count("Cutting Knowledge") == 1
    assert load_tokenizer(folder, template="Q: {INPUT}\nA: {OUTPUT}")[1].name == "custom"

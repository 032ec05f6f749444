"""Conversations with tool calls, tool results and reasoning: understood in their usual shapes, and masked right."""

from __future__ import annotations

import json

import pytest
from dropforge.data.convert import Conversation, convert
from dropforge.data.detect import detect
from dropforge.data.render import Renderer
from dropforge.data.rows import Row
from dropforge.data.tokenize import tokenize_conversations
from dropforge.errors import DataError
from dropforge.models.builtin import build_builtin
from dropforge.models.templates import TEMPLATES
from dropforge.models.templates.apply import apply_template
from transformers import AutoTokenizer

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
TURNS = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Gladly."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    build_builtin("tiny-llama", folder)
    return folder


@pytest.fixture
def use(folder):
    def make(name):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": list(TEMPLATES[name].markers)})
        apply_template(tokenizer, TEMPLATES[name])
        return tokenizer

    return make


def runs(tokenizer, turns, tools=TOOLS):
    row = tokenize_conversations(tokenizer, [Renderer(tokenizer).render(turns, where="a:1", tools=tools)])[0]
    out, current = [], []
    for token, label in zip([*row.input_ids, None], [*row.labels, -100], strict=True):
        if label == -100:
            out, current = (out + [current], []) if current else (out, [])
        else:
            current.append(token)
    return [tokenizer.decode(run) for run in out]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("qwen-2.5", '\n<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call><|im_end|>'),
        ("qwen-3", '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call><|im_end|>'),
        ("llama-3.1", '{"name": "add", "parameters": {"a": 2, "b": 2}}<|eot_id|>'),
        ("lfm-2", "<|tool_call_start|>[add(a=2, b=2)]<|tool_call_end|><|im_end|>"),
        ("gemma-4", "<|tool_call>call:add{a:2,b:2}<tool_call|><|tool_response>"),
        (
            "gpt-oss",
            '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 2, "b": 2}<|call|>',
        ),
    ],
)
def test_calls_and_answers_are_learnt_and_results_are_not(use, name, call):
    tokenizer = use(name)
    end = tokenizer.eos_token
    found = runs(tokenizer, TURNS)
    lead = {"gpt-oss": "<|channel|>final<|message|>"}.get(name, "")
    last = "<think>\n\n</think>\n\nGladly." if name == "qwen-3" else lead + "Gladly."
    first = lead + "It is 4." + ("" if name == "gpt-oss" else end)  # earlier answers end with another marker there
    assert [found[0].removeprefix("\n"), *found[1:]] == [call.removeprefix("\n"), first, last + end]


def test_a_text_beside_a_call_reasoning_and_two_results(use):
    """What the model writes before a call is learnt with it, in its order; results and names are the environment's."""
    turns = [
        TURNS[0],
        {"role": "assistant", "content": "Let me see.", "reasoning_content": "Add.", "tool_calls": [CALL]},
        {"role": "tool", "content": "4", "name": "add"},
        {"role": "assistant", "content": "It is 4.", "reasoning_content": "Done."},
    ]
    assert runs(use("gpt-oss"), turns) == [
        "<|channel|>analysis<|message|>Add.<|end|><|start|>assistant<|channel|>commentary<|message|>Let me see.<|end|>"
        '<|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 2, "b": 2}<|call|>',
        "<|channel|>analysis<|message|>Done.<|end|><|start|>assistant<|channel|>final<|message|>It is 4.<|return|>",
    ]
    assert runs(use("gemma-4"), turns) == [
        "<|channel>thought\nAdd.\n<channel|>Let me see.<|tool_call>call:add{a:2,b:2}<tool_call|><|tool_response>",
        "<|channel>thought\nDone.\n<channel|>It is 4.<turn|>",
    ]
    both = [*turns[:1], {**turns[1], "tool_calls": [CALL, CALL]}, turns[2], turns[2], turns[3]]
    assert len(runs(use("gemma-4"), both)) == 2
    with pytest.raises(DataError, match="one tool call per turn"):
        runs(use("gpt-oss"), both)


def test_reasoning_is_learnt_where_the_template_writes_it(use):
    tokenizer = use("qwen-3")
    turns = [
        TURNS[0],
        {"role": "assistant", "content": "4", "reasoning_content": "two and two", "thinking": "two and two"},
    ]
    assert runs(tokenizer, turns, tools=None) == ["<think>\ntwo and two\n</think>\n\n4<|im_end|>"]
    earlier = [*turns, *TURNS[4:]]
    rendered = Renderer(tokenizer).render(earlier, where="a:1")
    assert rendered.rewritten and "two and two" not in rendered.text  # as published: earlier reasoning is left out
    assert runs(tokenizer, earlier, tools=None) == ["4<|im_end|>", "<think>\n\n</think>\n\nGladly.<|im_end|>"]


def test_reasoning_of_harmony(use):
    tokenizer = use("gpt-oss")
    turns = [TURNS[0], {"role": "assistant", "content": "4", "reasoning_content": "easy"}]
    assert runs(tokenizer, turns, tools=None) == [
        "<|channel|>analysis<|message|>easy<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"
    ]


def test_a_template_that_writes_no_tools_refuses_them(use):
    tokenizer = use("chatml")
    for turns, tools in ((TURNS, None), ([TURNS[0], TURNS[3]], TOOLS)):
        with pytest.raises(DataError) as caught:
            Renderer(tokenizer).render(turns, where="a.jsonl:7", tools=tools)
        assert (caught.value.code, caught.value.problems[0].where) == ("data-template-refused", "a.jsonl:7")


def read(fields, forced="auto"):
    return convert(Row(file="a", number=1, fields=fields), detect([fields], file="a", forced=forced))


SHAPES = {
    "arguments as text": {"tool_calls": [{"function": {"name": "add", "arguments": json.dumps({"a": 2, "b": 2})}}]},
    "not nested": {"tool_calls": [{"name": "add", "arguments": {"a": 2, "b": 2}}]},
    "all as text": {"tool_calls": json.dumps([CALL])},
    "old": {"function_call": {"name": "add", "arguments": '{"a": 2, "b": 2}'}},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_calls(shape):
    fields = {
        "messages": [TURNS[0], {"role": "assistant", "content": None, **SHAPES[shape]}],
        "tools": json.dumps(TOOLS),
    }
    done = read(fields)
    assert isinstance(done, Conversation)
    assert done.turns[1]["tool_calls"] == [CALL] and done.tools == TOOLS


def test_sharegpt_with_calls():
    fields = {
        "conversations": [
            {"from": "human", "value": "What is 2+2?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 2}}'},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "It is 4."},
        ],
        "tools": [TOOLS[0]["function"]],
    }
    done = read(fields)
    assert done.turns == TURNS[:4] and done.tools == TOOLS


@pytest.mark.parametrize(
    ("turn", "why"),
    [
        ({"tool_calls": [{"arguments": {}}]}, "needs a name"),
        ({"tool_calls": "{"}, "not JSON"),
        ({"tool_calls": [{"name": "add", "arguments": "[1]"}]}, "not an object"),
    ],
)
def test_bad_calls_are_named(turn, why):
    with pytest.raises(DataError) as caught:
        read({"messages": [TURNS[0], {"role": "assistant", "content": "", **turn}]})
    assert caught.value.code == "data-row-invalid" and why in caught.value.problems[0].why


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_fields(key):
    done = read({"messages": [TURNS[0], {"role": "assistant", "content": "4", key: "easy"}]})
    assert done.turns[1]["reasoning_content"] == done.turns[1]["thinking"] == "easy"


def test_conversations_as_text_in_a_csv_cell(bench):
    cell = json.dumps(TURNS[4:]).replace('"', '""')
    data = bench.prepare(bench.write("a.csv", f'id,messages\n1,"{cell}"\n'))
    assert bench.learnt(data.train[0]) == "Gladly.<|im_end|>"


PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "Where."},
        "unit": {"type": "string", "enum": ["c", "f"], "default": "c"},
        "days": {"type": "array", "items": {"type": "integer"}},
        "near": {"type": "object", "properties": {"sea": {"type": "boolean"}}, "required": ["sea"]},
    },
    "required": ["city"],
}


@pytest.mark.parametrize(
    ("name", "written"),
    [
        (
            "gpt-oss",
            "# Tools\n\n## functions\n\nnamespace functions {\n\n// The weather.\ntype weather = (_: {\n// Where.\ncity: string,\n"
            'unit?: "c" | "f", // default: c\ndays?: number[],\nnear?: {\nsea: boolean,\n},\n}) => any;\n\n'
            "type now = () => any;\n\n} // namespace functions<|end|>",
        ),
        (
            "gemma-4",
            '<|tool>declaration:weather{description:<|"|>The weather.<|"|>,parameters:{properties:{'
            'city:{description:<|"|>Where.<|"|>,type:<|"|>STRING<|"|>},'
            'days:{items:{type:<|"|>INTEGER<|"|>},type:<|"|>ARRAY<|"|>},'
            'near:{properties:{sea:{type:<|"|>BOOLEAN<|"|>}},required:[<|"|>sea<|"|>],type:<|"|>OBJECT<|"|>},'
            'unit:{enum:[<|"|>c<|"|>,<|"|>f<|"|>],type:<|"|>STRING<|"|>}},'
            'required:[<|"|>city<|"|>],type:<|"|>OBJECT<|"|>}}<tool|>'
            '<|tool>declaration:now{description:<|"|><|"|>}<tool|><turn|>',
        ),
    ],
)
def test_definitions_in_the_language_of_the_model(use, name, written):
    """As https://cookbook.openai.com/articles/openai-harmony and ai.google.dev/gemma/docs (Gemma 4) write them."""
    weather = {"name": "weather", "description": "The weather.", "parameters": PARAMETERS}
    tools = [{"type": "function", "function": weather}, {"type": "function", "function": {"name": "now"}}]
    text = use(name).apply_chat_template(TURNS, tools=tools, tokenize=False)
    assert written in text.partition("What is 2+2?")[0]

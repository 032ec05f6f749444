"""Labels against the text, token by token: what is kept is exactly the answers with their end token."""

from __future__ import annotations

import random

import pytest
from dropforge.data.render import Renderer
from dropforge.data.tokenize import tokenize_conversations
from dropforge.errors import DataError

# Shapes of published templates, shortened: a system text inside the first user turn and trimmed contents (Llama 2), another name
# for the assistant (Gemma), an empty reasoning block in the last answer only and reasoning split off (Qwen3), no markers (Alpaca).
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set sys = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set sys = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '<s>[INST] ' + (sys if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' </s>' }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
QWEN_3 = (
    "{% for m in messages %}{% set c = m['content'] %}{% set r = '' %}"
    "{% if m['role'] == 'assistant' and '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set c = c.split('</think>')[-1].lstrip() %}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}<think>\n{{ r }}\n</think>\n\n{% endif %}"
    "{{ c }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALPACA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}### Instruction:\n{{ m['content'] }}\n\n"
    "{% elif m['role'] == 'assistant' %}### Response:\n{{ m['content'] }}{{ eos_token }}\n\n"
    "{% else %}{{ m['content'] }}\n\n{% endif %}{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}"
)


class _Turned:
    """A tokenizer with another chat template, without changing the shared one."""

    def __init__(self, tokenizer, template):
        self.tokenizer, self.old, self.template = tokenizer, tokenizer.chat_template, template

    def __enter__(self):
        self.tokenizer.chat_template = self.template
        return self.tokenizer

    def __exit__(self, *details):
        self.tokenizer.chat_template = self.old


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def mask(tokenizer, conversation, **options):
    rendered = Renderer(tokenizer).render(conversation, where="test:1")
    return rendered, tokenize_conversations(tokenizer, [rendered], **options)[0]


def runs(tokenizer, row):
    """Each unbroken run of kept labels as text."""
    out, current = [], []
    for token, label in zip(row.input_ids, row.labels, strict=True):
        assert label in (-100, token)
        if label == -100:
            out, current = (out + [current], []) if current else (out, [])
        else:
            current.append(token)
    return [tokenizer.decode(run) for run in (out + [current] if current else out)]


CONVERSATIONS = {
    "one turn": turns(("user", "hello"), ("assistant", "good morning")),
    "system": turns(("system", "be brief"), ("user", "hello"), ("assistant", "yes")),
    "many turns": turns(
        ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e"), ("assistant", "f")
    ),
    "same texts": turns(("user", "yes"), ("assistant", "yes"), ("user", "yes"), ("assistant", "yes")),
    "whitespace": turns(("user", "  a \n"), ("assistant", "\n\n  b  c \n\n"), ("user", "\t"), ("assistant", " d")),
    "unicode": turns(
        ("user", "水は? 👩‍👩‍👧 é e\u0301"), ("assistant", "H₂O — 물 ✓ 𝕏"), ("user", "ok"), ("assistant", "Ω\u200bß")
    ),
    "markers in the text": turns(("user", "write assistant\n"), ("assistant", "user\nassistant\n")),
    "ends with a question": turns(("user", "a"), ("assistant", "b"), ("user", "and now?")),
    "two answers in a row": turns(("user", "a"), ("assistant", "b"), ("assistant", "c")),
    "answer first": turns(("assistant", "welcome"), ("user", "a"), ("assistant", "b")),
}


def answers(conversation):
    return [turn["content"] for turn in conversation if turn["role"] == "assistant"]


def normal(tokenizer, text):
    """Qwen's tokenizer composes characters (NFC)."""
    return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_kept_labels_are_the_answers_with_their_end_token(tokenizer, name):
    rendered, row = mask(tokenizer, CONVERSATIONS[name])
    expected = [normal(tokenizer, answer) + "<|im_end|>" for answer in answers(CONVERSATIONS[name])]
    assert runs(tokenizer, row) == expected
    assert row.input_ids == tokenizer(rendered.text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_masked_prefix_is_what_the_model_is_given_when_used(tokenizer, name):
    """Everything before an answer equals the tokens of the prompt with the generation marker."""
    conversation = CONVERSATIONS[name]
    _, row = mask(tokenizer, conversation)
    last = max(i for i, turn in enumerate(conversation) if turn["role"] == "assistant")
    if last == 0:
        return
    prompt = tokenizer.apply_chat_template(conversation[:last], add_generation_prompt=True, return_dict=False)
    if (
        name != "whitespace"
    ):  # a leading line break melts into the marker's own; then the characters are equal, not the tokens
        assert row.input_ids[: len(prompt)] == prompt
        assert row.labels[len(prompt)] != -100 == row.labels[len(prompt) - 1]


def test_everything_keeps_all_tokens(tokenizer):
    _, row = mask(tokenizer, CONVERSATIONS["many turns"], everything=True)
    assert row.labels == row.input_ids


def _random_text(generator):
    alphabet = "ab cd\n  .,é水😀\u0301\t<|>{}[]'\"0123"
    return "".join(generator.choice(alphabet) for _ in range(generator.randrange(1, 40)))


def test_random_conversations(tokenizer):
    generator = random.Random(7)
    for _ in range(200):
        conversation = turns(("system", _random_text(generator))) if generator.random() < 0.3 else []
        for _ in range(generator.randrange(1, 4)):
            conversation += turns(("user", _random_text(generator)), ("assistant", _random_text(generator)))
        _, row = mask(tokenizer, conversation)
        # A combining sign at the edge composes with its neighbour under NFC, so such answers are compared without it.
        found = [text.removesuffix("<|im_end|>") for text in runs(tokenizer, row)]
        for text, answer in zip(found, answers(conversation), strict=True):
            if not answer.startswith("\u0301"):
                assert text == normal(tokenizer, answer)


@pytest.mark.parametrize(
    ("template", "lead", "end", "trims"),
    [(LLAMA_2, " ", " </s>", True), (GEMMA, "", "<|im_end|>", True), (ALPACA, "", "<|im_end|>", False)],
    ids=["llama-2", "gemma", "alpaca"],
)
@pytest.mark.parametrize("name", ["one turn", "system", "many turns", "same texts", "whitespace"])
def test_templates_of_other_families(tokenizers, template, lead, end, trims, name):
    with _Turned(tokenizers["tiny-llama"], template) as tokenizer:
        _, row = mask(tokenizer, CONVERSATIONS[name])
        expected = [lead + (answer.strip() if trims else answer) + end for answer in answers(CONVERSATIONS[name])]
        assert runs(tokenizer, row) == expected


def test_a_reasoning_block_that_only_the_last_answer_has(tokenizers):
    with _Turned(tokenizers["tiny-qwen3"], QWEN_3) as tokenizer:
        rendered, row = mask(tokenizer, CONVERSATIONS["many turns"])
        assert runs(tokenizer, row) == ["b<|im_end|>", "d<|im_end|>", "<think>\n\n</think>\n\nf<|im_end|>"]
        assert not rendered.rewritten


def test_reasoning_that_the_template_splits_off(tokenizers):
    conversation = turns(("user", "2+2?"), ("assistant", "<think>two and two</think>4"))
    with _Turned(tokenizers["tiny-qwen3"], QWEN_3) as tokenizer:
        rendered, row = mask(tokenizer, conversation)
        assert runs(tokenizer, row) == ["<think>\ntwo and two\n</think>\n\n4<|im_end|>"]


def test_a_template_that_changes_contents_is_followed_and_reported(tokenizers):
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | upper if '@' not in m['content'] "
        "else m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with _Turned(tokenizers["tiny-llama"], template) as tokenizer:
        rendered, row = mask(tokenizer, CONVERSATIONS["many turns"])
        assert runs(tokenizer, row) == ["B<|im_end|>", "D<|im_end|>", "F<|im_end|>"]
        assert rendered.rewritten


@pytest.mark.parametrize(
    ("template", "code"),
    [
        (LLAMA_2, "data-template-refused"),
        ("{% for m in messages %}{{ m['role'] }}<|im_end|>{% endfor %}", "data-template-unstable"),
        ("{% for m in messages | reverse %}{{ m['content'] }}<|im_end|>{% endfor %}", "data-template-unstable"),
    ],
)
def test_templates_that_cannot_be_followed_name_the_row(bench, template, code):
    with _Turned(bench.tokenizer, template):
        rows = [{"messages": CONVERSATIONS["two answers in a row"]}]
        error = bench.error(bench.jsonl("a.jsonl", rows))
    assert (error.code, error.problems[0].where) == (code, "a.jsonl:1")


def test_a_template_without_an_end_token_is_warned_about(bench):
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    with _Turned(bench.tokenizer, template):
        data = bench.prepare(bench.jsonl("a.jsonl", [{"messages": CONVERSATIONS["one turn"]}]))
    assert any("will not learn when to stop" in warning for warning in data.report.warnings)


def test_a_wrong_span_would_be_seen(tokenizer):
    """The comparison above can fail: a mask moved by one token is not accepted."""
    _, row = mask(tokenizer, CONVERSATIONS["one turn"])
    first = next(i for i, label in enumerate(row.labels) if label != -100)
    row.labels[first - 1] = row.input_ids[first - 1]
    assert runs(tokenizer, row) != ["good morning<|im_end|>"]


def test_unknown_errors_of_a_template_keep_their_text(tokenizers):
    with (
        _Turned(tokenizers["tiny-llama"], "{{ messages[0]['missing'].strip() }}") as tokenizer,
        pytest.raises(DataError) as caught,
    ):
        Renderer(tokenizer)
    assert caught.value.code == "data-template-refused"

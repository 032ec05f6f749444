"""Conversations written by joining are what the template renders, for every template and any content."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from dropforge.data.opaque import LookedAtError, Watched
from dropforge.data.render import COMPARED_EVERY, Renderer
from dropforge.errors import DataError
from dropforge.models.templates import TEMPLATES
from dropforge.models.tokenizer import use_template

PIECES = (
    "a", "the river", " ", "\n", "\t", "é", "水", "{{ x }}", "{% if %}", "<think>", "</think>", "'", '"', "&", "<|im_end|>",
    "<tool_response>", "assistant", "\u00a0", "0",
)  # fmt: skip
ROLES = (
    ("user", "assistant"),
    ("system", "user", "assistant"),
    ("user", "assistant", "user", "assistant"),
    ("system", "user", "assistant", "user", "assistant"),
)


def conversations(count, seed=11):
    generator = random.Random(seed)
    for _ in range(count):
        yield [
            {"role": role, "content": "".join(generator.choices(PIECES, k=generator.randrange(1, 9)))}
            for role in generator.choice(ROLES)
        ]


@pytest.fixture
def turned(tokenizers):
    tokenizer = tokenizers["tiny-llama"]
    old = tokenizer.chat_template, tokenizer.eos_token

    def turn(template):
        if template in TEMPLATES:
            use_template(tokenizer, template)
        else:
            tokenizer.chat_template = template
        return tokenizer

    yield turn
    tokenizer.chat_template, tokenizer.eos_token = old


@pytest.mark.parametrize("name", TEMPLATES)
def test_joined_is_rendered(turned, name):
    tokenizer = turned(name)
    renderer = Renderer(tokenizer)
    seen = 0
    for conversation in conversations(60):
        try:
            made = renderer.render(conversation, where="test:1")
        except DataError as error:
            assert error.code in {"data-template-refused", "data-template-unstable"}
            continue
        seen += 1
        assert made.text == tokenizer.apply_chat_template(conversation, tokenize=False)
    assert seen > 40
    assert any(shape.forms for shape in renderer._shapes.values()), "no row of this template is joined"


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", ["", " \n"])
def test_a_system_turn_that_says_nothing(turned, name, system):
    """Data sets are full of them; templates write or leave out the turn."""
    tokenizer = turned(name)
    turns = [
        {"role": role, "content": text}
        for role, text in (("system", system), ("user", "What is it?"), ("assistant", "A river."))
    ]
    made = Renderer(tokenizer).render(turns, where="test:1")
    assert made.text == tokenizer.apply_chat_template(turns, tokenize=False)
    assert "A river." in made.text[made.spans[0][0] : made.spans[0][1]]


ASKS = {
    "contains": "{{ '[x]' if 'river' in m['content'] else '[y]' }}{{ m['content'] }}",
    "starts": "{{ m['content'].lstrip() if m['content'].startswith('\\n') else m['content'] }}",
    "empty": "{% if m['content'] | trim %}{{ m['content'] }}{% endif %}",
    "equal": "{{ 'nothing' if m['content'] == '0' else m['content'] }}",
    "strips some": "{{ m['content'].strip('\\n') }}",
    "both ends": "{{ m['content'].lstrip('\\n').rstrip() }}",
    "asks the stripped": "{{ 'A' if m['content'].strip().endswith('0') else 'B' }}{{ m['content'] }}",
}


@pytest.mark.parametrize("name", ASKS)
def test_templates_that_ask(turned, name):
    tokenizer = turned("{% for m in messages %}<|im_start|>" + ASKS[name] + "<|im_end|>{% endfor %}")
    renderer = Renderer(tokenizer)
    for conversation in conversations(200):
        rendered = tokenizer.apply_chat_template(conversation, tokenize=False)
        try:
            made = renderer.render(conversation, where="test:1")
        except DataError:
            continue  # an answer that cannot be found is refused, not guessed
        assert made.text == rendered
    assert any(shape.forms for shape in renderer._shapes.values())


LOOKS = [
    "{{ c | upper }}",
    "{{ c | length }}",
    "{{ c[:3] }}",
    "{{ c | tojson }}",
    "{{ c.split(' ')[0] }}",
    "{{ c | e }}",
]


@pytest.mark.parametrize("look", LOOKS)
def test_templates_that_look_are_not_joined(turned, look):
    tokenizer = turned(
        "{% for m in messages %}{% set c = m['content'] %}<|im_start|>{{ c }}" + look + "<|im_end|>{% endfor %}"
    )
    renderer = Renderer(tokenizer)
    try:
        shape = renderer._shape(("user", "assistant"), "test:1")
    except DataError:
        return
    assert shape.forms is None


def test_a_row_that_would_be_written_in_another_way_is_an_error(turned):
    tokenizer = turned("chatml")
    renderer = Renderer(tokenizer)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    renderer.render(turns, where="test:1")
    shape = renderer._shapes["user", "assistant"]
    renderer._shapes["user", "assistant"] = replace(shape, pieces=("", *shape.pieces[1:]))
    with pytest.raises(DataError) as caught:
        for row in range(COMPARED_EVERY + 1):
            renderer.render(turns, where=f"test:{row}")
    assert caught.value.code == "data-template-unstable"


def test_joined_texts_cannot_be_asked():
    with pytest.raises(LookedAtError):
        bool("x" + Watched.of("y"))
    with pytest.raises(LookedAtError):
        (Watched.of("y") + "x").strip()
    with pytest.raises(LookedAtError):
        Watched.of("y") == Watched.of("y")  # noqa: B015

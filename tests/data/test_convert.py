"""Rows of every format as conversations."""

from __future__ import annotations

import datetime
from decimal import Decimal

import pytest
from dropforge.data.column_template import parse
from dropforge.data.convert import Conversation, convert
from dropforge.data.detect import Match, detect
from dropforge.data.rows import Row
from dropforge.data.values import to_text


def turns(fields, **options):
    row = Row(file="a", number=1, fields=fields)
    item = convert(row, detect([fields], file="a"), **options)
    assert isinstance(item, Conversation)
    return [(turn["role"], turn["content"]) for turn in item.turns]


def test_alpaca_joins_instruction_and_input_with_an_empty_line():
    fields = {"instruction": "Add.", "input": "2 and 3", "output": "5"}
    assert turns(fields) == [("user", "Add.\n\n2 and 3"), ("assistant", "5")]
    assert turns(fields | {"input": None}) == [("user", "Add."), ("assistant", "5")]


@pytest.mark.parametrize(
    ("written", "role"),
    [("human", "user"), ("User", "user"), (" gpt ", "assistant"), ("model", "assistant"), ("developer", "system")],
)
def test_roles_under_their_other_names(written, role):
    conversation = [{"from": "user", "value": "q"}, {"from": "gpt", "value": "a"}, {"from": written, "value": "x"}]
    assert turns({"conversations": conversation})[2] == (role, "x")


def test_text_parts_are_joined():
    content = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "three"}]
    assert turns({"messages": chat})[0] == ("user", "one two")


def test_prompt_and_completion_as_lists_of_messages():
    prompt, completion = [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "a"}]
    assert turns({"prompt": prompt, "completion": completion}) == [("user", "q"), ("assistant", "a")]
    assert turns({"prompt": prompt, "completion": "a"}) == [("user", "q"), ("assistant", "a")]
    assert turns({"prompt": "q", "completion": completion}) == [("user", "q"), ("assistant", "a")]


def test_the_system_message_of_the_spec_fills_in_where_there_is_none():
    pair = {"prompt": "q", "completion": "a"}
    assert turns(pair, system="S")[0] == ("system", "S")
    assert turns(pair | {"system": "own"}, system="S")[0] == ("system", "own")
    assert turns(pair | {"system": ""}, system="S")[0] == ("system", "S")
    chat = [
        {"role": "system", "content": "mine"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    assert turns({"messages": chat}, system="S")[0] == ("system", "mine")


# The documented grammar, on passengers with missing values.
PASSENGER = "[[The passenger embarked from {Embarked}.]][[\nThey are {Age} years old.]] They paid {Fare}. {{literally}}"


def passenger(**fields):
    return parse(PASSENGER).fill({"Embarked": "S", "Age": 22.0, "Fare": 7.25} | fields)


def test_column_templates():
    assert passenger() == "The passenger embarked from S.\nThey are 22 years old. They paid 7.25. {literally}"
    assert passenger(Age=float("nan")) == "The passenger embarked from S. They paid 7.25. {literally}"
    assert passenger(Embarked=None, Age="") == "They paid 7.25. {literally}"
    assert passenger(Fare=None).endswith("They paid . {literally}")
    assert parse("{a}[[ x {b}{a}]]").columns == ("a", "b")
    assert parse("[[{b}{a}]]").fill({"a": "1", "b": ""}) == ""
    assert parse("[[{b}{a}]]").fill({"a": "", "b": "1"}) == "1"
    assert parse("").fill({}) == ""


def test_columns_format_builds_question_and_answer(bench):
    name = bench.write("a.csv", "Country,River,Capital\nPeru,Rímac,Lima\nMalta,,Valletta\n")
    columns = {"prompt": "Capital of {Country}?[[ On the {River}?]]", "response": "Capital"}
    data = bench.prepare({"train": name, "format": {"columns": columns}})
    texts = [bench.tokenizer.decode(row["input_ids"]) for row in data.train]
    assert "user\nCapital of Peru? On the Rímac?<|im_end|>" in texts[0]
    assert "user\nCapital of Malta?<|im_end|>" in texts[1]
    assert bench.learnt(data.train[1]) == "Valletta<|im_end|>"
    both = bench.prepare(
        {"train": name, "format": {"columns": {"prompt": "{Country}", "response": "It is {Capital}."}}}
    )
    assert bench.learnt(both.train[0]) == "It is Lima.<|im_end|>"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""), (float("nan"), ""), ("  x ", "  x "), (True, "true"), (3, "3"), (3.0, "3"), (2.5, "2.5"), (1e300, "1e+300"),
        (Decimal("1.10"), "1.10"), (datetime.date(2024, 2, 29), "2024-02-29"),
        (datetime.datetime(2024, 2, 29), "2024-02-29"), (datetime.datetime(2024, 2, 29, 7, 45), "2024-02-29 07:45:00"),
    ],
)  # fmt: skip
def test_cells_as_text(value, text):
    assert to_text(value) == text


@pytest.mark.parametrize("value", ([1], {"a": 1}, b"x"))
def test_cells_that_are_no_text(value):
    with pytest.raises(TypeError):
        to_text(value)


def test_a_match_is_plain_data():
    assert Match(format="text", reason="r").columns == {}

"""The format found, and the reason given."""

from __future__ import annotations

import pytest
from dropforge.data.detect import FORMATS, NEEDS, detect
from dropforge.errors import DataError

TURN = [{"role": "user", "content": "q"}]
SHARE = [{"from": "human", "value": "q"}]

CASES = [
    ({"messages": TURN, "id": 1}, "messages", "'messages'"),
    ({"conversations": TURN}, "messages", "'conversations'"),
    ({"conversations": SHARE}, "sharegpt", "'from' and 'value'"),
    ({"instruction": "i", "input": "", "output": "o"}, "alpaca", "'instruction', 'output', 'input'"),
    ({"Instruction": "i", "Response": "o"}, "alpaca", "'Instruction', 'Response'"),
    ({"prompt": "p", "completion": "c"}, "prompt_completion", "'prompt' and 'completion'"),
    ({" Question ": "p", "ANSWER": "c"}, "prompt_completion", "' Question ' and 'ANSWER'"),
    ({"input": "p", "output": "c"}, "prompt_completion", "'input' and 'output'"),
    ({"user": "p", "assistant": "c"}, "prompt_completion", "'user' and 'assistant'"),
    ({"text": "t", "source": "s"}, "text", "'text'"),
    ({"content": "t"}, "text", "'content'"),
    # the more specific format wins
    ({"messages": TURN, "text": "t"}, "messages", "'messages'"),
    ({"instruction": "i", "output": "o", "text": "t"}, "alpaca", "'instruction'"),
]


@pytest.mark.parametrize(("fields", "form", "word"), CASES)
def test_format_and_reason(fields, form, word):
    match = detect([fields], file="a")
    assert match.format == form
    assert word in match.reason


def test_the_first_filled_value_decides():
    assert detect([{"messages": None}, {"messages": []}, {"messages": TURN}], file="a").format == "messages"


def test_a_forced_format_wins_over_detection():
    rows = [{"instruction": "i", "output": "o", "text": "t"}]
    assert detect(rows, file="a", forced="text").columns == {"text": "text"}


def test_preference_and_prompts_say_that_they_come_later():
    for fields in ({"chosen": "a", "rejected": "b", "prompt": "p"}, {"prompt": "p"}):
        with pytest.raises(DataError, match="from which answers cannot be learnt"):
            detect([fields], file="a")


def test_the_error_lists_columns_and_formats():
    with pytest.raises(DataError) as caught:
        detect([{f"column{i}": 1 for i in range(30)}], file="a.csv")
    text = str(caught.value)
    assert "'column0'" in text and "and 10 more" in text
    assert all(need in text for need in NEEDS.values())


def test_every_format_says_what_it_needs():
    assert list(NEEDS) == list(FORMATS)

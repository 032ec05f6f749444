"""Preference data in its usual shapes, verdicts, and prompts with answers."""

from __future__ import annotations

import pytest
from dropforge.data.preferences import prepare_examples
from dropforge.errors import DataError
from dropforge.spec import DataSpec


def prepare(bench, rows, **data):
    spec = DataSpec.model_validate({"train": bench.jsonl("p.jsonl", rows), **data})
    return prepare_examples(spec, spec.train, locate=bench.locate, log=bench.said.append)


def turn(role, content):
    return {"role": role, "content": content}


ASK, GOOD, BAD = turn("user", "Capital of Peru?"), turn("assistant", "Lima"), turn("assistant", "Rome")
EXPECTED = {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}
HH = "\n\nHuman: Capital of Peru?\n\nAssistant: {}"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Capital of Peru?", "chosen": "Lima", "rejected": "Rome"},
        {"question": "Capital of Peru?", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": "Capital of Peru?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"chosen": HH.format("Lima"), "rejected": HH.format("Rome")},
        {
            "chosen": [{"from": "human", "value": ASK["content"]}, {"from": "gpt", "value": "Lima"}],
            "rejected": [ASK, BAD],
        },
    ],
    ids=["texts", "messages", "prompt too", "whole conversations", "prompt repeated", "transcripts", "mixed keys"],
)
def test_pairs(bench, row):
    done = prepare(bench, [row])
    assert done.kind == "preference" and done.rows[0] == EXPECTED


def test_several_turns_before_the_answers(bench):
    before = [ASK, turn("assistant", "?"), turn("user", "Peru!")]
    done = prepare(bench, [{"chosen": [*before, GOOD], "rejected": [*before, BAD]}], system="Be brief.")
    assert done.rows[0]["prompt"] == [turn("system", "Be brief."), *before] and done.rows[0]["chosen"] == [GOOD]


@pytest.mark.parametrize(("label", "good"), [(True, True), (0, False), ("1", True), ("false", False)])
def test_verdicts(bench, label, good):
    done = prepare(bench, [{"prompt": "Capital of Peru?", "completion": "Lima", "label": label}])
    assert done.kind == "unpaired_preference"
    assert done.rows[0] == {"prompt": [ASK], "completion": [GOOD], "label": good}


def test_prompts_keep_their_answers(bench):
    done = prepare(bench, [{"question": "Capital of Peru?", "answer": "Lima", "level": 2}])
    assert done.kind == "prompt" and done.rows[0] == {"prompt": [ASK], "answer": "Lima", "level": 2}
    assert "'answer' the answers to be found" in bench.said[0]


def test_what_is_dropped_is_counted(bench):
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": "", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": ""},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    done = prepare(bench, rows)
    assert len(done.rows) == 1
    assert done.first[0] == ("p.jsonl:1", "chosen and rejected are the same")
    assert dict(done.dropped) == {
        "chosen and rejected are the same": 1,
        "the prompt is empty": 1,
        "rejected is empty": 1,
    }


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        ([{"chosen": "a", "rejected": "b"}], "data-row-invalid"),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}], "data-all-masked"),
        ([{"prompt": "a", "completion": "b", "label": True}, {"prompt": "a", "completion": "b", "label": "maybe"}], "data-row-invalid"),
        ([{"text": "a"}], "data-format-unknown"),
    ],
)  # fmt: skip
def test_errors(bench, rows, code):
    with pytest.raises(DataError) as caught:
        prepare(bench, rows)
    assert caught.value.code == code


def test_two_kinds_do_not_mix(bench):
    bench.jsonl("a.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    bench.jsonl("b.jsonl", [{"prompt": "a", "completion": "b", "label": True}])
    spec = DataSpec.model_validate({"train": ["a.jsonl", "b.jsonl"]})
    with pytest.raises(DataError) as caught:
        prepare_examples(spec, spec.train, locate=bench.locate)
    assert caught.value.code == "data-format-mixed"

"""Several sources in one set: shares, order, repetitions, and evaluation rows that must not be learnt."""

from __future__ import annotations

import random

import numpy as np
import pytest
from dropforge.data.mixture import interleaved
from dropforge.data.near import clusters, signature

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(200)]


def texts(bench, dataset):
    return [bench.learnt(row).removesuffix("<|im_end|>") for row in dataset]


def test_sources_are_spread_evenly():
    one, two = np.asarray([0, 1]), np.asarray([10, 11, 12, 13])
    assert interleaved([one, two]).tolist() == [10, 0, 11, 12, 1, 13]
    assert interleaved([]).tolist() == []


def test_every_beginning_of_a_mixture_has_its_shares(bench):
    a = bench.jsonl("a.jsonl", ROWS[:100])
    b = bench.jsonl("b.jsonl", ROWS[100:120])
    found = texts(bench, bench.prepare([a, b]).train)
    is_b = [int(text.split()[1]) >= 100 for text in found]
    for end in (12, 60, 120):
        assert abs(sum(is_b[:end]) - end / 6) <= 1


def test_proportional_weights_are_shares_and_lose_no_row(bench):
    a, b = bench.jsonl("a.jsonl", ROWS[:90]), bench.jsonl("b.jsonl", ROWS[90:100])
    data = {"train": [{"path": a, "weight": 3}, {"path": b, "weight": 1}], "mixing": "proportional"}
    prepared = bench.prepare(data)
    found = texts(bench, prepared.train)
    assert set(found) == {f"answer {i}" for i in range(100)}
    assert [source[3] for source in prepared.report.sources] == [90, 30] and len(found) == 120
    assert texts(bench, bench.prepare(data).train) == found


def test_exact_duplicates(bench):
    name = bench.jsonl("a.jsonl", ROWS[:50] + ROWS[:20] + [{"prompt": "Question 1!", "completion": "answer 1"}])
    assert bench.prepare(name).report.rows == 71
    report = bench.prepare({"train": name, "deduplicate": "exact"}).report
    assert (report.rows, report.duplicates) == (51, 20)
    assert any("20 rows dropped as repetitions" in warning for warning in report.warnings)


STORY = (
    "The old keeper of the lighthouse counted every ship that passed the cape at night, and wrote its name, its colours "
    "and the hour into a book that nobody but him had ever opened since the storm of eighteen hundred and ninety."
)


def test_near_duplicates(bench):
    rows = [
        {"prompt": "Tell me a story", "completion": STORY},
        {"prompt": "Tell me a story", "completion": STORY.replace("night", "dawn")},
        {"prompt": "tell me  a story.", "completion": STORY.upper()},
        {"prompt": "Tell me a story", "completion": STORY[::-1]},
    ]
    report = bench.prepare({"train": bench.jsonl("a.jsonl", rows), "deduplicate": "near"}).report
    assert (report.rows, report.duplicates) == (2, 2)


def test_signatures_tell_how_alike_texts_are():
    generator = random.Random(1)
    words = ["".join(generator.choices("abcdefghij", k=6)) for _ in range(400)]
    changed = list(words)
    for index in range(0, 400, 40):
        changed[index] = "changed"
    other = ["".join(generator.choices("abcdefghij", k=6)) for _ in range(400)]
    signatures = np.stack([signature(" ".join(text)) for text in (words, changed, other, words)])
    assert clusters(signatures).tolist() == [0, 0, 2, 0]
    assert (signature("") == signature("...")).all()


def test_the_split_keeps_rows_that_say_the_same_on_one_side(bench):
    loud = [{"prompt": row["prompt"].upper() + "?", "completion": row["completion"] + "."} for row in ROWS[:50]]
    data = bench.prepare({"train": bench.jsonl("a.jsonl", ROWS[:50] + loud), "eval": {"fraction": 0.2}})
    plain = [{text.rstrip(".") for text in texts(bench, rows)} for rows in (data.train, data.eval)]
    assert not plain[0] & plain[1] and len(data.eval) == 20


def test_the_split_keeps_near_duplicates_on_one_side(bench):
    rows = [{"prompt": f"{i} {STORY}", "completion": str(i % 3)} for i in range(30)]
    data = bench.prepare(
        {"train": bench.jsonl("a.jsonl", rows + ROWS[:30]), "eval": {"fraction": 0.3}, "deduplicate": "near"}
    )
    stories = [
        sum("lighthouse" in bench.tokenizer.decode(row["input_ids"]) for row in part)
        for part in (data.train, data.eval)
    ]
    assert sum(stories) == 1  # the others were near-duplicates of the first


@pytest.fixture
def contaminated(bench):
    train = bench.jsonl("a.jsonl", ROWS[:20])
    evaluation = bench.jsonl("e.jsonl", [{"prompt": "QUESTION 7", "completion": "answer 7!"}, ROWS[100]])
    return lambda **data: {"train": train, "eval": evaluation, **data}


def test_contamination_is_named(bench, contaminated):
    report = bench.prepare(contaminated()).report
    assert report.contaminated == (("a.jsonl:8", "e.jsonl:1"),) and report.contaminated_rows == 1
    assert any("a.jsonl:8 is e.jsonl:1" in warning for warning in report.warnings) and report.rows == 20


def test_contamination_is_removed_or_refused(bench, contaminated):
    data = bench.prepare(contaminated(contamination="remove"))
    assert data.report.rows == 19 and "answer 7" not in texts(bench, data.train)
    assert len(data.eval) == 2
    error = bench.error(contaminated(contamination="fail"))
    assert (error.code, error.problems[0].where) == ("data-contaminated", "a.jsonl:8")


def test_removing_everything_is_refused(bench):
    name = bench.jsonl("a.jsonl", ROWS[:3])
    assert bench.error({"train": name, "eval": name, "contamination": "remove"}).code == "data-contaminated"

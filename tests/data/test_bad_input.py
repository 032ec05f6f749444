"""Bad files end in one clear error that names the file and the row; nothing is dropped silently."""

from __future__ import annotations

import json

import pytest
from dropforge.cli import main

GOOD = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good morning"}]}


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


FILES = [
    # name, content, code, where, a word of what/why/fix
    ("missing.jsonl", None, "data-missing", "data.train", "missing.jsonl"),
    ("empty.jsonl", "", "data-empty", "empty.jsonl", "no rows"),
    ("blank.jsonl", "\n \n", "data-empty", "blank.jsonl", "no rows"),
    ("empty.json", "", "data-empty", "empty.json", "no rows"),
    ("empty-list.json", "[]", "data-empty", "empty-list.json", "no rows"),
    ("header-only.csv", "prompt,completion\n", "data-empty", "header-only.csv", "no rows"),
    ("empty.txt", " \n", "data-empty", "empty.txt", "no rows"),
    (
        "latin.csv",
        "prompt,completion\na,b\nca va,\xe7a va\n".encode("latin-1"),
        "data-encoding",
        "latin.csv:3",
        "cp1252",
    ),
    ("latin.jsonl", b'{"prompt": "a", "completion": "\x81\xff"}\n', "data-encoding", "latin.jsonl:1", "iso-8859-1"),
    ("wide.csv", "prompt,completion\na,b\n".encode("utf-16"), "data-encoding", "wide.csv:1", "UTF-16"),
    ("wide32.csv", "prompt,completion\na,b\n".encode("utf-32"), "data-encoding", "wide32.csv:1", "UTF-32"),
    ("binary.jsonl", bytes(range(256)) * 4, "data-encoding", "binary.jsonl:1", "binary"),
    ("broken.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "a",\n', "data-parse", "broken.jsonl:2", "column"),
    ("array.jsonl", '{"prompt": "a", "completion": "b"}\n[1, 2]\n', "data-parse", "array.jsonl:2", "list"),
    ("deep.jsonl", "[" * 200_000 + "\n", "data-parse", "deep.jsonl:1", "deep"),
    ("broken.json", '[\n{"prompt": "a"},\n{"prompt" "b"}\n]', "data-parse", "broken.json:3", "delimiter"),
    ("one.json", '{"prompt": "a", "completion": "b"}', "data-parse", "one.json", "list"),
    ("mixed.json", '[{"prompt": "a", "completion": "b"}, 3]', "data-parse", "mixed.json:2", "number"),
    ("quote.csv", 'prompt,completion\na,b\nc,"d"e\n', "data-parse", "quote.csv:3", "doubled"),
    ("open.csv", 'prompt,completion\na,b\nc,"d\ne,f\n', "data-parse", "open.csv:3", "closed"),
    ("ragged.csv", "prompt,completion\na,b\nc,d,e\n", "data-parse", "ragged.csv:3", "3 cells"),
    ("twice.csv", "prompt,prompt\na,b\n", "data-parse", "twice.csv:1", "twice"),
    ("unnamed.csv", "prompt,,x\na,b,c\n", "data-parse", "unnamed.csv:1", "no name"),
    ("fake.xlsx", "prompt,completion\na,b\n", "data-parse", "fake.xlsx", "Excel"),
    ("fake.parquet", "prompt,completion\na,b\n", "data-parse", "fake.parquet", "Parquet"),
    ("data.exe", "x", "data-type-unknown", "data.exe", "known:"),
    ("foreign.csv", "city,country\nParis,France\n", "data-format-unknown", "foreign.csv", "'city', 'country'"),
    (
        "pairs.jsonl",
        '{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
        "data-format-later",
        "pairs.jsonl",
        "preference",
    ),
    ("prompts.csv", "prompt\na\n", "data-format-later", "prompts.csv", "prompt"),
]


@pytest.mark.parametrize(("name", "content", "code", "where", "word"), FILES, ids=[entry[0] for entry in FILES])
def test_bad_files(bench, name, content, code, where, word):
    if content is not None:
        bench.write(name, content)
    error = bench.error(name)
    problem = error.problems[0]
    assert (problem.code, problem.where) == (code, where)
    assert word in str(error)
    assert problem.what


ROWS = [
    (chat(("user", "hi")), "data-no-assistant", "user"),
    (chat(("user", "hi"), ("wizard", "abracadabra")), "data-role-unknown", "wizard"),
    ({"messages": "hi"}, "data-row-invalid", "str"),
    ({"messages": ["hi", "ho"]}, "data-row-invalid", "turn 1"),
    (chat(("user", [{"type": "image", "image": "x"}]), ("assistant", "a cat")), "data-format-later", "image"),
    (chat(("user", {"a": 1}), ("assistant", "a")), "data-row-invalid", "dict"),
    (
        {"messages": [*GOOD["messages"], {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}]},
        "data-template-refused",
        "does not write the tool call",
    ),
]


@pytest.mark.parametrize(("row", "code", "word"), ROWS, ids=[entry[1] + "-" + entry[2] for entry in ROWS])
def test_bad_rows_are_named_by_number(bench, row, code, word):
    error = bench.error(bench.jsonl("chat.jsonl", [GOOD] * 700 + [row, GOOD]))
    assert (error.code, error.problems[0].where) == (code, "chat.jsonl:701")
    assert word in str(error)


def test_a_prompt_that_is_not_text(bench):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": {"x": 1}}]
    error = bench.error(bench.jsonl("a.jsonl", rows))
    assert (error.code, error.problems[0].where) == ("data-row-invalid", "a.jsonl:2")


def test_empty_contents_are_dropped_counted_and_named(bench):
    rows = [
        GOOD,
        chat(("user", "hi"), ("assistant", " ")),
        {"messages": []},
        {"messages": None},
        chat(("user", ""), ("assistant", "x")),
    ]
    report = bench.prepare(bench.jsonl("a.jsonl", rows)).report
    assert (report.rows, report.rows_read, report.rows_dropped) == (1, 5, 4)
    assert report.dropped[0] == ("a.jsonl:2", "an answer is empty")
    assert report.dropped_reasons == {
        "the conversation is empty": 2,
        "an answer is empty": 1,
        "the question is empty": 1,
    }
    assert "4 rows dropped, the first is a.jsonl:2: an answer is empty" in report.warnings
    assert "warning: 4 rows dropped, the first is a.jsonl:2: an answer is empty" in bench.said


def test_only_the_first_dropped_rows_are_listed(bench):
    report = bench.prepare(bench.jsonl("a.jsonl", [GOOD] + [chat(("user", "q"), ("assistant", ""))] * 50)).report
    assert (len(report.dropped), report.rows_dropped) == (20, 50)


def test_nothing_left_to_learn(bench):
    error = bench.error(bench.jsonl("a.jsonl", [chat(("user", "q"), ("assistant", ""))] * 3))
    assert (error.code, error.problems[0].where) == ("data-all-masked", "a.jsonl:1")
    assert "3 rows: an answer is empty" in str(error)


def test_answers_that_are_truncated_away(bench):
    long = chat(("user", "the river " * 100), ("assistant", "yes"))
    report = bench.prepare(bench.jsonl("a.jsonl", [long, GOOD]), length=40).report
    assert (report.rows, report.rows_dropped) == (1, 1)
    assert "no answer begins within the first 40 tokens" in report.dropped[0][1]
    error = bench.error(bench.jsonl("b.jsonl", [long]), length=40)
    assert error.code == "data-all-masked"
    assert error.problems[0].fix == "raise model.max_seq_length"


def test_truncation_is_counted_and_labels_stay_aligned(bench):
    row = chat(("user", "hi"), ("assistant", "the river " * 100))
    data = bench.prepare(bench.jsonl("a.jsonl", [row]), length=40)
    assert (data.report.truncated, data.report.longest) == (1, 40)
    assert bench.learnt(data.train[0]).startswith("the river the river")
    assert len(data.train[0]["labels"]) == len(data.train[0]["input_ids"]) == 40


def test_a_forced_format_that_does_not_fit(bench):
    error = bench.error({"train": bench.write("a.csv", "question,answer\na,b\n"), "format": "alpaca"})
    assert error.code == "data-column-missing"
    assert "'question', 'answer'" in str(error)
    assert "instruction" in str(error)


@pytest.mark.parametrize(
    ("prompt", "code", "word"),
    [
        ("Capital of {Land}?", "data-column-missing", "Land"),
        ("Capital of {Country?", "data-column-template", "single '{'"),
        ("[[ always ]] {Country}", "data-column-template", "must name a column"),
        ("Capital of {}?", "data-column-template", "without a column name"),
    ],
)
def test_column_templates_that_do_not_fit(bench, prompt, code, word):
    name = bench.write("a.csv", "Country,City\nPeru,Lima\n")
    error = bench.error({"train": name, "format": {"columns": {"prompt": prompt, "response": "City"}}})
    assert error.code == code
    assert word in str(error)


def test_a_split_that_is_not_understood(bench):
    name = bench.jsonl("a.jsonl", [GOOD])
    assert bench.error([{"path": name, "split": "test[:10%]"}]).code == "data-split"


def test_errors_are_the_same_object_as_json(bench):
    error = bench.error(bench.jsonl("a.jsonl", [chat(("user", "hi"))]))
    problem = json.loads(json.dumps(error.as_dict()))["problems"][0]
    assert set(problem) == {"code", "what", "where", "why", "fix"}
    assert all(problem.values())


def test_mixed_formats_in_one_file_name_the_first_other_row(bench):
    rows = [GOOD] * 150 + [{"instruction": "a", "output": "b"}]
    error = bench.error(bench.jsonl("mixed.jsonl", rows))
    assert (error.code, error.problems[0].where) == ("data-format-mixed", "mixed.jsonl:151")
    assert "'instruction', 'output'" in error.problems[0].why


def test_a_column_that_is_sometimes_null_is_dropped_and_counted(bench):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": None}, {"prompt": "d"}, {}]
    report = bench.prepare(bench.jsonl("null.jsonl", rows)).report
    assert (report.rows, report.rows_read, report.rows_dropped) == (1, 4, 3)
    assert report.dropped_reasons == {"an answer is empty": 3}
    assert [where for where, _ in report.dropped] == ["null.jsonl:2", "null.jsonl:3", "null.jsonl:4"]


def test_two_turns_in_a_row_of_the_same_role_are_kept_and_named(bench):
    rows = [
        GOOD,
        chat(("user", "a"), ("user", "b"), ("assistant", "c")),
        chat(("user", "a"), ("assistant", "b"), ("assistant", "c")),
    ]
    report = bench.prepare(bench.jsonl("roles.jsonl", rows)).report
    assert report.rows == 3
    assert any(
        "2 rows with two turns of the same role one after the other, such as roles.jsonl:2, roles.jsonl:3" in w
        for w in report.warnings
    )


def test_a_row_of_fifty_megabytes_is_cut_and_named(bench):
    rows = [
        GOOD,
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "word " * 10_000_000}]},
    ]
    data = bench.prepare(bench.jsonl("large.jsonl", rows), length=64)
    assert [len(row["input_ids"]) for row in data.train][1] == 64
    assert data.train[1]["labels"][-1] == data.train[1]["input_ids"][-1]
    assert any(
        "1 row cut to 64 tokens (model.max_seq_length), such as large.jsonl:2" in w for w in data.report.warnings
    )


def test_cutting_before_tokenising_gives_the_same_tokens(bench, monkeypatch):
    rows = [
        chat(("user", "hello " * 20), ("assistant", "good morning " * 30)),
        chat(("user", " " * 3000), ("assistant", "x")),
    ]
    name = bench.jsonl("a.jsonl", [*rows, GOOD])
    whole = bench.prepare(name, length=48)
    monkeypatch.setattr(
        "dropforge.data.tokenize.CHARACTERS_PER_TOKEN", -19
    )  # 88 characters for 48 tokens: often too few
    assert bench.prepare(name, length=48).train.to_list() == whole.train.to_list()
    assert whole.report.truncated >= 1


def test_media_columns_are_recognised_and_named(bench):
    rows = [{"prompt": "a", "completion": "b", "image": "cat.PNG", "sound": {"array": [0.1], "sampling_rate": 16000}}]
    report = bench.prepare(bench.jsonl("media.jsonl", rows)).report
    assert any("column 'image' holds images" in warning for warning in report.warnings)
    assert any("column 'sound' holds audio" in warning for warning in report.warnings)


def test_another_format_early_in_a_file_is_named_by_its_row_too(bench):
    """The first row decides what the file is, also when a more specific format follows within the sample."""
    other = {"messages": chat(("user", "x"), ("assistant", "y"))["messages"]}
    error = bench.error(bench.jsonl("mixed.jsonl", [{"prompt": "a", "completion": "b"}] * 3 + [other]))
    assert (error.code, error.problems[0].where) == ("data-format-mixed", "mixed.jsonl:4")


@pytest.mark.parametrize("kind", ["messages", "text"])
def test_half_a_character_is_named_by_its_row(bench, kind):
    """JSON can hold one half of a surrogate pair, which no tokenizer takes; it must not end in a crash."""
    rows = {
        "messages": ['{"prompt": "a", "completion": "b"}', '{"prompt": "a \\ud83d b", "completion": "c"}'],
        "text": ['{"text": "a"}', '{"text": "a \\ud83d b"}'],
    }
    error = bench.error(bench.write("a.jsonl", "\n".join(rows[kind])))
    assert (error.code, error.problems[0].where) == ("data-encoding", "a.jsonl:2")
    assert "\\ud83d" in error.problems[0].why


def test_binary_files_and_old_line_ends_are_called_what_they_are(bench):
    error = bench.error(bench.write("a.jsonl", b"\x07\x1a\x96\xca#q"))
    assert error.code == "data-encoding" and "not a text file" in str(error)
    error = bench.error(bench.write("a.csv", b"prompt,completion\ra,b\rc,d\r"))
    assert error.code == "data-parse" and "tr " in error.problems[0].fix


def test_images_in_turns_are_named_by_the_report(bench, capsys):
    turns = [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "assistant", "content": "y"},
    ]
    bench.jsonl("a.jsonl", [{"messages": turns}])
    assert main(["data", "report", str(bench.folder / "a.jsonl")]) == 2
    told = capsys.readouterr().err
    assert "data-format-later" in told and "a.jsonl:1" in told and "image_url" in told

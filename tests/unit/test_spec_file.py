"""Reading spec bytes: YAML 1.2 scalars, three syntaxes, and everything that is refused before a value is built."""

from __future__ import annotations

import json

import pytest
from dropforge.errors import SpecError
from dropforge.spec_file import MAX_BYTES, MAX_NODES, parse
from hypothesis import given
from hypothesis import strategies as st


def code(raw: bytes, filename: str = "a.yaml") -> str:
    with pytest.raises(SpecError) as caught:
        parse(raw, filename=filename)
    return caught.value.code


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("2e-4", 2e-4), ("no", "no"), ("on", "on"), ("yes", "yes"), ("12:30:00", "12:30:00"),
        ("3.10", 3.1), ("0x10", 16), ("0o17", 15), ("017", 17), ("~", None), ("null", None), ("true", True), ("False", False),
        ("'1e-5'", "1e-5"), ('"true"', "true"), ("-3", -3), (".5", 0.5), ("1_000", "1_000"), ("2026-11-20", "2026-11-20"),
        ("", None), ("gguf:q4_k_m", "gguf:q4_k_m"), ("! 12", "12"),
    ],
)  # fmt: skip
def test_yaml_scalars_follow_version_1_2(text, value):
    assert parse(f"key: {text}\n".encode(), filename="a.yaml").value == {"key": value}


def test_the_three_syntaxes_say_the_same():
    yaml = b"name: x\ntrain: {learning_rate: 2e-4}\nexport: [merged, 'gguf:q8_0']\n"
    toml = b'name = "x"\nexport = ["merged", "gguf:q8_0"]\n[train]\nlearning_rate = 2e-4\n'
    as_json = b'{"name": "x", "train": {"learning_rate": 2e-4}, "export": ["merged", "gguf:q8_0"]}'
    values = [parse(yaml, filename="a.yaml"), parse(toml, filename="a.toml"), parse(as_json, filename="a.json")]
    assert values[0].value == values[1].value == values[2].value


def test_lines_are_known_for_nested_keys():
    parsed = parse(b"a: 1\nb:\n  c:\n    - d: 2\n    - e\n", filename="a.yaml")
    assert parsed.lines[("b", "c")] == 3
    assert parsed.lines[("b", "c", 0, "d")] == 4
    assert parsed.lines[("b", "c", 1)] == 5


def test_byte_order_mark_is_allowed():
    assert parse(b"\xef\xbb\xbfa: 1", filename="a.yaml").value == {"a": 1}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", "spec-empty"), (b"  \n", "spec-empty"), (b"- 1", "spec-not-a-mapping"), (b"just text", "spec-not-a-mapping"),
        (b"a: &x 1\nb: *x", "spec-alias"), (b"a: *x", "spec-alias"), (b"a: !!python/object:os.system x", "spec-tag"),
        (b"a: !tag 1", "spec-tag"), (b"a: 1\na: 2", "spec-duplicate-key"), (b"a: {b: 1, b: 2}", "spec-duplicate-key"),
        (b"a: 1\n---\nb: 2", "spec-documents"), (b"<<: {a: 1}", "spec-merge-key"), (b"a: [1, 2", "spec-syntax"),
        (b"a: .nan", "spec-not-finite"), (b"a: -.inf", "spec-not-finite"), (b"a: 1e999", "spec-not-finite"),
        (b"a: " + b"9" * 50, "spec-number"), (b"? [1]\n: 2", "spec-key"), (b"a: \x00", "spec-binary"),
        (b"\xff\xfea\x00", "spec-encoding"), ("ä: 1".encode("latin-1"), "spec-encoding"), (bytes(range(256)), "spec-encoding"),
        (b'a: "\\ud83d"', "spec-encoding"), (b"a: " + b"x" * MAX_BYTES, "spec-too-large"), (b"a: " + b"[" * 40 + b"]" * 40, "spec-too-deep"),
        (b"a: [" + b"1," * (MAX_NODES + 1) + b"]", "spec-too-many-nodes"),
    ],
)  # fmt: skip
def test_yaml_refusals(raw, expected):
    assert code(raw) == expected


@pytest.mark.parametrize(
    ("raw", "filename", "expected"),
    [
        (b'{"a": 1, "a": 2}', "a.json", "spec-duplicate-key"), (b'{"a": NaN}', "a.json", "spec-not-finite"),
        (b'{"a": 1', "a.json", "spec-syntax"), (b'{"a": "\\ud83d"}', "a.json", "spec-encoding"), (b"[" * 100_000, "a.json", "spec-too-deep"),
        (b"a = nan", "a.toml", "spec-value"), (b"a = 1\na = 2", "a.toml", "spec-syntax"),
        (b"a = 2026-11-20", "a.toml", "spec-value"), (b"a: 1", "a.txt", "spec-suffix"),
    ],
)  # fmt: skip
def test_other_refusals(raw, filename, expected):
    assert code(raw, filename) == expected


def test_latin_1_names_the_line():
    with pytest.raises(SpecError) as caught:
        parse("a: 1\nb: caf\xe9\n".encode("latin-1"), filename="a.yaml")
    assert "line 2" in caught.value.problems[0].where
    assert "0xe9" in caught.value.problems[0].what


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(alphabet=st.characters(exclude_categories=("Cc", "Cs"), exclude_characters="\u2028\u2029\x85\ufeff\ufffe\uffff"), max_size=12),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(alphabet="abcdef", min_size=1, max_size=4), children, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(st.dictionaries(st.text(alphabet="abcdef", min_size=1, max_size=4), plain, min_size=1, max_size=4))
def test_json_text_reads_the_same_as_yaml(value):
    """JSON is YAML's flow style: two independent readers must agree."""
    text = json.dumps(value, ensure_ascii=True)
    as_json = parse(text.encode(), filename="a.json").value
    as_yaml = parse(text.encode(), filename="a.yaml").value
    assert as_json == value
    assert as_yaml == as_json


@given(st.binary(max_size=200))
def test_arbitrary_bytes_never_crash_the_reader(raw):
    try:
        parse(raw, filename="a.yaml")
    except SpecError as error:
        assert error.code.startswith("spec-")

"""Every file type against every format; rows and numbers as they stand in the file."""

from __future__ import annotations

import bz2
import datetime
import gzip
import json
import lzma
import zipfile

import pandas as pd
import pyarrow
import pytest
from dropforge.data.readers import READERS, read_rows
from dropforge.errors import DataError

QUESTION, ANSWER = 'Say "hi", please;\nnow — ü', "hi, 你好\tthere"
FLAT = {
    "alpaca": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "prompt_completion": {"prompt": QUESTION, "completion": ANSWER},
    "question_answer": {"Question": QUESTION, "Answer": ANSWER},
}
NESTED = {
    "messages": {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]},
    "sharegpt": {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
}


def _write_arrow(path, rows):
    """`.arrow` as the datasets library writes it (a stream), `.feather` as a file with an index."""
    import pyarrow as pa

    table = pa.Table.from_pylist(rows)
    make = pa.ipc.new_stream if path.suffix == ".arrow" else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
        writer.write_table(table)


def _write(bench, kind, rows):
    path = bench.folder / f"data.{kind}"
    if kind in ("jsonl", "ndjson"):
        bench.jsonl(path.name, rows)
    elif kind == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif kind == "parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif kind in ("arrow", "feather"):
        _write_arrow(path, rows)
    elif kind in ("xlsx", "xlsm"):
        pd.DataFrame(rows).to_excel(path, index=False, engine="openpyxl")
    else:
        pd.DataFrame(rows).to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    return path.name


FLAT_KINDS = ("jsonl", "ndjson", "json", "csv", "tsv", "xlsx", "xlsm", "parquet", "arrow", "feather")
NESTED_KINDS = ("jsonl", "ndjson", "json", "parquet", "arrow", "feather")


@pytest.mark.parametrize("kind", FLAT_KINDS)
@pytest.mark.parametrize("form", FLAT)
def test_flat_formats_in_every_file_type(bench, kind, form):
    data = bench.prepare(_write(bench, kind, [FLAT[form]] * 2))
    assert data.report.rows == 2
    text = bench.tokenizer.decode(data.train[1]["input_ids"])
    assert f"user\n{QUESTION}<|im_end|>" in text
    assert bench.learnt(data.train[1]) == ANSWER + "<|im_end|>"


@pytest.mark.parametrize("kind", NESTED_KINDS)
@pytest.mark.parametrize("form", NESTED)
def test_conversations_in_every_file_type_that_can_hold_them(bench, kind, form):
    data = bench.prepare(_write(bench, kind, [NESTED[form]] * 2))
    assert (data.report.rows, data.report.format) == (2, form)
    assert bench.learnt(data.train[0]) == ANSWER + "<|im_end|>"


@pytest.mark.parametrize("kind", ("jsonl", "json", "csv", "tsv", "xlsx", "parquet"))
def test_text_in_every_file_type(bench, kind):
    data = bench.prepare(_write(bench, kind, [{"text": QUESTION}]))
    assert data.report.format == "text"
    assert bench.tokenizer.decode(data.train[0]["input_ids"]) == f"<s>{QUESTION}<|im_end|>"
    assert data.train[0]["labels"] == data.train[0]["input_ids"]


@pytest.mark.parametrize("suffix", ("txt", "md"))
def test_a_text_file_is_one_document_cut_without_loss(bench, suffix):
    text = "# Title\n\n" + "the river and the sea\n" * 40
    data = bench.prepare(bench.write(f"book.{suffix}", text), length=32)
    assert len(data.train) > 5
    assert data.report.truncated == 0
    joined = [token for row in data.train for token in row["input_ids"]]
    assert bench.tokenizer.decode(joined) == f"<s>{text}<|im_end|>"
    assert max(len(row["input_ids"]) for row in data.train) == 32


def test_every_reader_is_covered_above():
    assert {suffix[1:] for suffix in READERS} == {*FLAT_KINDS, "txt", "md", "epub"}


@pytest.mark.parametrize(("suffix", "module"), ((".gz", gzip), (".bz2", bz2), (".xz", lzma)))
@pytest.mark.parametrize("kind", ("jsonl", "csv"))
def test_compressed_text(bench, suffix, module, kind):
    name = _write(bench, kind, [FLAT["alpaca"]])
    packed = bench.write(name + suffix, module.compress((bench.folder / name).read_bytes()))
    assert bench.learnt(bench.prepare(packed).train[0]) == ANSWER + "<|im_end|>"


@pytest.mark.parametrize("kind", ("jsonl", "csv"))
def test_zstandard(bench, kind):
    name = _write(bench, kind, [FLAT["alpaca"]])
    packed = bench.write(name + ".zst", zstandard((bench.folder / name).read_bytes()))
    assert bench.learnt(bench.prepare(packed).train[0]) == ANSWER + "<|im_end|>"


def zstandard(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("suffix", "pack"), [(".bz2", bz2.compress), (".xz", lzma.compress), (".zst", lambda content: zstandard(content))]
)
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_damage_in_every_kind(bench, suffix, pack, damage):
    content = b"".join(b'{"prompt": "question %d", "completion": "b"}\n' % number for number in range(2000))
    whole = bytearray(pack(content))
    if damage == "cut":
        del whole[len(whole) // 2 :]
    else:
        whole[:4] = b"none"
    error = bench.error(bench.write("a.jsonl" + suffix, bytes(whole)))
    assert (error.code, error.problems[0].where) == ("data-parse", "a.jsonl" + suffix)


def test_damaged_compression(bench):
    whole = gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 500)
    error = bench.error(bench.write("a.jsonl.gz", whole[: len(whole) // 2]))
    assert (error.code, error.problems[0].where) == ("data-parse", "a.jsonl.gz")


def rows(bench, name):
    return list(read_rows(bench.folder / name, file=name, warn=bench.said.append))


def test_row_numbers_are_line_numbers_in_text_files(bench):
    bench.write("a.jsonl", '{"a": 1}\n\n{"a": 2}\n')
    assert [row.where for row in rows(bench, "a.jsonl")] == ["a.jsonl:1", "a.jsonl:3"]
    bench.write("a.csv", 'a,b\n1,"two\nlines"\n\n3,4\n')
    assert [row.where for row in rows(bench, "a.csv")] == ["a.csv:2", "a.csv:5"]
    assert rows(bench, "a.csv")[0].fields == {"a": "1", "b": "two\nlines"}


def test_a_byte_order_mark_is_dropped_and_other_line_ends_work(bench):
    bench.write("a.csv", b"\xef\xbb\xbfprompt,completion\r\na,b\r\n")
    assert rows(bench, "a.csv")[0].fields == {"prompt": "a", "completion": "b"}
    bench.write("a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n')
    assert rows(bench, "a.jsonl")[0].fields == {"a": 1}


@pytest.mark.parametrize("delimiter", (",", ";", "\t", "|"))
def test_csv_delimiters(bench, delimiter):
    bench.write("a.csv", delimiter.join(["one", "two", "three"]) + "\n" + delimiter.join("123") + "\n")
    assert rows(bench, "a.csv")[0].fields == {"one": "1", "two": "2", "three": "3"}


def test_a_cell_larger_than_pythons_default_limit(bench):
    bench.write("a.csv", "prompt,completion\nx," + "y" * 300_000 + "\n")
    assert len(rows(bench, "a.csv")[0].fields["completion"]) == 300_000


def test_json_in_its_usual_shapes(bench):
    bench.write("list.json", '[{"a": 1}, {"a": 2}]')
    bench.write("object.json", '{"version": 1, "data": [{"a": 1}, {"a": 2}]}')
    bench.write("lines.json", '{"a": 1}\n{"a": 2}\n')
    for name in ("list.json", "object.json", "lines.json"):
        assert [row.fields for row in rows(bench, name)] == [{"a": 1}, {"a": 2}], name


def test_excel_sheets_numbers_dates_and_empty_rows(bench):
    path = bench.folder / "a.xlsx"
    with pd.ExcelWriter(path) as writer:
        pd.DataFrame().to_excel(writer, sheet_name="empty", index=False)
        frame = pd.DataFrame({"q": [1, None, 2.5], "a": [datetime.datetime(2024, 2, 29), None, True]})
        frame.to_excel(writer, sheet_name="facts", index=False, startrow=2)
        pd.DataFrame({"x": [1]}).to_excel(writer, sheet_name="other", index=False)
    found = rows(bench, "a.xlsx")
    assert [row.number for row in found] == [4, 6]
    assert found[0].fields == {"q": 1, "a": datetime.datetime(2024, 2, 29)}
    assert bench.said == ["a.xlsx: only the sheet 'facts' is read, not other"]


def test_parquet_larger_than_one_batch(bench):
    pd.DataFrame({"text": [f"row {i}" for i in range(3000)]}).to_parquet(bench.folder / "a.parquet")
    found = rows(bench, "a.parquet")
    assert [row.number for row in found] == list(range(1, 3001))
    assert found[-1].fields == {"text": "row 2999"}


def test_a_folder_is_its_files_in_order(bench):
    bench.jsonl("set/b.jsonl", [{"prompt": "q", "completion": "second"}])
    bench.write("set/a.csv", "question,answer\nq,first\n")
    bench.write("set/README.md", "about")
    bench.write("set/.hidden.jsonl", "{broken")
    bench.write("set/image.png", b"\x89PNG")
    data = bench.prepare("set")
    assert [bench.learnt(row) for row in data.train] == ["first<|im_end|>", "second<|im_end|>"]
    assert [file.path for file in data.report.files] == ["set/a.csv", "set/b.jsonl"]
    assert any("passed over 2 files" in warning for warning in data.report.warnings)


def test_unknown_type(bench):
    bench.write("old.xls", "x")
    with pytest.raises(DataError) as caught:
        rows(bench, "old.xls")
    assert caught.value.code == "data-type-unknown"
    assert caught.value.problems[0].fix == "save it as .xlsx"


CONTAINER = (
    '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
    '<rootfile full-path="OPS/book.opf"/></rootfiles></container>'
)
PACKAGE = (
    '<package xmlns="http://www.idpf.org/2007/opf"><manifest>'
    '<item id="b" href="two.xhtml" media-type="application/xhtml+xml"/>'
    '<item id="a" href="one%20a.xhtml" media-type="application/xhtml+xml"/>'
    '<item id="c" href="cover.png" media-type="image/png"/></manifest>'
    '<spine><itemref idref="c"/><itemref idref="a"/><itemref idref="b"/></spine></package>'
)


def write_epub(path, chapters, container=CONTAINER):
    with zipfile.ZipFile(path, "w") as book:
        book.writestr("META-INF/container.xml", container)
        book.writestr("OPS/book.opf", PACKAGE)
        for name, text in chapters.items():
            book.writestr(f"OPS/{name}", text)


def test_an_epub_gives_its_chapters_in_reading_order(bench):
    one = "<html><head><title>no</title></head><body><h1>One</h1><p>The sea\n was <i>calm</i>&#33;</p><p>Yes.</p></body></html>"
    write_epub(bench.folder / "book.epub", {"one a.xhtml": one, "two.xhtml": "<p>The end.</p><script>no()</script>"})
    rows = list(read_rows(bench.folder / "book.epub", file="book.epub", warn=print))
    assert [row.fields["text"] for row in rows] == ["One\n\nThe sea was calm!\n\nYes.", "The end."]
    assert [(row.number, row.fields["chapter"]) for row in rows] == [(1, "OPS/one a.xhtml"), (2, "OPS/two.xhtml")]
    assert bench.prepare("book.epub").report.format == "text"


@pytest.mark.parametrize(
    "container", ["<container/>", "<!DOCTYPE x [<!ENTITY a 'aa'>]><container/>", "<container", CONTAINER]
)
def test_a_broken_epub_is_named(bench, container):
    path = bench.folder / "book.epub"
    write_epub(path, {}, container=container)  # the last one names chapters that are not there
    with pytest.raises(DataError) as caught:
        list(read_rows(path, file="book.epub", warn=print))
    assert (caught.value.code, caught.value.problems[0].where) == ("data-parse", "book.epub")


def test_a_hub_id_with_a_split_expression(bench, monkeypatch, tmp_path):
    """The datasets library reads a folder named like the id, as it would read the hub's."""
    hub = tmp_path / "hub" / "org" / "set"
    hub.mkdir(parents=True)
    (hub / "train.jsonl").write_text("".join(json.dumps(FLAT["alpaca"] | {"input": str(i)}) + "\n" for i in range(10)))
    monkeypatch.chdir(tmp_path / "hub")
    data = bench.prepare([{"path": "org/set", "split": "train[2:5]"}])
    assert data.report.rows == 3 and data.report.files[0].path == "org/set (train[2:5])"
    assert "\n2<|im_end|>" in bench.tokenizer.decode(data.train[0]["input_ids"])

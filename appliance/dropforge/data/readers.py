"""One reader per file type: path in, rows out, one at a time. What a row means is decided later.

Every reader raises DataError with file and line or row: data-parse, data-encoding, data-empty, data-type-unknown.
"""

from __future__ import annotations

import csv
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from dropforge.data.encoding import COMPRESSED, text_lines, whole_text
from dropforge.data.epub import read_epub
from dropforge.data.rows import Row
from dropforge.errors import DataError

Warn = Callable[[str], None]
Reader = Callable[[Path, str, Warn], Iterator[Row]]
PARQUET_BATCH_ROWS = 1024
DELIMITERS = ",;\t|"
_JSON_BLANKS = " \t\n\r"
# Python's limit of 128 KiB per cell is smaller than many documents.
CELL_LIMIT = 2**31 - 1


def read_rows(path: Path, *, file: str, warn: Warn) -> Iterator[Row]:
    """Rows of one data file. `file` is its name as the spec says it, for errors; `warn` takes one sentence."""
    return reader_for(path, file=file)(path, file, warn)


def reader_for(path: Path, *, file: str) -> Reader:
    """The reader for a file name; `.gz`, `.bz2`, `.xz` and `.zst` behind a text type are looked through."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    suffix = name.suffix.lower()
    reader = READERS.get(suffix)
    if reader is None or (name is not path and suffix in NOT_COMPRESSED):
        raise DataError(
            f"{file} is of a type that cannot be read",
            code="data-type-unknown",
            where=file,
            why=f"the suffix is {path.suffix or 'missing'}; known: {', '.join(READERS)} (text types also compressed)",
            fix="save it as .xlsx" if suffix == ".xls" else "save it as one of these types, or rename it",
        )
    return reader


def read_jsonl(path: Path, file: str, warn: Warn) -> Iterator[Row]:
    """One JSON object per line; empty lines are skipped."""
    yield from json_rows(text_lines(path, file=file), file=file)


def json_rows(lines: Iterable[tuple[int, str]], *, file: str) -> Iterator[Row]:
    """A row per line (with its number) that is not blank. Raises DataError data-parse."""
    decode = json.JSONDecoder().raw_decode
    for number, line in lines:
        try:
            value, end = decode(line)
            whole = not line[end:].strip(_JSON_BLANKS)
        except (ValueError, RecursionError):
            whole = False
        if whole:
            yield Row(file=file, number=number, fields=_object(value, file, number))
        elif line.strip():  # blanks in front, or a fault, which the decoder words
            yield Row(file=file, number=number, fields=_object(_json(line, file, number), file, number))


def read_json(path: Path, file: str, warn: Warn) -> Iterator[Row]:
    """A JSON array of objects, an object with one such array in it, or (often so named) JSON lines."""
    text = whole_text(path, file=file)
    if not text.strip():
        return
    first, _, rest = text.lstrip().partition("\n")
    if first.startswith("{") and rest.strip() and _is_object(first):
        yield from read_jsonl(path, file, warn)
        return
    value = _json(text, file, None)
    if isinstance(value, dict):
        lists = [name for name, item in value.items() if isinstance(item, list)]
        if len(lists) != 1:
            raise DataError(
                f"{file} holds one object, not rows",
                code="data-parse",
                where=file,
                why=f"an object must have exactly one list in it, the rows; this one has {len(lists)}",
                fix="write a JSON array of objects, or one object per line (.jsonl)",
            )
        value = value[lists[0]]
    if not isinstance(value, list):
        raise _parse_error(file, None, f"the file holds a {_kind(value)}, not an array of objects")
    for number, item in enumerate(value, start=1):
        yield Row(file=file, number=number, fields=_object(item, file, number))


def read_csv(path: Path, file: str, warn: Warn) -> Iterator[Row]:
    """The first line names the columns; the delimiter (comma, semicolon, tab, bar) is the most frequent one in it."""
    yield from _read_table(path, file, delimiter=None)


def read_tsv(path: Path, file: str, warn: Warn) -> Iterator[Row]:
    yield from _read_table(path, file, delimiter="\t")


def _read_table(path: Path, file: str, *, delimiter: str | None) -> Iterator[Row]:
    csv.field_size_limit(CELL_LIMIT)
    lines = (line for _, line in text_lines(path, file=file))
    header_line = next((line for line in lines if line.strip()), None)
    if header_line is None:
        return
    chosen = delimiter or max(DELIMITERS, key=header_line.count)

    def all_lines() -> Iterator[str]:
        yield header_line
        yield from lines

    table = csv.reader(all_lines(), delimiter=chosen, strict=True)
    start = 1
    try:
        columns = _columns(next(table), file=file, number=1)
        start = table.line_num + 1
        for cells in table:
            if any(cell.strip() for cell in cells):
                if len(cells) != len(columns):
                    why = (
                        f"the row has {len(cells)} cells, the header has {len(columns)} columns (delimiter {chosen!r})"
                    )
                    raise _parse_error(
                        file, start, why, "put quotes around cells that hold the delimiter or a line break"
                    )
                yield Row(file=file, number=start, fields=dict(zip(columns, cells, strict=True)))
            start = table.line_num + 1
    except csv.Error as error:
        fix = 'a quote inside a quoted cell must be doubled (""), and every opened quote must be closed'
        if "new-line" in str(error):
            fix = "end lines with LF; old Mac files have CR alone, which this mends: tr '\\r' '\\n' < FILE > NEW"
        raise _parse_error(file, start, f"{error}; the row starts at this line", fix) from error


def read_excel(path: Path, file: str, warn: Warn) -> Iterator[Row]:
    """The first sheet that is not empty; its first filled row names the columns. Values of formulas, not formulas."""
    import warnings

    from openpyxl import load_workbook
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # openpyxl names every unsupported ornament
            book = load_workbook(path, read_only=True, data_only=True)
    except (InvalidFileException, zipfile.BadZipFile, KeyError, ValueError, OSError) as error:
        raise _parse_error(file, None, f"not an Excel workbook: {error}", "save it again as .xlsx") from error
    try:
        filled = [
            sheet for sheet in book.worksheets if any(_filled(cells) for cells in sheet.iter_rows(values_only=True))
        ]
        if len(filled) > 1:
            others = ", ".join(sheet.title for sheet in filled[1:])
            warn(f"{file}: only the sheet {filled[0].title!r} is read, not {others}")
        for sheet in filled[:1]:
            yield from _read_sheet(sheet.iter_rows(values_only=True), file=file)
    finally:
        book.close()


def _read_sheet(rows: Iterator[tuple[Any, ...]], *, file: str) -> Iterator[Row]:
    columns: list[str] = []
    for number, cells in enumerate(rows, start=1):
        if not _filled(cells):
            continue
        if not columns:
            last = max(index for index, cell in enumerate(cells) if cell not in (None, ""))
            columns = _columns([str(cell or "") for cell in cells[: last + 1]], file=file, number=number)
            continue
        if any(cell not in (None, "") for cell in cells[len(columns) :]):
            raise _parse_error(file, number, f"the row has cells to the right of the {len(columns)} named columns")
        values = list(cells[: len(columns)]) + [None] * (len(columns) - len(cells))
        yield Row(file=file, number=number, fields=dict(zip(columns, values, strict=True)))


def read_parquet(path: Path, file: str, warn: Warn) -> Iterator[Row]:
    """Batches of rows, so that memory does not grow with the file."""
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(file=file, number=number, fields=fields)
    except (pyarrow.ArrowException, OSError) as error:
        raise _parse_error(file, number or None, f"not a Parquet file, or damaged: {error}") from error


def read_text(path: Path, file: str, warn: Warn) -> Iterator[Row]:
    """The whole file is one document in the column `text`."""
    text = whole_text(path, file=file)
    if text.strip():
        yield Row(file=file, number=1, fields={"text": text})


def read_arrow(path: Path, file: str, warn: Warn) -> Iterator[Row]:
    """Arrow files and streams (`.arrow` of the datasets library, Feather), mapped from disk."""
    import pyarrow
    from pyarrow import ipc

    number = 0
    try:
        with pyarrow.memory_map(str(path)) as stream:
            for batch in _arrow_batches(ipc, stream):
                for start in range(0, batch.num_rows, PARQUET_BATCH_ROWS):
                    for fields in batch.slice(start, PARQUET_BATCH_ROWS).to_pylist():
                        number += 1
                        yield Row(file=file, number=number, fields=fields)
    except (pyarrow.ArrowException, OSError) as error:
        raise _parse_error(file, number or None, f"not an Arrow file, or damaged: {error}") from error


def _arrow_batches(ipc: Any, stream: Any) -> Iterator[Any]:
    if stream.read(6) == b"ARROW1":
        stream.seek(0)
        table = ipc.open_file(stream)
        yield from (table.get_batch(index) for index in range(table.num_record_batches))
    else:
        stream.seek(0)
        yield from ipc.open_stream(stream)


def _read_epub(path: Path, file: str, warn: Warn) -> Iterator[Row]:
    return read_epub(path, file)


READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".xlsx": read_excel,
    ".xlsm": read_excel,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
    ".epub": _read_epub,
    ".txt": read_text,
    ".md": read_text,
}
NOT_COMPRESSED = {".xlsx", ".xlsm", ".parquet", ".arrow", ".feather", ".epub"}


def _json(text: str, file: str, number: int | None) -> Any:
    """`number` is the line of JSON lines; None for a whole file, where the decoder's own line is used."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        why = f"{error.msg} at column {error.colno}"
        raise _parse_error(
            file, number or error.lineno, why, "check quotes, commas and brackets of this line"
        ) from error
    except RecursionError as error:
        raise _parse_error(file, number, "the JSON is nested too deeply") from error


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _object(value: Any, file: str, number: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _parse_error(file, number, f"a row must be an object {{...}}, this one is a {_kind(value)}")
    return value


def _columns(cells: list[str], *, file: str, number: int) -> list[str]:
    names = [cell.strip() for cell in cells]
    if "" in names:
        raise _parse_error(
            file, number, f"column {names.index('') + 1} has no name", "name every column in the first row"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise _parse_error(file, number, f"the column {twice[0]!r} appears twice", "rename one of the two columns")
    return names


def _filled(cells: tuple[Any, ...]) -> bool:
    return any(cell not in (None, "") for cell in cells)


def _kind(value: Any) -> str:
    return {list: "list", str: "text", dict: "object", bool: "boolean", type(None): "null"}.get(type(value), "number")


def _parse_error(file: str, number: int | None, why: str, fix: str = "") -> DataError:
    where = file if number is None else f"{file}:{number}"
    return DataError(f"{file} cannot be read", code="data-parse", where=where, why=why, fix=fix)

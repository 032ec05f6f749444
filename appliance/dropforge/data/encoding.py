"""Text files as lines of strict UTF-8, also when compressed. A wrong encoding is an error, never a guess."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from dropforge.errors import DataError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_CONTROL = re.compile(rb"[\x01-\x08\x0e-\x1a]")
_UTF8_MARK = b"\xef\xbb\xbf"
# Longest first: the UTF-32 mark begins with the UTF-16 one.
_OTHER_MARKS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)


def open_bytes(path: Path) -> BinaryIO:
    """Open for reading; .gz, .bz2, .xz and .zst are decompressed on the way."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if suffix == ".bz2":
        return cast(BinaryIO, bz2.open(path, "rb"))
    if suffix == ".xz":
        return cast(BinaryIO, lzma.open(path, "rb"))
    if suffix == ".zst":
        return _open_zstandard(path)
    return path.open("rb")


def _open_zstandard(path: Path) -> BinaryIO:
    # Arrow brings the codec; Python has one of its own only from 3.14 on.
    import pyarrow

    return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), 1 << 18))


@contextmanager
def readable(file: str) -> Iterator[None]:
    """Damaged compression becomes DataError data-parse."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise _damaged(file, error) from error
    except OSError as error:
        # What bz2 and Arrow's codec raise has no number; what the disk raises has one.
        if error.errno is not None:
            raise
        raise _damaged(file, error) from error


def _damaged(file: str, error: Exception) -> DataError:
    return DataError(
        f"{file} cannot be decompressed", code="data-parse", where=file, why=str(error), fix="compress it again"
    )


def text_lines(path: Path, *, file: str) -> Iterator[tuple[int, str]]:
    """Line number from 1 and the line with its line end; a UTF-8 byte order mark is dropped.

    Raises DataError data-encoding (line, likely encoding) or data-parse (damaged compression).
    """
    with readable(file), open_bytes(path) as stream:
        yield from decoded_lines(stream, file=file)


def decoded_lines(stream: BinaryIO, *, file: str, first: int = 1) -> Iterator[tuple[int, str]]:
    """The lines of a stream whose first line is number `first`; as `text_lines`."""
    for number, raw in enumerate(stream, start=first):
        yield number, _decode(raw.removeprefix(_UTF8_MARK) if number == 1 else raw, file=file, number=number)


def whole_text(path: Path, *, file: str) -> str:
    """The whole file; errors as in `text_lines`."""
    return "".join(line for _, line in text_lines(path, file=file))


def _decode(raw: bytes, *, file: str, number: int) -> str:
    where = f"{file}:{number}"
    if number == 1:
        for mark, name in _OTHER_MARKS:
            if raw.startswith(mark):
                raise _wrong(where, f"the file begins with the mark of {name}", name)
    if b"\0" in raw:
        raise DataError(
            f"{file} is not a text file",
            code="data-encoding",
            where=where,
            why="it holds zero bytes, so it is binary, or UTF-16 without a mark",
            fix="give a text file in UTF-8; Excel and Parquet files need the suffix .xlsx or .parquet",
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if _CONTROL.search(raw):
            raise DataError(
                f"{file} is not a text file",
                code="data-encoding",
                where=where,
                why=f"it holds control characters and byte 0x{raw[error.start]:02x}, which is not UTF-8",
                fix="give a text file in UTF-8; compressed and Excel files need their own suffix (.gz, .zst, .xlsx)",
            ) from error
        start, end = max(0, error.start - 15), error.start + 15
        name = likely_encoding(raw)
        seen = raw[start:end].decode(name, errors="replace").strip()
        raise _wrong(
            where, f"byte 0x{raw[error.start]:02x} is not UTF-8; read as {name} it says {seen!r}", name
        ) from error


def likely_encoding(raw: bytes) -> str:
    """The single-byte encoding of Windows if all bytes are defined there, else ISO-8859-1, where all are."""
    try:
        raw.decode("cp1252")
    except UnicodeDecodeError:
        return "iso-8859-1"
    return "cp1252"


def _wrong(where: str, why: str, name: str) -> DataError:
    file = where.rpartition(":")[0]
    return DataError(
        f"{file} is not UTF-8",
        code="data-encoding",
        where=where,
        why=why,
        fix=f"save it as UTF-8, for example: iconv -f {name} -t UTF-8 {file} > utf8-{Path(file).name}",
    )

"""From a source in the spec to rows: a file, a folder of files, or a data set of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from dropforge.data.blocks import LineBlock, line_blocks
from dropforge.data.encoding import COMPRESSED
from dropforge.data.readers import READERS, Warn, read_jsonl, read_rows, reader_for
from dropforge.data.rows import Row
from dropforge.errors import DataError, EnvironmentFault, Reason
from dropforge.files import sha256_file
from dropforge.spec import SourceSpec

Locate = Callable[[str], Path]
_SLICE = re.compile(r"^(?:train)?\[(\d*):(\d*)\]$|^train$")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One file of a source (or a whole hub data set). `rows` reads it from the start each time it is called."""

    name: str
    sha256: str
    bytes: int
    rows: Callable[[], Iterator[Row]]
    lines: Callable[[], Iterator[LineBlock]] | None = None
    """The same rows as pieces of the file, where all of it is read and its lines are rows."""
    chosen: str = ""
    """Which rows of the file are read, as text."""


def open_source(source: SourceSpec, *, locate: Locate, warn: Warn) -> list[Part]:
    """The parts of a source in a fixed order.

    Raises DataError (data-missing, data-empty, data-split, data-type-unknown) or EnvironmentFault (data-offline).
    """
    try:
        path = locate(source.path)
    except DataError as error:
        if error.code == "data-missing" and _is_hub_id(source.path):
            return [_hub_part(source)]
        raise
    start, stop = _slice(source)
    parts = []
    for file, name in _files(path, source.path, warn):
        whole_lines = (start, stop) == (0, None) and reader_for(file, file=name) is read_jsonl
        parts.append(
            Part(
                name=name,
                sha256=sha256_file(file),
                bytes=file.stat().st_size,
                rows=partial(_local_rows, file, name=name, warn=warn, start=start, stop=stop),
                lines=partial(line_blocks, file, file=name) if whole_lines else None,
                chosen=f"{start}:{stop}",
            )
        )
    return parts


def _local_rows(file: Path, *, name: str, warn: Warn, start: int, stop: int | None) -> Iterator[Row]:
    return islice(read_rows(file, file=name, warn=warn), start, stop)


def _files(path: Path, name: str, warn: Warn) -> list[tuple[Path, str]]:
    """A folder gives its readable files in the order of their names, without hidden files, README and LICENSE."""
    if not path.is_dir():
        return [(path, name)]
    files, ignored = [], []
    for file in sorted(path.rglob("*")):
        inner = file.relative_to(path)
        if not file.is_file() or any(part.startswith(".") for part in inner.parts):
            continue
        stem = file.with_suffix("") if file.suffix in COMPRESSED else file
        if stem.suffix.lower() in READERS and not file.name.upper().startswith(("README", "LICENSE")):
            files.append((file, f"{name.rstrip('/')}/{inner.as_posix()}"))
        else:
            ignored.append(inner.as_posix())
    if ignored:
        warn(f"{name}: passed over {len(ignored)} files, such as {ignored[0]}")
    if not files:
        raise DataError(
            f"the folder {name} holds no data files",
            code="data-empty",
            where=name,
            fix=f"put files of these types into it: {', '.join(READERS)}",
        )
    return files


def _slice(source: SourceSpec) -> tuple[int, int | None]:
    """`train[10:20]` of a local file: the rows 10 to 19, counted from 0."""
    if source.split is None:
        return 0, None
    match = _SLICE.match(source.split)
    if not match:
        raise DataError(
            f"the split {source.split!r} of a local file is not understood",
            code="data-split",
            where=f"{source.path}: split",
            fix='write "train[:2000]" or "train[100:200]", or leave it out',
        )
    return int(match[1] or 0), int(match[2]) if match[2] else None


def _is_hub_id(path: str) -> bool:
    suffix = Path(path).suffix.lower()
    return bool(_HUB_ID.match(path)) and suffix not in READERS and suffix not in COMPRESSED


def _hub_part(source: SourceSpec) -> Part:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    split = source.split or "train"
    try:
        loaded = datasets.load_dataset(source.path, split=split, revision=source.revision)
    except DatasetNotFoundError as error:
        raise DataError(
            f"the data set {source.path!r} was not found",
            code="data-missing",
            where="data.train",
            why=f"there is no such file or folder, and the hub says: {error}",
            fix="check the spelling, or copy a file to datasets/",
            reason=Reason.MISSING_INPUT,
        ) from error
    except (ConnectionError, OSError) as error:
        raise EnvironmentFault(
            f"the data set {source.path!r} cannot be fetched", code="data-offline", where="data.train",
            why=str(error).split("\n")[0], fix="connect the machine, or copy a file to datasets/",
            reason=Reason.OFFLINE,
        ) from error  # fmt: skip
    except (ValueError, RuntimeError) as error:  # RuntimeError: a data set that is a script
        raise DataError(
            f"the data set {source.path!r} cannot be loaded", code="data-hub", where="data.train", why=str(error),
            fix="check split and revision",
        ) from error  # fmt: skip

    def rows() -> Iterator[Row]:
        for number, fields in enumerate(loaded, start=1):
            yield Row(file=source.path, number=number, fields=fields)

    size = loaded.info.download_size or 0
    return Part(name=f"{source.path} ({split})", sha256=loaded._fingerprint, bytes=size, rows=rows)

"""Tokenised files, kept between jobs: the second job over the same file and settings does not tokenise again.

The key is a hash of the file's content, of everything that decides what becomes of a row, and of the tokenizer. An
entry is one folder, written beside its place and renamed; whatever cannot be read is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dropforge import __version__
from dropforge.data.process import Batch, Counts, Work
from dropforge.files import rename_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
"""Raise when the meaning of an entry changes."""
ARRAYS = ("ids", "labels", "ends", "numbers", "digests", "loose", "learnt", "full", "signatures")
BATCH_TOKENS = 2_000_000
MIN_ROWS = 5_000
"""Smaller files are tokenised faster than they are worth keeping."""
LIMIT_BYTES = 20 * 1000**3
"""Beyond this the entries not used for longest are removed."""


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of vocabulary, rules, special tokens and chat template."""
    parts = [tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template), str(tokenizer.special_tokens_map)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def entry_key(*, content: str, rows: str, work: Work, tokenizer: str) -> str:
    """The name of an entry.

    Args:
        content: hash of the file.
        rows: which rows of it are read.
        tokenizer: from `tokenizer_hash`.
    """
    said = json.dumps([FORMAT, __version__, content, rows, asdict(work), tokenizer], sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:32]


class TokenCache:
    """Entries under one folder; `folder` None keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def load(self, key: str) -> tuple[Iterator[Batch], Counts] | None:
        """The batches and counts of an entry, mapped from disk; None when there is none."""
        if self._folder is None:
            return None
        entry = self._folder / key
        try:
            counts = _counts(json.loads((entry / "counts.json").read_text(encoding="utf-8")))
            arrays: dict[str, Any] = {name: np.load(entry / f"{name}.npy") for name in ARRAYS[2:]}
            arrays |= {name: np.load(entry / f"{name}.npy", mmap_mode="r") for name in ARRAYS[:2]}
            (entry / "counts.json").touch()  # the time of the last use, for whoever cleans up
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return _pieces(arrays), counts

    def writer(self, key: str) -> EntryWriter | None:
        return None if self._folder is None else EntryWriter(self._folder / key)


class EntryWriter:
    """Collects the batches of one file on disk. `finish` makes the entry visible, `discard` drops it."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._temporary = place.with_name(f".tmp-{place.name}.{os.getpid()}")
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)
        self._streams = {name: (self._temporary / f"{name}.raw").open("wb") for name in ARRAYS}
        self._kinds: dict[str, Any] = {}
        self._tokens = 0

    def add(self, batch: Batch) -> None:
        for name in ARRAYS:
            array = getattr(batch, name)
            array = array + self._tokens if name == "ends" else array
            self._kinds.setdefault(name, (array.dtype, array.shape[1:]))
            self._streams[name].write(np.ascontiguousarray(array).tobytes())
        self._tokens += len(batch.ids)

    def finish(self, counts: Counts) -> None:
        """Raw arrays become .npy files, and the folder gets its name."""
        for stream in self._streams.values():
            stream.close()
        for name, (kind, shape) in self._kinds.items():
            raw = self._temporary / f"{name}.raw"
            with (self._temporary / f"{name}.npy").open("wb") as out, raw.open("rb") as source:
                rows = raw.stat().st_size // (kind.itemsize * int(np.prod(shape, dtype=np.int64)))
                header = {"descr": kind.str, "fortran_order": False, "shape": (rows, *shape)}
                np.lib.format.write_array_header_1_0(out, header)
                shutil.copyfileobj(source, out, 1 << 20)
            raw.unlink()
        if counts.read < MIN_ROWS:
            self.discard()
            return
        # Not asdict, which breaks counters apart.
        plain = {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(counts).items()}
        text = json.dumps(plain, ensure_ascii=False)
        (self._temporary / "counts.json").write_text(text, encoding="utf-8")
        if self._place.exists():
            self.discard()
        else:
            try:
                rename_folder(self._temporary, self._place)
            except OSError:  # another job was faster
                self.discard()
        _remove_oldest(self._place.parent)

    def discard(self) -> None:
        for stream in self._streams.values():
            stream.close()
        shutil.rmtree(self._temporary, ignore_errors=True)


def _remove_oldest(folder: Path) -> None:
    entries = []
    for entry in folder.iterdir():
        counts = entry / "counts.json"
        if counts.is_file():
            size = sum(path.stat().st_size for path in entry.iterdir())
            entries.append((counts.stat().st_mtime, size, entry))
    total = sum(size for _, size, _ in entries)
    for _, size, entry in sorted(entries)[:-1]:
        if total <= LIMIT_BYTES:
            return
        shutil.rmtree(entry, ignore_errors=True)
        total -= size


def _counts(saved: dict[str, Any]) -> Counts:
    saved |= {name: Counter(saved[name]) for name in ("reasons", "roles", "languages")}
    saved["dropped"] = [(where, why) for where, why in saved["dropped"]]
    return Counts(**saved)


def _pieces(arrays: dict[str, Any]) -> Iterator[Batch]:
    """Batches of about BATCH_TOKENS tokens, cut at row ends."""
    ends = arrays["ends"]
    first = 0
    while first < len(ends):
        begin = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, begin + BATCH_TOKENS, side="right")))
        stop = int(ends[last - 1])
        per_row = {name: np.array(arrays[name][first:last]) for name in ARRAYS[3:]}
        yield Batch(
            ids=np.array(arrays["ids"][begin:stop]),
            labels=np.array(arrays["labels"][begin:stop]),
            ends=np.array(ends[first:last]) - begin,
            **per_row,
        )
        first = last

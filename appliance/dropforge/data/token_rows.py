"""Many rendered conversations to token rows at once: what `tokenize_conversations` gives, in arrays and faster.

R rows, T tokens of them all. The tokenizer is asked for ids alone; where a token lies follows from its bytes
(token_bytes.py), which are compared with the text. Rows whose tokens do not write their text get the tokenizer's
offsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from dropforge.data.shapes import Rendered
from dropforge.data.token_bytes import TokenBytes
from dropforge.data.tokenize import CHARACTERS_PER_TOKEN, IGNORED, encoded, mask_of, whole_texts

FEW = 64
"""So many rows in a row without one that its tokens write, and no further one is tried."""


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """`ids` and `labels` (T) of the rows one after the other, `ends` (R) where each of them ends."""

    ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int64]


class RowTokenizer:
    """Tokenises conversations with one tokenizer. Several threads may use one."""

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer
        whole_texts(self._backend)
        self._bytes = TokenBytes(self._backend)
        self._in_vain = 0

    def rows(self, rendered: Sequence[Rendered], *, everything: bool = False, length: int) -> TokenRows:
        """One row per conversation; arguments and meaning as for `tokenize_conversations`."""
        most = CHARACTERS_PER_TOKEN * length + 1000
        if self._in_vain >= FEW or any(len(item.text) > most for item in rendered):
            return self._by_offsets(rendered, everything=everything, length=length)
        texts = [item.text for item in rendered]
        lists = [one.ids for one in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        ids, ends = flat(lists)
        labels = ids.copy() if everything else self._labels(ids, lists, ends, rendered)
        return TokenRows(ids=ids, labels=labels, ends=ends)

    def _labels(
        self, ids: npt.NDArray[np.int32], lists: Sequence[list[int]], ends: npt.NDArray[np.int64],
        rendered: Sequence[Rendered],
    ) -> npt.NDArray[np.int32]:  # fmt: skip
        firsts: list[int] = []
        lasts: list[int] = []
        others: list[int] = []
        base = 0
        for number, (item, own) in enumerate(zip(rendered, lists, strict=True)):
            text = item.text.encode()
            if self._bytes.writes(own, text):
                plain = len(text) == len(item.text)
                for start, end in item.spans:
                    firsts.append(base + (start if plain else len(item.text[:start].encode())))
                    lasts.append(base + (end if plain else len(item.text[:end].encode())))
                base += len(text)
            else:
                others.append(number)
                base += int(self._bytes.sizes[own].sum())
        self._in_vain = self._in_vain + len(others) if len(others) == len(lists) else 0
        token_ends = self._bytes.ends(ids)
        edges = np.zeros(len(ids) + 1, dtype=np.int8)
        # A token is learnt from the first one that ends behind the beginning, up to the last that ends inside.
        np.add.at(edges, np.searchsorted(token_ends, firsts, side="right"), 1)
        np.add.at(edges, np.searchsorted(token_ends, lasts, side="right"), -1)
        labels = np.where(np.cumsum(edges[:-1], dtype=np.int8) > 0, ids, np.int32(IGNORED)).astype(np.int32)
        again = self._backend.encode_batch([rendered[number].text for number in others], add_special_tokens=False)
        for number, encoding in zip(others, again, strict=True):
            labels[ends[number] - len(encoding.ids) : ends[number]] = mask_of(encoding, rendered[number])
        return labels

    def _by_offsets(self, rendered: Sequence[Rendered], *, everything: bool, length: int) -> TokenRows:
        ids: list[list[int]] = []
        labels: list[list[int]] = []
        for encoding, item in encoded(self._backend, rendered, length=length):
            ids.append(encoding.ids)
            labels.append(encoding.ids if everything else mask_of(encoding, item))
        all_ids, ends = flat(ids)
        return TokenRows(ids=all_ids, labels=flat(labels)[0], ends=ends)


def flat(lists: Sequence[list[int]]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """All numbers in one array, and where each list ends in it."""
    ends = np.cumsum([len(one) for one in lists], dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.fromiter(chain.from_iterable(lists), dtype=np.int32, count=total), ends

"""Near-duplicates: MinHash signatures of character shingles, compared in bands (Broder 1997; Leskovec et al., ch. 3).

A signature holds 32 minima. Two texts whose shingles overlap by the share J agree in each minimum with probability J;
with 8 bands of 4, texts with J = 0.8 meet in a band with probability 0.98, those with J = 0.3 with 0.06. Whoever meets
is compared in all 32 minima.
"""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

SIZE = 32
BANDS = 8
SHINGLE = 5
"""Letters per shingle, of the text without case, blanks and punctuation."""
SIMILAR = 0.75
"""Share of equal minima from which on two texts count as near-duplicates."""
MAX_LETTERS = 20_000
"""Only so much of a text is looked at."""
_PRIME = np.uint64((1 << 61) - 1)


def _factors() -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    generator = np.random.Generator(np.random.PCG64(20_260_101))
    return (
        generator.integers(1, 1 << 29, size=SIZE, dtype=np.uint64),
        generator.integers(0, 1 << 60, size=SIZE, dtype=np.uint64),
    )


_A, _B = _factors()


def signature(text: str) -> npt.NDArray[np.uint32]:
    """(32,) minima. Equal texts (without case, blanks and punctuation) have equal signatures."""
    letters = "".join(filter(str.isalnum, text.casefold()))[:MAX_LETTERS].encode()
    pieces = {letters[i : i + SHINGLE] for i in range(max(1, len(letters) - SHINGLE + 1))}
    hashes = np.fromiter((zlib.crc32(piece) for piece in pieces), dtype=np.uint64, count=len(pieces))
    mixed = (hashes[:, None] * _A + _B) % _PRIME
    found: npt.NDArray[np.uint32] = mixed.min(axis=0).astype(np.uint32)
    return found


def clusters(signatures: npt.NDArray[np.uint32], *, similar: float = SIMILAR) -> npt.NDArray[np.int64]:
    """(rows, 32) signatures to (rows,) cluster numbers; each is the row number of the cluster's first row."""
    count = len(signatures)
    parent = np.arange(count, dtype=np.int64)

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = int(parent[row])
        return row

    width = SIZE // BANDS
    for band in range(BANDS):
        part = np.ascontiguousarray(signatures[:, band * width : (band + 1) * width])
        keys = part.view(np.dtype((np.void, part.dtype.itemsize * width))).ravel()
        order = np.argsort(keys, kind="stable")
        same = keys[order][1:] == keys[order][:-1]
        for position in np.flatnonzero(same):
            one, other = int(order[position]), int(order[position + 1])
            if (signatures[one] == signatures[other]).mean() >= similar:
                first, second = sorted((root(one), root(other)))
                parent[second] = first
    return np.asarray([root(row) for row in range(count)], dtype=np.int64)

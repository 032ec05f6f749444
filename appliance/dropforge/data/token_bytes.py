"""The bytes each token stands for, and with them where the tokens of a text lie: no offsets of the tokenizer needed.

A byte-level vocabulary (GPT-2's alphabet, or pieces with `▁` for a blank and <0x0A> for bytes) writes a text as tokens
whose bytes follow each other. Whether they do is compared for every text, byte by byte; where they do not (a normaliser
changed a sign, a blank was put in front), the tokenizer's own offsets are asked for instead.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenBytes:
    """`pieces[id]` are the bytes of a token, `sizes[id]` how many (int32); unknown ids have none."""

    def __init__(self, backend: Any) -> None:
        """`backend` is the tokenizers library's Tokenizer."""
        vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        added = {number: token.content for number, token in backend.get_added_tokens_decoder().items()}
        as_bytes = _alphabet_bytes if is_byte_level(backend) else _piece_bytes
        self.pieces: list[bytes] = [b""] * (max([*vocabulary.values(), *added], default=-1) + 1)
        for text, number in vocabulary.items():
            self.pieces[number] = as_bytes(text)
        for number, content in added.items():
            self.pieces[number] = content.encode()
        self.sizes = np.fromiter(map(len, self.pieces), dtype=np.int32, count=len(self.pieces))

    def writes(self, ids: Sequence[int], text: bytes) -> bool:
        """Whether the tokens, one after the other, are exactly this text."""
        return b"".join(map(self.pieces.__getitem__, ids)) == text

    def ends(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """(T,) the byte behind each token, counted from the first token."""
        return np.cumsum(self.sizes[ids], dtype=np.int64)


def is_byte_level(backend: Any) -> bool:
    """Whether the vocabulary is written in GPT-2's alphabet of 256 signs, one per byte."""
    parts = (backend.decoder, backend.pre_tokenizer)
    return any(b'"ByteLevel"' in bytes(part.__getstate__()) for part in parts if part is not None)


@cache
def _alphabet() -> dict[str, int]:
    """GPT-2's signs: printable bytes are themselves, the others follow from 256 on (Radford et al., encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    signs = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return signs | {chr(256 + index): byte for index, byte in enumerate(others)}


def _alphabet_bytes(text: str) -> bytes:
    signs = _alphabet()
    try:
        return bytes([signs[sign] for sign in text])
    except KeyError:
        return text.encode()


def _piece_bytes(text: str) -> bytes:
    found = _BYTE_PIECE.fullmatch(text)
    return bytes([int(found[1], 16)]) if found else text.replace("\u2581", " ").encode()

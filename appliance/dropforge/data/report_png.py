"""The histogram of row lengths as a PNG file, drawn without a plotting library (bars, axes and digits)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dropforge.files import write_bytes

WIDTH, HEIGHT = 900, 456
LEFT, BOTTOM, TOP = 90, 60, 66
SCALE = 2
BAR, INK, PAPER, GRID = (46, 110, 180), (40, 40, 40), (255, 255, 255), (225, 225, 225)
# 3 x 5 dots per character, row by row, as bits.
_GLYPHS = {
    "0": 0b111101101101111, "1": 0b010110010010111, "2": 0b111001111100111, "3": 0b111001111001111,
    "4": 0b101101111001001, "5": 0b111100111001111, "6": 0b111100111101111, "7": 0b111001010010010,
    "8": 0b111101111101111, "9": 0b111101111001111, "-": 0b000000111000000, ",": 0b000000000010100,
    "t": 0b010111010010011, "o": 0b000111101101111, "k": 0b100101110101101, "e": 0b111101111100111,
    "b": 0b100110101101110, "g": 0b011101011001110, "h": 0b100110101101101, "i": 0b010000010010010,
    "l": 0b010010010010011, "y": 0b101101011001110,
    "n": 0b000110101101101, "s": 0b000011110011110, "r": 0b000101110100100, "w": 0b000101101111101,
}  # fmt: skip

Pixels = npt.NDArray[np.uint8]


def write_histogram(path: Path, bins: Sequence[tuple[int, int, int]]) -> None:
    """Draw (from, to, rows) bins: rows upwards, tokens to the right. Overwrites `path`."""
    write_bytes(path, png(draw(bins)))


def draw(bins: Sequence[tuple[int, int, int]]) -> Pixels:
    """(HEIGHT, WIDTH, 3) pixels."""
    image = np.full((HEIGHT, WIDTH, 3), PAPER, dtype=np.uint8)
    floor, room = HEIGHT - BOTTOM, WIDTH - LEFT - 30
    image[TOP:floor, LEFT - 2 : LEFT] = INK
    image[floor : floor + 2, LEFT - 2 : WIDTH - 30] = INK
    top = max((count for _, _, count in bins), default=1) or 1
    step = room / max(1, len(bins))
    for index, (low, high, count) in enumerate(bins):
        begin, end = LEFT + round(index * step) + 3, LEFT + round((index + 1) * step) - 3
        tall = round((floor - TOP) * count / top)
        image[floor - tall : floor, begin:end] = BAR
        label = f"{low}" if low == high else f"{low}-{high}"
        _write(image, label, x=begin, y=floor + (10 if index % 2 == 0 else 24))
        if count:
            own = f"{count:,}"
            _write(image, own, x=(begin + end) // 2 - 2 * SCALE * len(own), y=floor - tall - 14)
    for share in (0.5, 1.0):
        y = floor - round((floor - TOP) * share)
        image[y : y + 1, LEFT - 8 : LEFT] = INK
        behind = image[y, LEFT : WIDTH - 30]
        behind[(behind == PAPER).all(axis=1)] = GRID
        _write(image, f"{round(top * share):,}", x=6, y=y - 4)
    _write(image, "rows by length in tokens", x=LEFT, y=14, scale=3)
    _write(image, "rows", x=6, y=TOP - 22)
    _write(image, "tokens", x=WIDTH - 90, y=HEIGHT - 16)
    return image


def _write(image: Pixels, text: str, *, x: int, y: int, scale: int = SCALE) -> None:
    for character in text:
        dots = _GLYPHS.get(character, 0)
        for row in range(5):
            for column in range(3):
                if dots >> (14 - 3 * row - column) & 1:
                    top, left = y + row * scale, x + column * scale
                    image[top : top + scale, left : left + scale] = INK
        x += 4 * scale


def png(image: Pixels) -> bytes:
    """(height, width, 3) pixels as a PNG file (RFC 2083, colour type 2, filter 0)."""
    height, width, _ = image.shape
    rows = b"".join(b"\0" + image[row].tobytes() for row in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in parts)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

"""Pictures made on the spot for trying projectors: smooth colours and a block, as PNG bytes. No picture library needed.

PNG is written as its specification (ISO/IEC 15948) has it: 8-bit RGB, no filter.
"""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def make_picture(side: int, *, seed: int) -> Pixels:
    """uint8 [side, side, 3]: another one for another seed, with slow and sharp changes of all three colours."""
    import numpy as np

    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    waves = random.uniform(0.5, 3.0, (3, 2))
    phases, levels = random.uniform(0, 1, 3), random.uniform(80, 170, 3)
    colours = [
        level + 80 * np.sin(2 * np.pi * (a * x + b * y + phase))
        for (a, b), phase, level in zip(waves, phases, levels, strict=True)
    ]
    picture = np.stack(colours, axis=-1)
    top, left = random.integers(0, side // 2, 2)
    picture[top : top + side // 3, left : left + side // 3] = random.integers(0, 256, 3)
    return np.clip(picture, 0, 255).astype(np.uint8)


def png(picture: Pixels) -> bytes:
    """The picture [height, width, 3] as a PNG file."""
    height, width, _ = picture.shape
    rows = b"".join(b"\0" + row.tobytes() for row in picture)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

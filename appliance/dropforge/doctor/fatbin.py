"""Which GPUs a compiled library carries code for, read out of the library itself.

nvcc embeds "fat binaries": a header with a magic number, then entries of one kind each, machine code for one compute
capability or PTX for the driver to compile. Only the entries' headers are read (they are never compressed), so this
needs neither a GPU nor CUDA's tools. Layout: as observed in bitsandbytes' libraries, whose targets are documented.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

MAGIC = struct.pack("<I", 0xBA55ED50)
HEADER = struct.Struct("<IHHQ")
"""magic, version, bytes of this header, bytes of all entries."""
ENTRY = struct.Struct("<HHIQ12xI")
"""kind, version, bytes of this header, bytes of the content, ..., compute capability as 10 * major + minor."""
PTX, MACHINE_CODE = 1, 2


@dataclass(frozen=True)
class BuildList:
    """Compute capabilities as 10 * major + minor. `real`: machine code. `virtual`: PTX, compiled when first used."""

    real: frozenset[int] = frozenset()
    virtual: frozenset[int] = frozenset()

    def __or__(self, other: BuildList) -> BuildList:
        return BuildList(self.real | other.real, self.virtual | other.virtual)

    def __bool__(self) -> bool:
        return bool(self.real or self.virtual)

    def __str__(self) -> str:
        return " ".join([*(f"sm_{one}" for one in sorted(self.real)), *(f"ptx_{one}" for one in sorted(self.virtual))])

    def runs_on(self, capability: int) -> bool:
        """Machine code runs on the same major version from its own minor version up; PTX on everything newer."""
        return any(one // 10 == capability // 10 and one <= capability for one in self.real) or any(
            one <= capability for one in self.virtual
        )


def read_build_list(library: Path) -> BuildList:
    """The compute capabilities in one shared library or program; empty when it holds no GPU code.

    Raises OSError when the file cannot be read.
    """
    real: set[int] = set()
    virtual: set[int] = set()
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = content.find(MAGIC)
        while at >= 0:
            for kind, capability in _entries(content, at):
                (real if kind == MACHINE_CODE else virtual).add(capability)
            at = content.find(MAGIC, at + len(MAGIC))
    return BuildList(frozenset(real), frozenset(virtual))


def _entries(content: mmap.mmap, at: int) -> list[tuple[int, int]]:
    """(kind, capability) of every entry behind the header at `at`; nothing when what is there is no header."""
    if at + HEADER.size > len(content):
        return []
    _, version, header_size, size = HEADER.unpack_from(content, at)
    at += header_size
    end = at + size
    if version != 1 or header_size != HEADER.size or end > len(content):
        return []
    found = []
    while at + ENTRY.size <= end:
        kind, _, entry_header, entry_size, capability = ENTRY.unpack_from(content, at)
        if kind not in (PTX, MACHINE_CODE) or entry_header < ENTRY.size or not 20 <= capability < 1000:
            break
        found.append((kind, capability))
        at += entry_header + entry_size
    return found


def parse_build_list(text: str) -> BuildList:
    """From torch's list ("sm_90 compute_90") or CMake's ("90-real;120-virtual;86"): a plain number means both.

    Letters behind the number (90a, 100f) stand for features of that very GPU; they are read as the number.
    """
    real: set[int] = set()
    virtual: set[int] = set()
    for word in text.replace(";", " ").replace(",", " ").split():
        digits = "".join(character for character in word if character.isdigit())
        if not digits:
            continue
        if not word.startswith("compute_") and not word.endswith("-virtual"):
            real.add(int(digits))
        if not word.startswith("sm_") and not word.endswith("-real"):
            virtual.add(int(digits))
    return BuildList(frozenset(real), frozenset(virtual))

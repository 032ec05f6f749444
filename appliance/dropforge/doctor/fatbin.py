"""Which GPUs a compiled library carries code for, read out of the library itself.

nvcc embeds "fat binaries": a header with a magic number, then entries of one kind each, machine code for one compute
capability or PTX for the driver to compile. Only the entries' headers are read (they are never compressed), so this
needs neither a GPU nor CUDA's tools. Layout: as observed in bitsandbytes' libraries, whose targets are documented, and
in what nvcc 13.0 makes for sm_120, sm_120a and sm_100f.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path

MAGIC = struct.pack("<I", 0xBA55ED50)
HEADER = struct.Struct("<IHHQ")
"""magic, version, bytes of this header, bytes of all entries."""
ENTRY = struct.Struct("<HHIQ12xI8xI")
"""kind, version, bytes of this header, bytes of the content, ..., compute capability (90 is 9.0), ..., flags."""
PTX, MACHINE_CODE = 1, 2
THIS_GPU_ONLY, THIS_FAMILY_ONLY = 1 << 20, 1 << 21
"""Flags of code that uses features of one compute capability (written 120a) or of one major version (100f)."""
_WORD = re.compile(r"(?P<kind>sm_|compute_|)(?P<number>\d+)(?P<letter>[af]?)(?P<what>-real|-virtual|)")


@dataclass(frozen=True)
class BuildList:
    """Compute capabilities as 10 * major + minor.

    `real`: machine code, and PTX of one family. `virtual`: PTX, compiled when first used. `exact`: either of them with
    features of that very GPU (120a), which nothing else runs.
    """

    real: frozenset[int] = frozenset()
    virtual: frozenset[int] = frozenset()
    exact: frozenset[int] = frozenset()

    def __or__(self, other: BuildList) -> BuildList:
        return BuildList(self.real | other.real, self.virtual | other.virtual, self.exact | other.exact)

    def __bool__(self) -> bool:
        return bool(self.real or self.virtual or self.exact)

    def __str__(self) -> str:
        code = sorted([*((one, "") for one in self.real), *((one, "a") for one in self.exact)])
        return " ".join(
            [*(f"sm_{one}{letter}" for one, letter in code), *(f"ptx_{one}" for one in sorted(self.virtual))]
        )

    def runs_on(self, capability: int) -> bool:
        """Machine code runs on the same major version from its own minor version up; PTX on everything newer."""
        return (
            capability in self.exact
            or any(one // 10 == capability // 10 and one <= capability for one in self.real)
            or any(one <= capability for one in self.virtual)
        )


def read_build_list(library: Path) -> BuildList:
    """The compute capabilities in one shared library or program; empty when it holds no GPU code.

    Raises OSError when the file cannot be read.
    """
    found = BuildList()
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = content.find(MAGIC)
        while at >= 0:
            for entry in _entries(content, at):
                found |= entry
            at = content.find(MAGIC, at + len(MAGIC))
    return found


def _entries(content: mmap.mmap, at: int) -> list[BuildList]:
    """What each entry behind the header at `at` is for; nothing when what is there is no header."""
    if at + HEADER.size > len(content):
        return []
    _, version, header_size, size = HEADER.unpack_from(content, at)
    at += header_size
    end = at + size
    if version != 1 or header_size != HEADER.size or end > len(content):
        return []
    found = []
    while at + ENTRY.size <= end:
        kind, _, entry_header, entry_size, capability, flags = ENTRY.unpack_from(content, at)
        if kind not in (PTX, MACHINE_CODE) or entry_header < ENTRY.size or not 20 <= capability < 1000:
            break
        letter = "a" if flags & THIS_GPU_ONLY else "f" if flags & THIS_FAMILY_ONLY else ""
        found.append(_one(capability, letter=letter, machine_code=kind == MACHINE_CODE))
        at += entry_header + entry_size
    return found


def _one(capability: int, *, letter: str, machine_code: bool) -> BuildList:
    """The list of one entry; `letter`: "a", "f" or none, as nvcc writes it behind the number."""
    here = frozenset({capability})
    if letter == "a":
        return BuildList(exact=here)
    return BuildList(real=here) if machine_code or letter == "f" else BuildList(virtual=here)


def parse_build_list(text: str) -> BuildList:
    """From torch's list ("sm_90 compute_90") or CMake's ("90a-real;120-virtual;86"): a plain number means both."""
    found = BuildList()
    for word in text.replace(";", " ").replace(",", " ").split():
        match = _WORD.fullmatch(word)
        if match is None:
            continue
        capability, letter = int(match["number"]), match["letter"]
        if match["kind"] != "compute_" and match["what"] != "-virtual":
            found |= _one(capability, letter=letter, machine_code=True)
        if match["kind"] != "sm_" and match["what"] != "-real":
            found |= _one(capability, letter=letter, machine_code=False)
    return found

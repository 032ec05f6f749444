"""Reading compute capabilities out of compiled libraries, and which GPUs they cover."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path

import pytest
from dropforge.doctor.fatbin import MAGIC, BuildList, parse_build_list, read_build_list


def fat_binary(*entries: tuple[int, ...], content: bytes = b"code" * 8) -> bytes:
    """Entries of kind, capability, and the flags that nvcc gives those of one GPU (120a) or family (100f)."""
    body = b"".join(
        struct.pack("<HHIQ12xI8xI", kind, 0x101, 64, len(content), capability, *(flags or (0x01008011,)))
        + bytes(64 - 44)
        + content
        for kind, capability, *flags in entries
    )
    return MAGIC + struct.pack("<HHQ", 1, 16, len(body)) + body


def test_entries_of_several_fat_binaries_are_joined(tmp_path: Path) -> None:
    file = tmp_path / "lib.so"
    file.write_bytes(b"\x7fELF" + bytes(100) + fat_binary((2, 80), (2, 90)) + bytes(33) + fat_binary((1, 120)) + b"end")
    assert read_build_list(file) == BuildList(frozenset({80, 90}), frozenset({120}))
    assert str(read_build_list(file)) == "sm_80 sm_90 ptx_120"


def test_code_for_one_gpu_only_is_told_from_code_for_all_later_ones(tmp_path: Path) -> None:
    """The flags are those of nvcc 13.0 for sm_120a, compute_120a and sm_100f."""
    file = tmp_path / "lib.so"
    file.write_bytes(fat_binary((2, 90), (2, 120, 0x01108011), (2, 100, 0x01208011)))
    assert str(read_build_list(file)) == "sm_90 sm_100 sm_120a"
    assert [read_build_list(file).runs_on(one) for one in (103, 120, 121)] == [True, True, False]
    file.write_bytes(fat_binary((1, 120, 0x00108011)))
    assert [read_build_list(file).runs_on(one) for one in (120, 121, 130)] == [True, False, False]


@pytest.mark.parametrize(
    "content",
    [
        b"nothing of the kind" * 20,
        MAGIC,
        MAGIC + b"\xff" * 64,
        fat_binary((2, 90))[:40],
        fat_binary((7, 90)),
        MAGIC + struct.pack("<HHQ", 1, 16, 1 << 40) + bytes(64),
    ],
    ids=["text", "magic alone", "garbage", "cut off", "unknown kind", "too long"],
)
def test_what_is_no_fat_binary_gives_an_empty_list(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "lib.so"
    file.write_bytes(content)
    assert not read_build_list(file)


def test_the_lists_of_bitsandbytes_are_the_documented_ones() -> None:
    """A real library: its CUDA 13.0 build is documented for 75 80 86 89 90 100 120, with PTX of the newest."""
    spec = importlib.util.find_spec("bitsandbytes")
    found = read_build_list(Path(spec.origin).with_name("libbitsandbytes_cuda130.so"))
    assert str(found) == "sm_75 sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 ptx_120"
    assert not read_build_list(Path(spec.origin).with_name("libbitsandbytes_cpu.so"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sm_75 sm_80 sm_90 compute_90", "sm_75 sm_80 sm_90 ptx_90"),
        ("75-virtual;80-real;90a-real;120", "sm_80 sm_90a sm_120 ptx_75 ptx_120"),
        ("sm_100f compute_103f 120a Release", "sm_100 sm_103 sm_120a"),
        ("", ""),
    ],
)
def test_lists_of_torch_and_cmake(text: str, said: str) -> None:
    assert str(parse_build_list(text)) == said


@pytest.mark.parametrize(
    ("text", "capability", "runs"),
    [
        ("sm_80", 80, True),
        ("sm_80", 89, True),  # same major version, later minor
        ("sm_80", 90, False),
        ("sm_86", 80, False),
        ("sm_120", 121, True),  # DGX Spark
        ("sm_100", 120, False),
        ("compute_90", 120, True),  # the driver compiles
        ("compute_90", 89, False),
        ("sm_120a", 120, True),
        ("sm_120a", 121, False),
        ("compute_120a", 130, False),  # features that no other GPU promises to have
        ("compute_100f", 103, True),
        ("compute_100f", 120, False),
        ("", 90, False),
    ],
)
def test_which_gpus_a_list_covers(text: str, capability: int, runs: bool) -> None:
    assert parse_build_list(text).runs_on(capability) is runs

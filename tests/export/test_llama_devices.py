"""llama.cpp is kept off GPUs that it was not compiled for, and off all of them when the CPU was asked for."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dropforge.doctor.driver import QUERY, Smi
from dropforge.doctor.fatbin import MAGIC
from dropforge.errors import ExportError
from dropforge.llama_cpp import devices
from dropforge.llama_cpp.devices import CPU_ONLY, device_arguments
from dropforge.llama_cpp.locate import LlamaCpp
from dropforge.llama_cpp.server import LlamaServer
from dropforge.settings import settings


def with_cuda(root: Path, *capabilities: int) -> Path:
    """A llama.cpp below `root` whose CUDA library carries machine code for these."""
    entries = b"".join(struct.pack("<HHIQ12xI", 2, 0x101, 64, 0, one) + bytes(32) for one in capabilities)
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "libggml-cuda.so").write_bytes(MAGIC + struct.pack("<HHQ", 1, 16, len(entries)) + entries)
    return root


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """gpus("9.0", "12.0"): what nvidia-smi will say is here."""

    def here(*capabilities: str) -> None:
        rows = tuple(dict.fromkeys(QUERY, "") | {"index": str(i), "compute_cap": c} for i, c in enumerate(capabilities))
        monkeypatch.setattr(devices, "ask_nvidia_smi", lambda: Smi(gpus=rows))
        devices._capabilities_here.cache_clear()

    monkeypatch.setenv("DROPFORGE_DEVICE", "auto")
    settings.cache_clear()
    yield here
    settings.cache_clear()
    devices._capabilities_here.cache_clear()


@pytest.mark.parametrize(
    ("here", "arguments"),
    [
        (("9.0", "9.0"), ()),
        (("9.0", "12.0"), CPU_ONLY),
        (("7.0",), CPU_ONLY),
        ((), ()),
        (("[N/A]",), ()),
    ],
)
def test_a_gpu_without_code_is_not_touched(
    tmp_path: Path, gpus: Callable[..., None], here: tuple[str, ...], arguments: tuple[str, ...]
) -> None:
    gpus(*here)
    assert device_arguments(with_cuda(tmp_path, 80, 90)) == arguments


def test_a_build_for_the_cpu_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode() -> Smi:
        raise AssertionError

    monkeypatch.setattr(devices, "ask_nvidia_smi", explode)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "llama-server").write_bytes(b"no GPU code in here")
    assert device_arguments(tmp_path) == ()


def test_the_cpu_was_asked_for(tmp_path: Path, gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpus("9.0")
    monkeypatch.setenv("DROPFORGE_DEVICE", "cpu")
    settings.cache_clear()
    assert device_arguments(with_cuda(tmp_path, 90)) == CPU_ONLY


def test_the_server_gets_the_arguments(tmp_path: Path, gpus: Callable[..., None]) -> None:
    gpus("7.0")
    server = with_cuda(tmp_path, 90) / "bin" / "llama-server"
    server.write_text('#!/bin/sh\necho "$@"\nexit 1\n')
    server.chmod(0o755)
    with (
        pytest.raises(ExportError, match="--offline --device none"),
        LlamaServer(tmp_path / "m", tools=LlamaCpp(tmp_path)),
    ):
        pass

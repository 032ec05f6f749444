"""Container limits, shared memory, open files: shown a made-up /sys/fs/cgroup."""

from __future__ import annotations

from pathlib import Path

import pytest
from dropforge.doctor import machine
from dropforge.hardware import GIB, Hardware, _bytes


def cgroup(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(text + "\n")
    return folder


def said(findings: object) -> list[tuple[str, str]]:
    return [(finding.level, finding.what) for finding in findings]  # type: ignore[attr-defined]


def test_no_limits_no_lines(tmp_path: Path) -> None:
    assert list(machine.limit_findings(tmp_path)) == []
    unlimited = cgroup(tmp_path, memory_max="max", cpu_max="max 100000", pids_max="max")
    assert list(machine.limit_findings(unlimited)) == []


def test_roomy_limits_are_told(tmp_path: Path) -> None:
    folder = cgroup(
        tmp_path, memory_max=str(32 * GIB), memory_current=str(GIB), cpu_max="800000 100000", pids_max="4096"
    )
    assert said(machine.limit_findings(folder)) == [
        ("ok", "container limit: 32.0 GiB of memory, 1.0 GiB in use"),
        ("ok", "container limit: 8 CPU cores"),
        ("ok", "container limit: 4096 processes and threads"),
    ]


def test_tight_limits_come_with_what_to_do(tmp_path: Path) -> None:
    folder = cgroup(
        tmp_path, memory_max=str(8 * GIB), memory_current=str(6 * GIB), cpu_max="50000 100000", pids_max="64"
    )
    (folder / "memory.swap.max").write_text(str(GIB))
    found = list(machine.limit_findings(folder))
    assert [finding.level for finding in found] == ["note"] * 4
    assert "raise --memory" in found[0].fix and "--memory-swap" in found[1].fix and "--pids-limit" in found[3].fix


def test_a_small_shared_memory_and_a_missing_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LOW_SHARED_MEMORY", 1 << 60)
    (small,) = machine.shared_memory_findings(tmp_path)
    assert small.level == "note" and "--shm-size" in small.fix
    monkeypatch.setattr(machine, "LOW_SHARED_MEMORY", 0)
    assert said(machine.shared_memory_findings(tmp_path))[0][0] == "ok"
    assert said(machine.shared_memory_findings(tmp_path / "nowhere"))[0][0] == "note"


def test_few_open_files() -> None:
    assert said(machine.open_file_findings(256)) == [("note", "only 256 files may be open at once")]
    assert said(machine.open_file_findings(1 << 20)) == []


def test_little_memory_and_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    poor = Hardware(cpu_cores=1, memory_total=4 * GIB, memory_available=GIB, disk_free=GIB, gpus=(), gpu_note="")
    assert said(machine.memory_findings(poor)) == [("note", "memory: 1.0 GiB available of 4.0 GiB")]
    monkeypatch.setattr(machine, "PACKAGES", ("torch", "no_such_package"))
    assert said(machine.package_findings(1))[-1] == ("fault", "no_such_package is not installed")


def test_a_gpu_without_memory_of_its_own_counts_the_machines() -> None:
    """DGX Spark: nvidia-smi says [N/A]."""
    assert _bytes("81559", 7) == 81559 << 20
    assert _bytes("[N/A]", 7 << 30) == 7 << 30

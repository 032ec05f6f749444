"""The text of the ready block for machines that are not at hand: GPUs, faults, a second container."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "docker" / "services"))

import ready


def facts(data: Path, **more: Any) -> dict[str, Any]:
    login = {"source": "JUPYTER_PASSWORD"}
    return {"data": str(data), "persistent": True, "jupyter_port": 8888, "ssh_port": None, "gpus": 1,
            "jupyter_password": login, **more}  # fmt: skip


def ok(what: str) -> dict[str, str]:
    return {"level": "ok", "what": what, "fix": ""}


GOOD = [
    ok("Python 3.12.3, 16 CPU cores"),
    ok("driver 580.95.05, enough for CUDA 13.0 (580 or newer)"),
    ok("GPU 0 NVIDIA H200, compute capability 9.0, 143000 of 143771 MiB free, GPU-aa"),
    ok("torch is compiled for sm_90: every GPU is on it"),
    ok("GPU 0: torch: products in float32 are right"),
    ok("GPU 0: triton 3.6.0: a kernel compiles, and its output and gradients are right"),
]


def test_good_gpus_take_a_line_each_and_one_verdict(tmp_path: Path) -> None:
    lines = ready.block(facts(tmp_path), [], GOOD).splitlines()
    assert [line for line in lines if "GPU" in line] == [
        "  GPU        0 NVIDIA H200, compute capability 9.0, 143000 of 143771 MiB free, GPU-aa",
        "  GPU        ready: 2 trials with real kernels gave the right answer",
    ]
    assert not [line for line in lines if "FAULT" in line or "note" in line or "STANDBY" in line]
    assert "  status     http://localhost:8888/dropforge/, or " + str(tmp_path) + "/STATUS.md" in lines


def test_a_broken_gpu_is_a_fault_with_its_fix_and_no_verdict(tmp_path: Path) -> None:
    broken = {"level": "fault", "what": "GPU 0: triton does not work: no C compiler", "fix": "install gcc"}
    text = ready.block(facts(tmp_path), [], [*GOOD[:5], broken])
    assert "  FAULT      GPU 0: triton does not work: no C compiler (fix: install gcc)" in text
    assert "ready: " not in text


def test_services_that_do_not_answer_change_the_headline(tmp_path: Path) -> None:
    text = ready.block(facts(tmp_path), ["sshd does not answer on port 22: refused"], GOOD)
    assert "NOT everything answers" in text and "is ready" not in text and "FAULT      sshd does not answer" in text


@pytest.mark.parametrize("other", [True, False])
def test_a_folder_that_another_container_serves_is_named(tmp_path: Path, other: bool) -> None:
    (tmp_path / "state").mkdir()
    host = "0123456789ab" if other else os.uname().nodename
    (tmp_path / "state" / "daemon.json").write_text(json.dumps({"host": host}))
    assert ("STANDBY    0123456789ab serves this folder already" in ready.block(facts(tmp_path), [], GOOD)) is other

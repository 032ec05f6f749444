"""Which machines a container refuses to start on, and what it says: machines that are not at hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from dropforge import hardware
from dropforge.doctor import driver

sys.path.insert(0, str(Path(__file__).parents[2] / "docker" / "services"))

import prepare

H200 = hardware.Gpu(uuid="GPU-aa", name="NVIDIA H200", memory_total=1, memory_free=1, driver="580.95.05")
OLD = hardware.Gpu(uuid="GPU-aa", name="NVIDIA H200", memory_total=1, memory_free=1, driver="550.54.14")
BROKEN = hardware.Gpu(uuid="GPU-aa", name="NVIDIA H200", memory_total=1, memory_free=1, driver="[Unknown Error]")


def machine(patch: pytest.MonkeyPatch, *gpus: hardware.Gpu, smi: driver.Smi | None = None) -> None:
    here = hardware.Hardware(cpu_cores=1, memory_total=1, memory_available=1, disk_free=1, gpus=gpus, gpu_note="")
    patch.setattr(hardware, "probe", lambda folder: here)
    patch.setattr(driver, "ask_nvidia_smi", lambda: smi or driver.Smi(installed=False))
    patch.setattr(driver, "packaged_cuda", lambda: "13.0")


def refusal(tmp_path: Path) -> str:
    with pytest.raises(prepare.RefusedError) as refused:
        prepare.gpus({"DROPFORGE_DEVICE": "auto"}, tmp_path)
    text = str(refused.value)
    assert text.startswith("there is no usable GPU: ") and "\n  fix: " in text and "DROPFORGE_DEVICE=cpu" in text
    return text


def test_good_gpus_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, H200, H200)
    assert prepare.gpus({}, tmp_path) == 2


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        (OLD, "driver 550.54.14 is older than CUDA 13.0 needs (580 or newer); the GPU cannot be used\n  fix: update"),
        (BROKEN, "nvidia-smi says '[Unknown Error]' where its version should be"),
    ],
)
def test_a_driver_that_cannot_work_stops_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: hardware.Gpu, said: str
) -> None:
    machine(monkeypatch, gpu)
    assert said in refusal(tmp_path)
    assert prepare.gpus({"DROPFORGE_DEVICE": "cpu"}, tmp_path) == 1, "asked for the CPU it starts"


@pytest.mark.parametrize(
    ("smi", "said"),
    [
        (driver.Smi(installed=False), "no NVIDIA driver was found"),
        (driver.Smi(installed=False, host_has_driver=True), "this container was given no GPU"),
        (driver.Smi(error="Failed to initialize NVML: Unknown Error"), "lost its right to the devices"),
        (driver.Smi(), "lists none"),
    ],
)
def test_every_way_to_have_no_gpu_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smi: driver.Smi, said: str
) -> None:
    machine(monkeypatch, smi=smi)
    assert said in refusal(tmp_path)

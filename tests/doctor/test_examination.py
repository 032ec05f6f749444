"""The GPU pre-flight on made-up machines: every failure is named, with its cause and what to do."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import pytest
from dropforge.doctor.causes import CAUSES, find_cause
from dropforge.doctor.driver import QUERY, Smi, packaged_cuda, parse_rows
from dropforge.doctor.examination import (
    Instruments,
    cuda_part_refused,
    gpu_findings,
    list_llama_devices,
    llama_findings,
    trial_findings,
)
from dropforge.doctor.fatbin import BuildList, parse_build_list
from dropforge.doctor.finding import Finding
from dropforge.doctor.limited import Ran, run_limited
from dropforge.doctor.trial_process import Answer, run_trial
from dropforge.hardware import GIB, Hardware
from dropforge.settings import settings

MACHINE = Hardware(cpu_cores=8, memory_total=64 * GIB, memory_available=48 * GIB, disk_free=GIB, gpus=(), gpu_note="")
H200 = "0, GPU-aa, NVIDIA H200, 9.0, 580.95.05, 143771, 143000, Default, Disabled, 0"
SPARK = "0, GPU-bb, NVIDIA GB10, 12.1, 580.95.05, [N/A], [N/A], Default, [N/A], [N/A]"
LISTS = {
    "torch": parse_build_list("sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"),
    "bitsandbytes": parse_build_list("sm_75 sm_80 sm_90 sm_120 compute_120"),
    "vLLM": parse_build_list("sm_80 sm_90 sm_120"),
    "llama.cpp": parse_build_list("90-real;120a-real"),  # its build makes 120a of 120
}
LLAMA = "Available devices:\n  CUDA0: NVIDIA H200 (143771 MiB, 143000 MiB free)\n"


def smi(*rows: str, **more: object) -> Smi:
    return Smi(gpus=parse_rows("\n".join(rows)), **more)  # type: ignore[arg-type]


def answers(*, gpus: int = 1, broken: Mapping[str, str] | None = None) -> Mapping[str, Answer]:
    """All trials well, but for those in `broken`, which fail on the last GPU with that text."""
    facts = {"torch": "2.11.0+cu130", "cuda": "13.0", "devices": gpus, "list": "sm_90"}
    return {
        name: Answer(
            outcomes=tuple(
                {"device": index, "ok": name not in (broken or {}) or index < gpus - 1,
                 "text": (broken or {}).get(name, f"{name} is right") if index == gpus - 1 else f"{name} is right"}
                for index in range(gpus)
            ),
            facts=facts if name == "torch" else {},
        )
        for name in ("torch", "triton", "bitsandbytes", "vllm")
    }  # fmt: skip


def look(
    found: Smi, *, trials: Mapping[str, Answer] | None = None, lists: Mapping[str, BuildList] = LISTS,
    llama: str = LLAMA, device: str = "auto",
) -> list[Finding]:  # fmt: skip
    spoken = trials if trials is not None else answers(gpus=len(found.gpus))
    instruments = Instruments(
        smi=lambda: found, trial=lambda name: spoken[name], build_lists=lambda **_: lists, llama_devices=lambda: llama
    )
    return list(gpu_findings(MACHINE, device=device, instruments=instruments))


def levels(findings: list[Finding]) -> set[str]:
    return {finding.level for finding in findings}


def faults(findings: list[Finding]) -> list[Finding]:
    found = [finding for finding in findings if finding.level == "fault"]
    assert all(finding.fix for finding in found), "a fault says what to do"
    return found


def test_a_good_machine_has_nothing_but_good_news() -> None:
    found = look(smi(H200))
    assert levels(found) == {"ok"}
    text = "\n".join(finding.what for finding in found)
    for promised in ("driver 580.95.05, enough for CUDA 13.0", "NVIDIA H200, compute capability 9.0", "triton is right",
                     "bitsandbytes is right", "vllm is right", "torch is right", "llama.cpp sees 1 GPU"):  # fmt: skip
        assert promised in text


def test_asked_for_the_cpu_nothing_is_tried() -> None:
    def explode() -> Smi:
        raise AssertionError

    found = list(gpu_findings(MACHINE, device="cpu", instruments=Instruments(smi=explode)))
    assert [(f.level, f.what) for f in found] == [("note", "GPU: not used, because DROPFORGE_DEVICE=cpu")]


def test_no_driver_is_a_note_but_a_forgotten_option_is_a_fault() -> None:
    (none,) = look(Smi(installed=False))
    assert none.level == "note" and "--gpus all" in none.fix
    (forgotten,) = look(Smi(installed=False, host_has_driver=True))
    assert forgotten.level == "fault" and "given no GPU" in forgotten.what and "--gpus all" in forgotten.fix
    (empty,) = look(Smi())
    assert empty.level == "fault" and "lists none" in empty.what


@pytest.mark.parametrize(
    ("error", "why", "fix"),
    [
        ("Failed to initialize NVML: Driver/library version mismatch", "driver was updated", "reboot the host"),
        ("Failed to initialize NVML: Unknown Error", "lost its right to the devices", "restart the container"),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", "no NVIDIA driver loaded",
         "on the host"),
        ("nvidia-smi does not answer within 20 s", "driver hangs", "Xid"),
        ("No devices were found", "shows this container no GPU", "NVIDIA_VISIBLE_DEVICES"),
        ("NVIDIA-SMI couldn't find libnvidia-ml.so library in your system.", "management library", "--gpus all"),
    ],
)  # fmt: skip
def test_a_driver_that_does_not_answer_is_explained(error: str, why: str, fix: str) -> None:
    (found,) = faults(look(Smi(error=error)))
    assert why in found.what and fix in found.fix


def test_an_old_driver_is_named_with_its_floor_and_what_still_works() -> None:
    (found,) = faults(look(smi(H200.replace("580.95.05", "550.54.14"))))
    assert "driver 550.54.14 is older than CUDA 13.0 needs (580 or newer)" in found.what
    assert "DROPFORGE_DEVICE=cpu" in found.fix


def test_the_cuda_of_the_packages_is_known_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", {"nvidia-cuda-runtime": "13.0.96"}.__getitem__)
    assert packaged_cuda() == "13.0"
    monkeypatch.undo()
    assert packaged_cuda() == "", "the tests run with a torch for the CPU"


def test_a_spark_reads_its_memory_from_the_machine() -> None:
    found = look(smi(SPARK), lists={**LISTS, "llama.cpp": parse_build_list("121a-real")})
    assert any(
        "GB10, compute capability 12.1, memory shared with the CPU (49152 MiB available)" in f.what for f in found
    )
    assert levels(found) == {"ok"}, "12.1 runs code for 12.0"


def test_code_for_12_0a_is_none_for_a_spark() -> None:
    (lacking,) = (finding for finding in look(smi(SPARK)) if finding.level != "ok")
    assert lacking.what.startswith("llama.cpp is compiled for sm_90 sm_120a, not for GPU 0 (12.1)")
    assert "use the CPU" in lacking.what and "CUDA_ARCHITECTURES" in lacking.fix


def test_each_library_is_compared_with_each_gpu() -> None:
    blackwell = "1, GPU-cc, NVIDIA B200, 10.0, 580.95.05, 183359, 183000, Default, Disabled, 0"
    found = look(smi(H200, blackwell), llama=LLAMA + "  CUDA1: NVIDIA B200\n")
    (lacking,) = faults(found)
    assert lacking.what.startswith(
        "bitsandbytes is compiled for sm_75 sm_80 sm_90 sm_120 ptx_120, not for GPU 1 (10.0)"
    )
    notes = [finding.what for finding in found if finding.level == "note"]
    assert [what.split()[0] for what in notes] == ["vLLM", "llama.cpp"] and all(
        "GPU 1 (10.0)" in what for what in notes
    )


def test_a_cpu_only_llama_cpp_is_not_passed_over_in_silence() -> None:
    found = look(smi(H200), lists={**LISTS, "llama.cpp": BuildList()}, llama="Available devices:\n  (none)\n")
    notes = [finding for finding in found if finding.level == "note"]
    assert len(notes) == 2 and "no GPU at all" in notes[0].what and "built for the CPU" in notes[1].what
    lost = list(llama_findings("ggml_cuda_init: failed to initialize CUDA: out of memory", gpus=1, compiled=True))
    assert "sees 0 of 1 GPUs" in lost[0].what and "nvidia-smi" in lost[0].fix
    assert list(llama_findings("", gpus=1, compiled=True)) == []
    (unused,) = (f for f in look(smi(H200), llama="Available devices:\n  (none)\n") if f.level == "note")
    assert "lists no GPU" in unused.what and "libggml-cuda.so" in unused.fix


@pytest.fixture
def fresh_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Environment for one test: the settings of the process are read again before it and after it."""
    settings.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    settings.cache_clear()


def test_why_llama_cpp_does_not_load_its_cuda_part(tmp_path: Path, fresh_settings: pytest.MonkeyPatch) -> None:
    """Its tools load the library when they can, and say nothing when they cannot."""
    server, library = tmp_path / "bin" / "llama-server", tmp_path / "bin" / "libggml-cuda.so"
    server.parent.mkdir()
    server.write_text("#!/bin/sh\necho Available devices:\n")
    server.chmod(0o755)
    fresh_settings.setenv("DROPFORGE_LLAMA_CPP", str(tmp_path))
    assert cuda_part_refused(server.parent) == "", "a build for the CPU"
    subprocess.run(["cc", "-shared", "-o", library, "-Wl,--no-as-needed", "-x", "c", "/dev/null"], check=True)
    assert cuda_part_refused(server.parent) == ""
    lacking = tmp_path / "libcublas.so.13"
    subprocess.run(["cc", "-shared", "-o", lacking, "-Wl,-soname,libcublas.so.13", "-x", "c", "/dev/null"], check=True)
    subprocess.run(
        ["cc", "-shared", "-o", library, "-Wl,--no-as-needed", "-x", "c", "/dev/null", "-x", "none", lacking],
        check=True,
    )
    lacking.unlink()
    (found,) = llama_findings(list_llama_devices(), gpus=1, compiled=True)
    assert "sees 0 of 1 GPUs" in found.what and "libcublas.so.13: cannot open shared object" in found.what
    assert "a library is missing" in found.what and "the image" in found.fix


def test_what_llama_cpp_says_of_cuda_is_found_among_its_other_words() -> None:
    said = "ggml_cuda_init: failed to initialize CUDA: system not yet initialized\nAvailable devices:\n"
    (found,) = llama_findings(said, gpus=8, compiled=True)
    assert "Fabric Manager" in found.what and "nvidia-fabricmanager" in found.fix


@pytest.mark.parametrize(
    ("trial", "error", "why"),
    [
        ("torch", "RuntimeError: CUDA error: no kernel image is available for execution on the device", "no code for this GPU"),
        ("triton", "RuntimeError: Failed to find C compiler. Please specify via CC", "C compiler"),
        ("triton", "WrongAnswerError: triton: the output of a kernel is off by 3", ""),
        ("bitsandbytes", "AcceleratorError: CUDA error: out of memory", "other programs hold"),
        ("bitsandbytes", "AcceleratorError: CUDA error: uncorrectable ECC error encountered", "damaged"),
    ],
)  # fmt: skip
def test_a_trial_that_fails_on_one_gpu_is_that_gpus_fault(trial: str, error: str, why: str) -> None:
    second = H200.replace("0, GPU-aa", "1, GPU-dd")
    found = look(smi(H200, second), trials=answers(gpus=2, broken={trial: error}), llama=LLAMA + "  CUDA1: x\n")
    (broken,) = faults(found)
    assert broken.what.startswith(f"GPU 1: {trial} does not work") and why in broken.what


def test_vllm_that_fails_or_is_missing_costs_its_jobs_only() -> None:
    failing = look(smi(H200), trials=answers(broken={"vllm": "ImportError: undefined symbol: _ZN3c10"}))
    assert levels(failing) == {"ok", "note"} and not faults(failing)
    without = {name: built for name, built in LISTS.items() if name != "vLLM"}
    assert [f.what for f in look(smi(H200), lists=without) if f.level == "note"] == [
        "vLLM is not installed; jobs that generate with it cannot run"
    ]


def test_a_cpu_torch_beside_a_gpu_and_one_that_sees_none() -> None:
    facts = {
        "torch": "2.13.0+cpu",
        "cuda": "",
        "devices": 0,
        "list": "",
        "error": "Torch not compiled with CUDA enabled",
    }
    (wrong,) = faults(look(smi(H200), trials={**answers(), "torch": Answer(facts=facts)}))
    assert "2.13.0+cpu is a CPU build" in wrong.what
    blind = {**facts, "error": "The NVIDIA driver on your system is too old (found version 12040)"}
    (old,) = faults(look(smi(H200), trials={**answers(), "torch": Answer(facts=blind)}))
    assert "older than this CUDA needs" in old.what
    hidden = {**facts, "torch": "2.11.0+cu130", "error": "No CUDA GPUs are available"}
    (none,) = faults(look(smi(H200), trials={**answers(), "torch": Answer(facts=hidden)}))
    assert "fewer GPUs are visible" in none.what and "CUDA_VISIBLE_DEVICES" in none.fix
    (crashed,) = faults(look(smi(H200), trials={**answers(), "torch": Answer(error="died of SIGILL")}))
    assert "does not have" in crashed.what


def test_exclusive_mode_partitions_and_memory_errors_are_told() -> None:
    found = look(smi(H200.replace("Default, Disabled, 0", "Exclusive_Process, Enabled, 3")))
    assert [f.level for f in found if "GPU 0 is" in f.what] == ["note", "note"]
    assert ["3 memory errors" in f.what for f in faults(found)] == [True]


def test_a_gpu_that_lets_no_process_in_and_a_driver_that_talks_nonsense() -> None:
    (closed,) = faults(look(smi(H200.replace("Default", "Prohibited"))))
    assert "lets no process in" in closed.what and "-c DEFAULT" in closed.fix
    (lost,) = faults(look(smi(H200.replace("580.95.05", "[Unknown Error]"))))
    assert "[Unknown Error]" in lost.what and "Xid" in lost.fix


@pytest.mark.parametrize(("mode", "most"), [("Exclusive_Process", 1), ("Default", 4)])
def test_trials_do_not_turn_each_other_away_from_an_exclusive_gpu(mode: str, most: int) -> None:
    inside, peak, lock = 0, 0, threading.Lock()

    def trial(name: str) -> Answer:
        nonlocal inside, peak
        with lock:
            inside += 1
            peak = max(peak, inside)
        time.sleep(0.2)
        with lock:
            inside -= 1
        return answers()[name]

    found = smi(H200.replace("Default", mode))
    instruments = Instruments(
        smi=lambda: found, trial=trial, build_lists=lambda **_: LISTS, llama_devices=lambda: LLAMA
    )
    assert not faults(list(gpu_findings(MACHINE, device="auto", instruments=instruments)))
    assert peak == most


def test_a_gpu_nothing_was_said_about_counts_as_broken() -> None:
    found = list(trial_findings("torch", Answer(error="no answer within 3 s: the GPU or its driver hangs"), gpus=2))
    assert [(f.level, "hangs" in f.what) for f in found] == [("fault", True)] * 2


def test_a_gpu_hidden_from_cuda_is_named_with_the_variable_that_hides_it() -> None:
    (hidden,) = faults(list(trial_findings("torch", answers()["torch"], gpus=2)))
    assert hidden.what.startswith("GPU 1") and "CUDA_VISIBLE_DEVICES" in hidden.fix


def test_every_cause_can_be_found() -> None:
    """No pattern hides behind an earlier one."""
    for cause in CAUSES:
        example = cause.pattern.split("|")[0].replace(".*", " ").replace("(unknown error", "unknown error")
        assert find_cause(example) is cause, example
        assert cause.why and cause.fix


def test_the_query_and_its_answer_have_the_same_columns() -> None:
    (row,) = parse_rows(H200)
    assert tuple(row) == QUERY and row["compute_cap"] == "9.0"
    assert parse_rows("a, b") == ()


def test_trials_run_in_processes_that_may_hang_crash_and_chatter() -> None:
    def run(code: str, seconds: float = 30) -> Answer:
        return run_trial("x", command=(sys.executable, "-c", code), seconds=seconds)

    good = run(
        """print('chatter'); print('{"facts": {"cuda": "13.0"}}'); print('{"device": 0, "ok": true, "text": "t"}')"""
    )
    assert good.facts == {"cuda": "13.0"} and good.outcomes[0]["ok"] and not good.error
    assert "SIGSEGV" in run("import os; os.kill(os.getpid(), 11)").error
    assert "No module named" in run("import no_such_module_at_all").error
    late = run(
        """import time; print('{"device": 0, "ok": true, "text": "t"}', flush=True); time.sleep(60)""", seconds=1
    )
    assert "hangs" in late.error and len(late.outcomes) == 1


def test_a_program_that_takes_too_long_goes_with_all_it_started(tmp_path: Path) -> None:
    """Compilers that a trial started must not work on; one that left the group is left behind, not waited for."""
    file = tmp_path / "children"
    code = f"""import pathlib, subprocess, sys, time
children = [subprocess.Popen(["sleep", "30"], start_new_session=alone) for alone in (False, True)]
pathlib.Path({str(file)!r}).write_text(" ".join(str(child.pid) for child in children))
print("begun", flush=True); time.sleep(30)"""
    start = time.monotonic()
    ran = run_limited([sys.executable, "-c", code], seconds=3)
    assert ran.status is None and ran.stdout == "begun\n" and time.monotonic() - start < 15
    below, apart = (int(word) for word in file.read_text().split())
    os.kill(apart, 9)
    assert not Path(f"/proc/{below}/cwd").exists(), "it was killed with its parent"


def test_gpus_are_numbered_as_nvidia_smi_numbers_them() -> None:
    ran = run_limited([sys.executable, "-c", "import os; print(os.environ['CUDA_DEVICE_ORDER'])"], seconds=30)
    assert ran == Ran(status=0, stdout="PCI_BUS_ID\n", stderr="")

"""All of the doctor's checks in order. What they look through is passed in, so that tests can show them any machine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dropforge.doctor import machine
from dropforge.doctor.causes import explained, find_cause
from dropforge.doctor.driver import Smi, ask_nvidia_smi, compute_capabilities, driver_findings
from dropforge.doctor.fatbin import BuildList
from dropforge.doctor.finding import Finding, fault, note, ok
from dropforge.doctor.libraries import library_build_lists, library_findings
from dropforge.doctor.limited import run_limited
from dropforge.doctor.trial_process import Answer, run_trial
from dropforge.hardware import Hardware
from dropforge.paths import DataRoot

REQUIRED_TRIALS = ("torch", "triton", "bitsandbytes")
LLAMA_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Instruments:
    """What looks at the GPU."""

    smi: Callable[[], Smi] = ask_nvidia_smi
    trial: Callable[[str], Answer] = run_trial
    build_lists: Callable[..., Mapping[str, BuildList]] = library_build_lists
    llama_devices: Callable[[], str] = lambda: list_llama_devices()


def examine(
    root: DataRoot, hardware: Hardware, *, device: str, instruments: Instruments | None = None
) -> Iterator[Finding]:
    """Every finding. `device`: auto, cpu or cuda, as in DROPFORGE_DEVICE."""
    yield from machine.package_findings(hardware.cpu_cores)
    yield from machine.memory_findings(hardware)
    yield from machine.limit_findings()
    yield from machine.open_file_findings()
    yield from machine.shared_memory_findings()
    yield from machine.disk_findings(root, hardware)
    yield from machine.llama_cpp_findings()
    yield from gpu_findings(hardware, device=device, instruments=instruments or Instruments())


def gpu_findings(hardware: Hardware, *, device: str, instruments: Instruments) -> Iterator[Finding]:
    """Driver, then every GPU against every library, then real work on each."""
    if device == "cpu":
        yield note("GPU: not used, because DROPFORGE_DEVICE=cpu")
        return
    smi = instruments.smi()
    if not smi.gpus:
        yield from driver_findings(smi, cuda="", unified_memory="")
        return
    lists_vllm = "vLLM" in instruments.build_lists(torch_list="", cuda="")
    names = (*REQUIRED_TRIALS, *(("vllm",) if lists_vllm else ()))
    # A GPU in an exclusive mode lets in one process at a time; the trials would turn each other away.
    at_once = 1 if any(gpu["compute_mode"].startswith("Exclusive") for gpu in smi.gpus) else len(names) + 1
    with ThreadPoolExecutor(at_once) as pool:
        llama = pool.submit(instruments.llama_devices)
        answers = dict(zip(names, pool.map(instruments.trial, names), strict=True))
    facts = answers["torch"].facts
    unified = f"memory shared with the CPU ({hardware.memory_available >> 20} MiB available)"
    yield from driver_findings(smi, cuda=facts.get("cuda", ""), unified_memory=unified)
    if not facts.get("devices"):
        yield _torch_sees_nothing(answers["torch"])
        return
    lists = instruments.build_lists(torch_list=facts["list"], cuda=facts["cuda"])
    yield from library_findings(compute_capabilities(smi), lists)
    for name in names:
        yield from trial_findings(name, answers[name], gpus=len(smi.gpus))
    yield from llama_findings(llama.result(), gpus=len(smi.gpus), compiled=bool(lists.get("llama.cpp")))
    if not lists_vllm:
        yield note("vLLM is not installed; jobs that generate with it cannot run")


def trial_findings(name: str, answer: Answer, *, gpus: int) -> Iterator[Finding]:
    """One line per GPU. A trial that says nothing about a GPU failed on it."""
    spoken = {int(outcome["device"]): outcome for outcome in answer.outcomes}
    for index in range(gpus):
        outcome = spoken.get(index, {"ok": False, "text": f"{name}: {answer.error or 'torch does not show this GPU'}"})
        if outcome["ok"]:
            yield ok(f"GPU {index}: {outcome['text']}")
            continue
        error = str(outcome["text"])
        what = f"GPU {index}: {name} does not work: {explained(error)}"
        fix = find_cause(error).fix
        yield fault(what, fix) if name in REQUIRED_TRIALS else note(what, fix)


def llama_findings(listing: str, *, gpus: int, compiled: bool) -> Iterator[Finding]:
    """What llama.cpp makes of the GPUs.

    Args:
        listing: what llama-server --list-devices printed, or why it did not; empty when there is no llama.cpp.
        compiled: it was built with code for some GPU.
    """
    if not listing:
        return
    seen = sum(line.lstrip().startswith("CUDA") for line in listing.splitlines())
    if seen >= gpus:
        yield ok(f"llama.cpp sees {seen} GPU" + "s" * (seen != 1))
    elif "ggml_cuda" in listing or seen:
        said = "\n".join(line for line in listing.splitlines() if "ggml_cuda" in line) or listing
        yield note(f"llama.cpp sees {seen} of {gpus} GPUs: {explained(said)}", find_cause(said).fix)
    elif compiled:
        yield note("llama.cpp has a CUDA part but lists no GPU, so it works on the CPU",
                   "run llama-server --list-devices, beside libggml-cuda.so, and report what it says")  # fmt: skip
    else:
        yield note("llama.cpp was built for the CPU: exports work, quantising, checking and chatting are slower",
                   "use the image, whose llama.cpp has CUDA; make llama builds for the CPU alone")  # fmt: skip


def list_llama_devices() -> str:
    from dropforge.errors import EnvironmentFault
    from dropforge.llama_cpp.locate import find_llama_cpp

    try:
        server = find_llama_cpp().tool("llama-server")
        done = run_limited([server, "--list-devices"], seconds=LLAMA_SECONDS)
    except EnvironmentFault:
        return ""  # machine.llama_cpp_findings has said so
    except OSError as error:
        return f"ggml_cuda: {error}"
    if done.status is None:
        return f"{done.stdout}{done.stderr}\nggml_cuda: no answer: the GPU or its driver hangs"
    return f"{done.stdout}{done.stderr}\n{cuda_part_refused(server.parent)}"


def cuda_part_refused(folder: Path) -> str:
    """Why the CUDA library in `folder` does not load, which llama.cpp passes over in silence; empty if it does."""
    library = folder / "libggml-cuda.so"
    if not library.exists():
        return ""
    load = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"
    done = run_limited([sys.executable, "-I", "-c", load, library], seconds=LLAMA_SECONDS)
    return f"ggml_cuda: {done.stderr.strip().splitlines()[-1]}" if done.status and done.stderr.strip() else ""


def _torch_sees_nothing(answer: Answer) -> Finding:
    error = str(answer.facts.get("error") or answer.error or "it lists none")
    if "not compiled with CUDA" in error:
        return fault(f"torch {answer.facts.get('torch', '')} is a CPU build, although there is a GPU",
                     "install the CUDA build (use the cuda image), or set DROPFORGE_DEVICE=cpu")  # fmt: skip
    return fault(f"torch sees no GPU although the driver lists one: {explained(error)}", find_cause(error).fix)

"""Each library's list of GPUs it was compiled for, and whether the GPUs here are on it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path

from dropforge.doctor.fatbin import BuildList, parse_build_list, read_build_list
from dropforge.doctor.finding import Finding, fault, note, ok

REQUIRED = frozenset({"torch", "bitsandbytes"})
"""Without these no job runs on the GPU; the others cost speed or one feature."""


def library_build_lists(*, torch_list: str, cuda: str) -> Mapping[str, BuildList]:
    """By library name; a library that is not installed is absent, one compiled for no GPU has an empty list.

    Args:
        torch_list: torch.cuda.get_arch_list(), joined by blanks.
        cuda: the CUDA version torch was built for, which decides what bitsandbytes loads.
    """
    lists = {"torch": parse_build_list(torch_list)}
    bitsandbytes = _folder("bitsandbytes")
    if bitsandbytes:
        lists["bitsandbytes"] = _joined(bitsandbytes, f"libbitsandbytes_cuda{cuda.replace('.', '')}.so")
    vllm = _folder("vllm")
    if vllm:
        lists["vLLM"] = _joined(vllm, "_C*.so")
    llama = _llama_cpp()
    if llama:
        lists["llama.cpp"] = llama_cpp_build_list(llama)
    return lists


def llama_cpp_build_list(root: Path) -> BuildList:
    """Of llama.cpp's programs and libraries under `root`; empty for a CPU build."""
    return _joined(root, "**/libggml-cuda*.so*") | _joined(root, "bin/llama-server")


def library_findings(capabilities: Mapping[str, int], lists: Mapping[str, BuildList]) -> Iterator[Finding]:
    """One line per library: which GPUs it lacks code for.

    Args:
        capabilities: by GPU label ("GPU 0"), as 10 * major + minor.
    """
    for name, built in lists.items():
        missing = [label for label, one in capabilities.items() if not built.runs_on(one)]
        if not missing:
            yield ok(f"{name} is compiled for {built}: every GPU is on it")
            continue
        what = f"{name} is compiled for {built or 'no GPU at all'}, not for " + ", ".join(
            f"{label} ({capabilities[label] // 10}.{capabilities[label] % 10})" for label in missing
        )
        fix = FIXES.get(name, "use an image or a build that lists this compute capability")
        yield (
            fault(what, fix) if name in REQUIRED else note(f"{what}; {LOSSES.get(name, 'it will not work there')}", fix)
        )


FIXES = {
    "torch": "use an image whose torch lists this compute capability (older GPUs: an older release), or leave the GPU "
             "out with --gpus '\"device=...\"'",
    "llama.cpp": "build the image with --build-arg CUDA_ARCHITECTURES holding it",
}  # fmt: skip
LOSSES = {
    "llama.cpp": "quantising, checking and chatting use the CPU there, which is slower",
    "vLLM": "jobs that generate with vLLM cannot use it",
}


def _folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _llama_cpp() -> Path | None:
    from dropforge.errors import EnvironmentFault
    from dropforge.llama_cpp.locate import find_llama_cpp

    try:
        return find_llama_cpp().root
    except EnvironmentFault:
        return None


def _joined(folder: Path, pattern: str) -> BuildList:
    built = BuildList()
    for library in sorted(folder.glob(pattern)):
        if library.is_file() and library.stat().st_size:
            built |= read_build_list(library)
    return built

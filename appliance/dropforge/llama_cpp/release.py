"""Which llama.cpp this release of Dropforge uses, and how it is built. docker/llama.lock repeats the archive's pin."""

from __future__ import annotations

import hashlib
from pathlib import Path

SDIST = "llama-cpp-python"
SDIST_VERSION = "0.3.36"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
COMMIT = "0c1e57098bba43ac29e6e3b677cdceebdd22334f"
SOURCE_IN_SDIST = f"llama_cpp_python-{SDIST_VERSION}/vendor/llama.cpp/"

TARGETS = ("llama-quantize", "llama-server")
CMAKE_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    f"-DLLAMA_BUILD_COMMIT={COMMIT[:9]}",
    "-DLLAMA_BUILD_NUMBER=0",
    # One file per tool, which needs nothing but the C and C++ runtime.
    "-DBUILD_SHARED_LIBS=OFF",
    # Not tuned to the machine that builds, because the tools travel in images and shared caches.
    "-DGGML_NATIVE=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    # The web page would be fetched from the network during the build.
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)
CONVERTER_PARTS = ("conversion", "gguf-py", "convert_lora_to_gguf.py", "LICENSE")


def flags_hash() -> str:
    """Eight hex digits that change whenever the build would."""
    return hashlib.sha256("\n".join((*CMAKE_FLAGS, *TARGETS)).encode()).hexdigest()[:8]


def cache_folder(cache: Path) -> Path:
    """Where the finished build lies below `cache`: bin/ and convert/."""
    return cache / f"llama.cpp-{COMMIT[:12]}-{flags_hash()}"

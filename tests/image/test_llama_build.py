"""docker/build-llama.sh with its folders moved below a temporary one and its programs replaced: what it builds where."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("/src/", "/build/", "/opt/llama.cpp", "/etc/os-release", "/run/secrets/")
COMPILER = """#!/bin/sh
echo "$@" >>"$0.log"
for word in "$@"; do
	[ "$previous" = --into ] && into=$word
	[ "$word" = --cmake-flag=-DGGML_CUDA=ON ] && cuda=1
	previous=$word
done
mkdir -p "$into/bin" && touch "$into/bin/llama-server"
[ -z "$cuda" ] || [ -e "$0.no-cuda" ] || touch "$into/bin/libggml-cuda.so"
"""


@dataclass
class Machine:
    """A machine that builds llama.cpp; `build` gives the folder below /build that was used."""

    root: Path

    def write(self, path: str, text: str, *, mode: int = 0o644) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)

    def system(self, name: str, version: str) -> None:
        self.write("etc/os-release", f'ID={name}\nVERSION_ID="{version}"\nPRETTY_NAME="{name} as of today"\n')

    def nvcc(self, release: str) -> None:
        self.write("bin/nvcc", f"#!/bin/sh\necho release {release}\n", mode=0o755)

    def run(self, variant: str, architectures: str) -> subprocess.CompletedProcess[str]:
        script = (ROOT / "docker/build-llama.sh").read_text(encoding="utf-8")
        for folder in FOLDERS:
            script = script.replace(folder, f"{self.root}{folder}")
        self.write("script.sh", script)
        env = {"PATH": f"{self.root / 'bin'}:{os.environ['PATH']}"}
        words = ["sh", self.root / "script.sh", variant, architectures]
        return subprocess.run(words, env=env, capture_output=True, text=True, timeout=60, check=False)

    def build(self, variant: str = "cuda", architectures: str = "90-real") -> str:
        done = self.run(variant, architectures)
        assert done.returncode == 0, done.stderr
        (built,) = (self.root / "opt/llama.cpp/bin").parent.glob("bin/libggml-cuda.so") if variant != "cpu" else ("",)
        assert bool(built) == (variant != "cpu")
        subprocess.run(["rm", "-r", self.root / "opt/llama.cpp"], check=True)
        words = (self.root / "bin/python3.log").read_text().splitlines()[-1].split()
        return words[words.index("--into") + 1]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path)
    for folder in ("build", "opt", "run/secrets"):
        (tmp_path / folder).mkdir(parents=True)
    made.write("src/appliance/dropforge/llama_cpp/release.py", "COMMIT = 1\n")
    made.write("bin/apt-get", "#!/bin/sh\n", mode=0o755)
    made.write("bin/python3", COMPILER, mode=0o755)
    made.system("ubuntu", "24.04")
    made.nvcc("13.0")
    return made


def test_what_was_built_before_is_taken_only_where_it_fits(machine: Machine) -> None:
    """The cache mount outlives releases, and serves every variant and every base."""
    first = machine.build()
    assert machine.build() == first
    found = {"first": first, "variant": machine.build("cpu"), "GPUs": machine.build(architectures="90-real;100-real")}
    machine.nvcc("13.2")
    found["compiler"] = machine.build()
    machine.nvcc("13.0")
    machine.system("debian", "12")
    found["base"] = machine.build()
    machine.system("ubuntu", "24.04")
    machine.write("src/appliance/dropforge/llama_cpp/release.py", "COMMIT = 2\n")
    found["release"] = machine.build()
    assert len(set(found.values())) == len(found), found


def test_a_gpu_variant_without_its_cuda_library_is_no_build(machine: Machine) -> None:
    machine.write("bin/python3.no-cuda", "")
    done = machine.run("cuda", "90-real")
    assert done.returncode == 1 and "has no CUDA library" in done.stderr
    assert not (machine.root / "opt/llama.cpp").exists()


def test_the_number_of_compilers_is_left_to_the_build(machine: Machine) -> None:
    """It counts cores and memory; nproc alone would start 64 times nvcc on a machine with 64 cores and 32 GiB."""
    machine.build()
    assert "--jobs" not in (machine.root / "bin/python3.log").read_text()

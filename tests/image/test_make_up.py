"""`make up` on machines that are not at hand: docker/compose.sh with an engine that only writes down what it is asked."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REFUSAL = 'docker: Error response from daemon: could not select device driver "" with capabilities: [[gpu]]'
ENGINE = f"""#!/bin/bash
echo "$@" >>"$(dirname "$0")/asked"
case $1 in
run) [[ ! -e $(dirname "$0")/refuses ]] || {{ echo '{REFUSAL}' >&2; exit 125; }} ;;
inspect) cat "$(dirname "$0")/state" ;;
logs) printf '=== Dropforge is ready ===\\n%s\\n' "$(printf '=%.0s' {{1..70}})" ;;
esac
"""


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder with compose.sh, an engine, and nvidia-smi on its PATH (bin)."""
    (tmp_path / "docker").mkdir()
    (tmp_path / "bin").mkdir()
    shutil.copy(ROOT / "docker/compose.sh", tmp_path / "docker/compose.sh")
    for name, text in {
        "docker/engine.sh": f"#!/bin/sh\necho {tmp_path}/engine\n", "engine": ENGINE, "bin/nvidia-smi": "#!/bin/sh\n",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "state").write_text("created\n")
    return tmp_path


def up(machine: Path, **env: str) -> tuple[subprocess.CompletedProcess[str], str]:
    path = f"{machine / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        [machine / "docker/compose.sh", "up"],
        env={"PATH": path, **env}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done, (machine / "asked").read_text()


def test_the_gpu_is_given_unless_the_cpu_was_asked_for(machine: Path) -> None:
    done, asked = up(machine)
    assert done.returncode == 0 and "--gpus all" in asked and "is ready" in done.stdout
    (machine / "asked").unlink()
    assert "--gpus" not in up(machine, DROPFORGE_DEVICE="cpu")[1]


@pytest.mark.parametrize(("state", "removed"), [("created", True), ("running", False), ("exited", False)])
def test_an_engine_that_refuses_leaves_no_container_and_a_way_out(machine: Path, state: str, removed: bool) -> None:
    """One that runs already, or ran before, keeps its name: the engine refuses that too."""
    (machine / "refuses").touch()
    (machine / "state").write_text(f"{state}\n")
    done, asked = up(machine)
    assert done.returncode == 1
    assert (
        REFUSAL in done.stderr and "fix: look the message up" in done.stderr and "DROPFORGE_DEVICE=cpu" in done.stderr
    )
    assert ("rm dropforge" in asked) is removed

"""docs/guides/container.md, followed word for word in an empty folder."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from image_container import DEVICE, IMAGE, READY, docker
from image_jupyter import Browser

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "guides" / "container.md"
README = ROOT / "README.md"


def blocks() -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_the_page_works_as_written(tmp_path: Path, docker_path: str) -> None:
    if "dropforge" in docker("ps", "-a", "--format", "{{.Names}}").stdout.split():
        pytest.fail("a container named dropforge exists on this machine; the page would collide with it")
    said: list[str] = []
    try:
        for block in blocks():
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block], cwd=tmp_path, env={**os.environ, "PATH": docker_path},
                capture_output=True, text=True, timeout=300, check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
            said.append(done.stdout)
            if "state/jupyter_password" in block:
                visitor = Browser(8888)
                assert visitor.login(done.stdout.strip()) == 302
                assert visitor.run_cell("print(6 * 7)") == "42\n"
    finally:
        docker("rm", "--force", "dropforge", check=False)
    assert len(said) == 8
    assert "=== Dropforge is ready" in said[1] and "Au" in said[5] and ".gguf" in said[5]
    assert list((tmp_path / "work" / "results").rglob("*.gguf"))


def test_the_line_of_the_readme_works_as_written(tmp_path: Path, docker_path: str) -> None:
    """In the foreground, with -e DROPFORGE_DEVICE=cpu instead of --gpus all, as the README says; Ctrl-C ends it."""
    (line,) = re.findall(r"^docker run .* dropforge$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert "(without a GPU: -e DROPFORGE_DEVICE=cpu instead of --gpus all)" in README.read_text(encoding="utf-8")
    command = line.replace("--gpus all", "-e DROPFORGE_DEVICE=cpu")
    assert command != line
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command}"], cwd=tmp_path, env={**os.environ, "PATH": docker_path}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout
    try:
        said = ""
        for text in process.stdout:
            said += text
            if text == READY + "\n":
                break
        (password,) = re.findall(r"^  password   (\S+) ", said, re.MULTILINE)
        assert Browser(8888).login(password) == 302
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        left = docker("ps", "-aq", "--filter", f"volume={tmp_path}/work").stdout.split()
        if left:
            docker("rm", "--force", *left)
    assert (tmp_path / "work" / "inbox").is_dir()


def test_make_up_shell_and_down(tmp_path: Path) -> None:
    """What the page's last line promises, on other ports and another folder."""
    env = {
        **os.environ,
        "IMAGE": IMAGE,
        "WORK": str(tmp_path / "work"),
        "PORT": "18888",
        "SSH_HOST_PORT": "12222",
        **DEVICE,
    }

    def make(target: str, said: str = "") -> str:
        done = subprocess.run(["make", "--no-print-directory", target], cwd=ROOT, env=env, input=said, text=True,
                              capture_output=True, timeout=120, check=False)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    try:
        assert make("up").startswith("=== Dropforge is ready")
        assert make("shell", "id -un; cd work; pwd; ls -d inbox\n").splitlines()[-3:] == [
            "dropforge",
            "/workspace/work",
            "inbox",
        ]
        make("down")
        assert "dropforge" not in docker("ps", "-a", "--format", "{{.Names}}").stdout.split()
        assert (tmp_path / "work" / "inbox").is_dir()
    finally:
        docker("rm", "--force", "dropforge", check=False)

"""docker/compose.example.yaml with a real compose: the plugin, or Debian's docker-compose."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from image_container import IMAGE, READY, client, docker, until
from image_jupyter import Browser

EXAMPLE = Path(__file__).parents[2] / "docker" / "compose.example.yaml"
PASSWORD = 'hard "words", 100 % sure, ü'


def compose_command() -> list[str]:
    if subprocess.run([client(), "compose", "version"], capture_output=True, check=False).returncode == 0:
        return [client(), "compose"]
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    pytest.fail("there is no compose (Debian: apt-get install docker-compose)")


def without_gpu(text: str) -> str:
    """The example after what its own comment says to do on a machine without a GPU."""
    part = re.compile(
        r"^    deploy: +# without a GPU: delete this part, and put (.*) into environment\n(?: {6}.*\n)+", re.M
    )
    found = part.search(text)
    assert found, text
    return part.sub("", text).replace("    environment:\n", f"    environment:\n      {found[1]}\n")


def preparation(text: str) -> str:
    (line,) = re.findall(r"^#   (mkdir .*)$", text, re.MULTILINE)
    return line


def test_the_example_comes_up_keeps_and_goes_down(tmp_path: Path, ssh_key: Path) -> None:
    if "dropforge" in docker("ps", "-a", "--format", "{{.Names}}").stdout.split():
        pytest.fail("a container named dropforge exists on this machine; the example would collide with it")
    text, words = EXAMPLE.read_text(encoding="utf-8"), compose_command()
    (tmp_path / "compose.yaml").write_text(without_gpu(text).replace("image: dropforge\n", f"image: {IMAGE}\n"))
    subprocess.run(["bash", "-euc", preparation(text).replace("a password", PASSWORD)], cwd=tmp_path, check=True)
    assert (tmp_path / "jupyter_password.txt").stat().st_mode & 0o777 == 0o600
    env = {**os.environ, "SSH_KEY": ssh_key.with_suffix(".pub").read_text().strip()}

    def compose(*arguments: str) -> str:
        done = subprocess.run([*words, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True,
                              timeout=200, check=False)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    try:
        compose("up", "-d")
        use(compose, ssh_key, blocks=1)
        settings = docker("inspect", "--format", "{{.HostConfig.ShmSize}} {{.Config.StopTimeout}} "
                          "{{.HostConfig.RestartPolicy.Name}}", "dropforge").stdout  # fmt: skip
        assert settings.split() == [str(1 << 30), "150", "unless-stopped"]
        assert PASSWORD not in docker("inspect", "dropforge").stdout
        compose("restart")
        use(compose, ssh_key, blocks=2)
        began = time.monotonic()
        compose("down")
        assert time.monotonic() - began < 60
        assert "dropforge" not in docker("ps", "-a", "--format", "{{.Names}}").stdout.split()
        assert (tmp_path / "work" / "state" / "ssh" / "ssh_host_ed25519_key").exists()
    finally:
        subprocess.run([*words, "down"], cwd=tmp_path, env=env, capture_output=True, timeout=200, check=False)


def use(compose: Callable[..., str], ssh_key: Path, *, blocks: int) -> None:
    """Log in as its comments say, once the ready block was printed that many times."""
    until(90, "the ready block", lambda: compose("logs", "dropforge").count(READY) >= blocks)
    visitor = Browser(8888)
    assert visitor.login(PASSWORD) == 302
    until(
        60,
        "healthy",
        lambda: docker("exec", "dropforge", "python", "/opt/dropforge/healthcheck.py", check=False).returncode == 0,
    )
    said = subprocess.run(
        ["ssh", "-i", str(ssh_key), "-p", "2222", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
         "-o", "IdentitiesOnly=yes", "-o", "LogLevel=ERROR", "dropforge@localhost", "id -un"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert said.stdout == "dropforge\n", said.stderr

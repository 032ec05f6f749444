"""docs/guides/container.md, followed word for word in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from image_container import docker
from image_jupyter import Browser

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "container.md"


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

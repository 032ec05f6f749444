"""Real containers from the image DROPFORGE_TEST_IMAGE (default dropforge:cpu), through the docker client.

Helpers are in image_container.py and image_jupyter.py, which tests import by name.
Every container of a test run carries a label of its own and is removed at the end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from image_container import IMAGE, Container, client, docker

ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.image)


@pytest.fixture(scope="session")
def run_label() -> Iterator[str]:
    label = f"dropforge.test={uuid.uuid4().hex[:12]}"
    if docker("image", "inspect", IMAGE, check=False).returncode:
        pytest.fail(f"there is no image {IMAGE}: make image-test builds it")
    yield label
    left = docker("ps", "-aq", "--filter", f"label={label}").stdout.split()
    if left:
        docker("rm", "--force", "--volumes", *left)


@pytest.fixture(scope="session")
def ssh_keys(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three private keys of several kinds; the public ones lie beside them as .pub."""
    folder = tmp_path_factory.mktemp("ssh")
    paths = [folder / "id_ed25519", folder / "id_ecdsa", folder / "id_other"]
    for path, kind in zip(paths, ("ed25519", "ecdsa", "ed25519"), strict=True):
        subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", f"me@{kind}", "-f", str(path)], check=True)
    return paths


@pytest.fixture(scope="session")
def ssh_key(ssh_keys: list[Path]) -> Path:
    return ssh_keys[0]


@pytest.fixture
def start(run_label: str, tmp_path: Path) -> Iterator[Callable[..., Container]]:
    """start(..) -> a ready Container on tmp_path/work; see Container.start. Removed after the test."""
    made: list[Container] = []

    def start(*arguments: str, **options: object) -> Container:
        options.setdefault("work", tmp_path / "work")
        container = Container.start(run_label, *arguments, **options)  # type: ignore[arg-type]
        made.append(container)
        return container

    yield start
    for container in made:
        container.remove()


@pytest.fixture(scope="session")
def docker_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH on which `docker` is the client of these tests and the image name dropforge means the image under test."""
    folder = tmp_path_factory.mktemp("bin")
    shim = folder / "docker"
    shim.write_text(
        "#!/bin/bash\nwords=()\n"
        f'for word in "$@"; do [[ $word != dropforge || ${{words[-1]:-}} == --name || $1 != run ]] || word={IMAGE}; words+=("$word"); done\n'
        f'exec {client()} "${{words[@]}}"\n',
        encoding="utf-8",
    )
    shim.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"

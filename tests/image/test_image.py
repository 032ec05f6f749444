"""The image itself: what is in it, what must not be, and the files it is built from. Some tests need no container."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from image_container import IMAGE, client, docker

ROOT = Path(__file__).parents[2]
SHELL_SCRIPTS = [
    ROOT / "entrypoint.sh",
    *sorted((ROOT / "docker").glob("*.sh")),
    *sorted((ROOT / "docker/services").glob("*.sh")),
]
DOCKERFILES = [ROOT / "Dockerfile", ROOT / "Dockerfile.dgx"]
SIZE_LIMIT = 4_000_000_000


def inside(*command: str) -> str:
    return docker("run", "--rm", "--entrypoint", command[0], IMAGE, *command[1:]).stdout


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    value: dict[str, Any] = json.loads(docker("image", "inspect", IMAGE).stdout)[0]
    return value


def test_size_and_layers(config: dict[str, Any]) -> None:
    assert config["Size"] < SIZE_LIMIT
    said = subprocess.run(
        ["python3", ROOT / "docker/manifest.py", "layers", IMAGE, "--docker", "/usr/bin/docker"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    manifest = json.loads(said.stdout)
    assert len(manifest["layers"]) > 5 and all(layer["bytes"] > 0 and layer["made_by"] for layer in manifest["layers"])
    assert manifest["bytes"] == pytest.approx(config["Size"], rel=0.02)
    assert manifest["image_id"] == config["Id"] and manifest["python_packages"]["dropforge"] == manifest["dropforge"]


def test_what_the_build_was_given_as_secrets_is_in_no_layer(config: dict[str, Any]) -> None:
    """`make image-test` builds with a pip.conf that holds this word; see docker/canary-pip.conf."""
    (canary,) = re.findall(r"canary-[a-z0-9]{20}", (ROOT / "docker" / "canary-pip.conf").read_text(encoding="utf-8"))
    found = subprocess.run(
        ["grep", "-rlaF", canary, *layer_folders(config)],
        capture_output=True, text=True, env={"LC_ALL": "C", "PATH": os.environ["PATH"]}, timeout=180, check=False,
    )  # fmt: skip
    assert (found.stdout, found.returncode) == ("", 1), found.stderr


def layer_folders(config: dict[str, Any]) -> list[str]:
    """Where the engine keeps the files of each layer, also those that a later layer hides."""
    data = config["GraphDriver"]["Data"]
    folders = [*data["LowerDir"].split(":"), data["UpperDir"]]
    assert len(folders) == len(config["RootFS"]["Layers"]) and all(Path(folder).is_dir() for folder in folders)
    return folders


def test_configuration(config: dict[str, Any]) -> None:
    settings = config["Config"]
    assert settings["StopSignal"] == "SIGTERM" and settings["WorkingDir"] == "/workspace"
    assert set(settings["ExposedPorts"]) == {"22/tcp", "8888/tcp"}
    assert settings["Healthcheck"]["Test"][-1].endswith("healthcheck.py")
    assert settings["Labels"]["dropforge.variant"] == "cpu"
    assert re.fullmatch(r"[0-9a-f]{7,40}", settings["Labels"]["org.opencontainers.image.revision"])


def test_manifest_and_sbom_name_everything(config: dict[str, Any]) -> None:
    manifest = json.loads(inside("cat", "/opt/dropforge/manifest.json"))
    sbom = json.loads(inside("cat", "/opt/dropforge/sbom.spdx.json"))
    assert manifest["python_packages"]["transformers"] == "5.17.0" and "openssh-server" in manifest["system_packages"]
    installed = json.loads(inside("/opt/venv/bin/python", "-m", "pip", "list", "--format", "json"))
    assert {one["name"] for one in installed} == set(manifest["python_packages"])
    names = {package["name"] for package in sbom["packages"]}
    assert names == {*manifest["python_packages"], *manifest["system_packages"], "llama.cpp"}
    identifiers = [package["SPDXID"] for package in sbom["packages"]]
    assert len(set(identifiers)) == len(identifiers)
    assert all(re.fullmatch(r"SPDXRef-[A-Za-z0-9.-]+", one) for one in identifiers)


def test_the_packages_fit_together_and_are_the_locked_ones() -> None:
    lock = (ROOT / "docker" / "image-cpu.lock").read_text(encoding="utf-8")
    locked: dict[str, set[str]] = {}  # a package may have several, for several versions of Python
    for name, version in re.findall(r"^([a-z0-9-]+)==([^ ]+)", lock, re.MULTILINE):
        locked.setdefault(name, set()).add(version)
    manifest = json.loads(inside("cat", "/opt/dropforge/manifest.json"))["python_packages"]
    installed = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in manifest.items()}
    extra = installed.keys() - locked.keys()
    assert extra == {"torch", "dropforge"}
    assert {name: version for name, version in installed.items() if version not in locked.get(name, {version})} == {}


def test_nothing_is_left_that_should_not_be() -> None:
    found = inside(
        "sh", "-c",
        "find / -xdev -type f -perm /6000; ls /etc/ssh/ssh_host_* /usr/bin/gcc /usr/bin/cc /usr/bin/make 2>/dev/null;"
        "find / -xdev -name '*.whl' ! -path '/usr/share/python-wheels/*'; find /root/.cache -type f 2>/dev/null; find /workspace -type f;"
        "grep -l 'ERROR' /var/log/* 2>/dev/null; true",
    )  # fmt: skip
    assert found.splitlines() == ["/usr/bin/sudo"]


def test_the_project_is_installed_as_a_wheel_and_not_as_its_tree() -> None:
    where = inside(
        "/opt/venv/bin/python", "-c", "import dropforge, dropforge_kernels as k; print(dropforge.__file__, k.__file__)"
    )
    assert all("/opt/venv/lib/python3" in path for path in where.split())
    assert "tests" not in inside("sh", "-c", "ls / /opt /opt/dropforge /workspace")


def test_python_starts_warm() -> None:
    """Every module was compiled while building: nobody can write there later, and each start would compile them again."""
    missing = inside(
        "/opt/venv/bin/python", "-c",
        "import pathlib, sysconfig\n"
        "for name in ('torch', 'transformers', 'dropforge', 'jupyter_server'):\n"
        "    for path in (pathlib.Path(sysconfig.get_path('purelib')) / name).glob('*.py'):\n"
        "        if not list((path.parent / '__pycache__').glob(path.stem + '.*.pyc')): print(path)",
    )  # fmt: skip
    assert missing == ""


def test_certificates_of_ones_own_are_trusted_in_the_image(tmp_path: Path) -> None:
    """The Dockerfile's own line, on a folder like docker/local/certs, in a container instead of a build of an hour."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=canary authority", "-keyout", tmp_path / "key.pem", "-out", tmp_path / "mine.crt"],
        check=True, capture_output=True,
    )  # fmt: skip
    (line,) = re.findall(r"^    (find /local/certs .*)$", DOCKERFILES[0].read_text(encoding="utf-8"), re.MULTILINE)
    trusted = "import ssl; print([c for c in ssl.create_default_context().get_ca_certs() if 'canary' in str(c)])"
    run = ["run", "--rm", "--volume", f"{tmp_path}:/local/certs:ro", "--entrypoint", "bash", IMAGE, "-c"]
    assert "canary authority" in docker(*run, f'{line} && /opt/venv/bin/python -c "{trusted}"').stdout
    assert docker(*run, f'/opt/venv/bin/python -c "{trusted}"').stdout == "[]\n"


def test_every_script_and_dockerfile_is_linted() -> None:
    """shellcheck, shfmt and hadolint run in `make lint`, on everything there is."""
    recipe = subprocess.run(["make", "--dry-run", "lint"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for tool, files in (("shellcheck", SHELL_SCRIPTS), ("shfmt", SHELL_SCRIPTS), ("hadolint", DOCKERFILES)):
        (line,) = (line for line in recipe.splitlines() if f"bin/{tool} " in line)
        assert {str(file.relative_to(ROOT)) for file in files} <= set(line.split())


def test_the_entrypoint_stays_small() -> None:
    assert len((ROOT / "entrypoint.sh").read_text(encoding="utf-8").splitlines()) <= 80


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_follow_the_rules(file: Path) -> None:
    """hadolint's rules that matter here: named stages, pinned tags, no ADD, pipes that fail, no sudo, JSON commands."""
    text = re.sub(r"\\\n", " ", file.read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    stages = [line for line in lines if line.startswith("FROM ")]
    assert all(re.fullmatch(r"FROM \S+ AS [a-z-]+", line) for line in stages)
    assert not any(re.search(r":latest\b", line) for line in stages)
    assert all(":" in line.split()[1] or line.split()[1].startswith("${") or line.split()[1] in known
               for line, known in zip(stages, [[s.split()[3] for s in stages[:i]] for i in range(len(stages))], strict=True))  # fmt: skip
    assert not [
        line
        for line in lines
        if line.startswith(("ADD ", "MAINTAINER ")) or re.search(r"\bsudo\b|apt-get upgrade", line)
    ]
    assert all(line.split(None, 1)[1].startswith("[") for line in lines if line.startswith(("ENTRYPOINT ", "CMD ")))
    assert sum(line.startswith(("ENTRYPOINT ", "HEALTHCHECK ", "STOPSIGNAL ")) for line in lines) == 3
    copied = [
        part for line in lines if line.startswith("COPY ") and "--from=" not in line for part in line.split()[1:-1]
    ]
    assert [part for part in copied if "$" not in part and not (ROOT / part).exists()] == []


def test_both_dockerfiles_are_one() -> None:
    """Dockerfile.dgx differs in comments and two defaults only."""
    x86, dgx = (
        [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        for file in DOCKERFILES
    )
    different = [(one, other) for one, other in zip(x86, dgx, strict=True) if one != other]
    assert [one.partition("=")[0] for one, _ in different] == ["ARG VARIANT", "ARG CUDA_ARCHITECTURES"]
    assert [other for _, other in different] == ["ARG VARIANT=dgx", "ARG CUDA_ARCHITECTURES=121-real"]


@pytest.mark.parametrize(
    ("file", "gpus"), [(DOCKERFILES[0], (75, 80, 86, 89, 90, 100, 103, 120)), (DOCKERFILES[1], (121,))]
)
def test_llama_cpp_is_compiled_for_every_gpu_of_its_machines(file: Path, gpus: tuple[int, ...]) -> None:
    """Read as its build reads the list, which makes 12xa of 12x: code that no other GPU runs, as PTX neither."""
    from dropforge.doctor.fatbin import parse_build_list

    (listed,) = re.findall(r"^ARG CUDA_ARCHITECTURES=(\S+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    built = parse_build_list(re.sub(r"\b(12\d)\b", r"\1a", listed))
    assert [one for one in gpus if not built.runs_on(one)] == []
    assert not re.search(r"12\d\w?-virtual", listed), "it would be compiled for nobody"


@pytest.mark.parametrize("lock", ["image-cpu.lock", "image-cuda.lock", "image-dgx.lock"])
def test_locks_are_hashed_pinned_and_name_no_index(lock: str) -> None:
    text = (ROOT / "docker" / lock).read_text(encoding="utf-8")
    entries = re.split(r"\n(?=[a-zA-Z0-9])", text.strip())
    assert len(entries) > 100
    assert all(re.match(r"[a-z0-9-]+==[^ ]+", entry) and "--hash=sha256:" in entry for entry in entries)
    assert "index-url" not in text and "://" not in text and "file:" not in text
    pins = re.findall(r"^([a-z]+==\S+)", (ROOT / "docker" / "pins.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(pins) >= 7 and all(f"{pin} " in text for pin in pins)
    if lock != "image-cpu.lock":
        assert "torch==2.11.0 " in text and "vllm==0.25.1 " in text
        # nvcc refuses another version's headers, and PTX of a newer one needs a newer driver than the image asks for.
        toolkit = "nvidia-(?:cuda-(?:nvcc|crt|cccl|runtime|nvrtc)|nvvm|nvjitlink)"
        assert {version[:5] for version in re.findall(rf"^{toolkit}==(\S+)", text, re.MULTILINE)} == {"13.0."}


@pytest.mark.parametrize(("variant", "machine"), [("cuda", "x86_64"), ("dgx", "aarch64")])
def test_every_locked_package_has_a_wheel_for_its_machine(tmp_path: Path, variant: str, machine: str) -> None:
    """With a locked hash, for Python 3.12 and the glibc of Ubuntu 24.04; nothing is installed. Asks the package index."""
    done = subprocess.run(
        [Path(sys.executable).with_name("uv"), "pip", "install", "--dry-run", "--require-hashes", "--no-deps",
         "--only-binary", ":all:", "--python-version", "3.12", "--python-platform", f"{machine}-manylinux_2_39",
         "--target", tmp_path, "--requirement", ROOT / "docker" / f"image-{variant}.lock"],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\n + torch==2.11.0\n" in done.stderr and "\n + nvidia-cuda-nvcc==13.0." in done.stderr


@pytest.mark.parametrize(
    ("said", "architectures"),
    [("echo 9.0; echo 12.0; echo 9.0", "90-real;120-real\n"), ("echo [N/A]", "\n"), ("echo No devices; exit 6", "\n")],
)
def test_llama_cpp_is_compiled_for_the_gpus_that_are_here(tmp_path: Path, said: str, architectures: str) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/bash\n{said}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    found = subprocess.run([ROOT / "docker/architectures.sh"], capture_output=True, text=True, env=env, check=True)
    assert found.stdout == architectures


def test_the_dgx_file_builds_on_a_stand_in_base() -> None:
    """Its CPU variant, every stage, on the base of the image under test; out of the cache that this one filled."""
    made_of = docker("image", "history", "--no-trunc", "--format", "{{.Comment}}", IMAGE).stdout
    base = "dropforge-base:bookworm" if "Imported from" in made_of else "debian:bookworm-slim"
    words = ["build", "--quiet", "--file", ROOT / "Dockerfile.dgx", "--target", "image"]
    for name, value in (("VARIANT", "cpu"), ("BASE", base), ("LLAMA_BASE", base), ("TORCH_PIP_ARGS", "")):
        words += ["--build-arg", f"{name}={value}"]
    done = subprocess.run([client(), *map(str, words), str(ROOT)], capture_output=True, text=True,
                          env={**os.environ, "DOCKER_BUILDKIT": "1"}, timeout=280, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert docker("run", "--rm", done.stdout.strip(), "python", "-c", "print(6 * 7)").stdout.strip() == "42"


def test_the_gpu_images_take_the_same_versions() -> None:
    versions = [
        re.findall(
            r"^[a-z0-9-]+==[^ ]+", (ROOT / "docker" / f"image-{variant}.lock").read_text(encoding="utf-8"), re.MULTILINE
        )
        for variant in ("cuda", "dgx")
    ]
    assert versions[0] == versions[1]


def test_every_variable_is_documented() -> None:
    page = (ROOT / "docs/reference/container.md").read_text(encoding="utf-8")
    table = page.partition("## Environment variables")[2].partition("\nThe daemon's own")[0]
    documented = set(
        re.findall(
            r"`([A-Z][A-Z_]+)`", "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
        )
    )
    documented |= {"NB_UID", "NB_GID"} & set(re.findall(r"`([A-Z_]+)`", table))
    code = (ROOT / "entrypoint.sh").read_text(encoding="utf-8") + (ROOT / "docker/services/hooks.sh").read_text(
        encoding="utf-8"
    )
    read = set(re.findall(r"\$\{([A-Z][A-Z_]+):?-", code))
    prepare = (ROOT / "docker/services/prepare.py").read_text(encoding="utf-8")
    read |= set(re.findall(r"""(?:port\(env, |env\.get\(|secret\()"([A-Z_]+)\"""", prepare))
    read |= set(re.search(r"^for name in (.*); do$", code, re.MULTILINE)[1].split())
    assert read - {"DROPFORGE_STARTED_BY"} == documented


def test_the_compose_example_is_what_the_page_says() -> None:
    from ruamel.yaml import YAML

    service = YAML(typ="safe").load((ROOT / "docker/compose.example.yaml").read_text(encoding="utf-8"))["services"][
        "dropforge"
    ]
    assert service["stop_grace_period"] == "150s" and "./work:/workspace/work" in service["volumes"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])

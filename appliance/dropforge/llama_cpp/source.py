"""Fetch the pinned source archive and unpack llama.cpp from it. The hash is checked before anything is unpacked."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

from dropforge.errors import EnvironmentFault, Reason
from dropforge.files import rename_folder, sha256_file, write_text
from dropforge.llama_cpp.child import tail
from dropforge.llama_cpp.release import SDIST, SDIST_SHA256, SDIST_VERSION, SOURCE_IN_SDIST


def unpacked_source(folder: Path, *, sdist: Path | None, log: Callable[[str], None]) -> Path:
    """`folder`/source with llama.cpp's tree, from `sdist` or from the package index."""
    source = folder / "source"
    if (source / "CMakeLists.txt").is_file():
        return source
    archive = sdist or fetch(folder, log=log)
    check_hash(archive)
    log("unpacking llama.cpp")
    scratch = folder / "unpacking"
    if scratch.exists():
        shutil.rmtree(scratch)
    with tarfile.open(archive) as tar:
        members = []
        for member in tar:
            if member.name.startswith(SOURCE_IN_SDIST):
                member.name = member.name.removeprefix(SOURCE_IN_SDIST)
                members.append(member)
        if sys.version_info >= (3, 11, 4):
            tar.extractall(scratch, members=members, filter="data")
        else:  # Debian 12's Python has no filters yet; the archive is the pinned one, byte for byte
            tar.extractall(scratch, members=members)
    rename_folder(scratch, source)
    return source


def fetch(folder: Path, *, log: Callable[[str], None]) -> Path:
    """Download the archive with pip, which checks the hash; returns its path."""
    archive = folder / f"{SDIST.replace('-', '_')}-{SDIST_VERSION}.tar.gz"
    if archive.is_file() and sha256_file(archive) == SDIST_SHA256:
        return archive
    log(f"fetching {SDIST} {SDIST_VERSION} (77 MB)")
    requirement = folder / "requirement.txt"
    write_text(requirement, f"{SDIST}=={SDIST_VERSION} --hash=sha256:{SDIST_SHA256}\n")
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", SDIST, "--require-hashes",
        "--disable-pip-version-check", "--dest", str(folder), "--requirement", str(requirement),
    ]  # fmt: skip
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode != 0 or not archive.is_file():
        raise EnvironmentFault(
            f"{SDIST} {SDIST_VERSION} could not be fetched", code="llama-fetch", where="pip download",
            why=f"it said last:\n{tail(done.stdout.decode('utf-8', errors='replace'))}", reason=Reason.OFFLINE,
            fix="check the network, or download the archive elsewhere and pass --sdist FILE",
        )  # fmt: skip
    return archive


def check_hash(archive: Path) -> None:
    """Raise EnvironmentFault (llama-hash) unless the archive is exactly the pinned one."""
    if not archive.is_file():
        raise EnvironmentFault(f"{archive.name} does not exist", code="llama-fetch", where=str(archive))
    found = sha256_file(archive)
    if found != SDIST_SHA256:
        raise EnvironmentFault(
            f"{archive.name} is not the pinned archive", code="llama-hash", where=str(archive),
            why=f"sha256 is {found}, expected {SDIST_SHA256}", fix="delete it and run the command again",
        )  # fmt: skip

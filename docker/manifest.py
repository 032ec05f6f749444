"""What is in the image, written while it is built: manifest.json for people and programs, sbom.spdx.json for scanners.

manifest.py image --variant cpu --revision 0123abc --into FOLDER      (inside the build)
manifest.py layers IMAGE --docker /usr/bin/docker                     (after it: the same and the size of each layer)
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

LLAMA = Path("/opt/llama.cpp")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Write the image's manifest and SBOM, or list its layers.")
    commands = parser.add_subparsers(dest="command", required=True)
    image = commands.add_parser("image")
    image.add_argument("--variant", required=True)
    image.add_argument("--revision", required=True)
    image.add_argument("--into", type=Path, required=True)
    of_layers = commands.add_parser("layers")
    of_layers.add_argument("image")
    of_layers.add_argument("--docker", default="docker")
    options = parser.parse_args(arguments)
    if options.command == "layers":
        print(json.dumps(with_layers(options.image, docker=options.docker), indent=1, sort_keys=True))
        return 0
    manifest = describe(options.variant, options.revision)
    write(options.into / "manifest.json", manifest)
    write(options.into / "sbom.spdx.json", sbom(manifest))
    return 0


def write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def describe(variant: str, revision: str) -> dict[str, Any]:
    """Versions of everything, and which GPUs each library was compiled for."""
    release = platform.freedesktop_os_release()
    python = {dist.metadata["Name"]: dist.version for dist in metadata.distributions()}
    return {
        "schema": 1, "variant": variant, "revision": revision, "dropforge": python["dropforge"],
        "system": release["PRETTY_NAME"], "system_id": f"{release['ID']}-{release['VERSION_ID']}",
        "python": platform.python_version(), "machine": platform.machine(), "llama.cpp": llama_cpp(),
        "cuda_architectures": cuda_architectures() if variant != "cpu" else {},
        "python_packages": dict(sorted(python.items(), key=lambda item: item[0].lower())),
        "system_packages": system_packages(),
    }  # fmt: skip


def system_packages() -> dict[str, str]:
    done = subprocess.run(
        ["dpkg-query", "-W", "-f", "${binary:Package}\t${Version}\n"], capture_output=True, text=True, check=True
    )
    return dict(line.split("\t") for line in done.stdout.splitlines())


def llama_cpp() -> str:
    from dropforge.llama_cpp.release import COMMIT

    subprocess.run([LLAMA / "bin" / "llama-server", "--version"], capture_output=True, check=True)  # it must start here
    return COMMIT


def cuda_architectures() -> dict[str, str]:
    """Compute capabilities each library carries code for, read out of the libraries; torch says its own."""
    import torch
    from dropforge.doctor.libraries import library_build_lists

    lists = library_build_lists(torch_list=torch._C._cuda_getArchFlags() or "", cuda=torch.version.cuda or "")
    return {name: str(built) or "CPU only" for name, built in lists.items()}


def sbom(manifest: dict[str, Any]) -> dict[str, Any]:
    """SPDX 2.3: one package per Python distribution and per system package."""
    packages = [
        package(name, version, f"pkg:pypi/{re.sub(r'[-_.]+', '-', name).lower()}@{version}")
        for name, version in manifest["python_packages"].items()
    ]
    system = manifest["system_id"].split("-")[0]
    packages += [
        package(name, version, f"pkg:deb/{system}/{name.split(':')[0]}@{version}")
        for name, version in manifest["system_packages"].items()
    ]
    commit = manifest["llama.cpp"]
    packages.append(package("llama.cpp", commit, f"pkg:github/ggml-org/llama.cpp@{commit}"))
    name = f"dropforge-{manifest['dropforge']}-{manifest['variant']}"
    return {
        "spdxVersion": "SPDX-2.3", "dataLicense": "CC0-1.0", "SPDXID": "SPDXRef-DOCUMENT", "name": name,
        "documentNamespace": f"https://dropforge.invalid/spdx/{name}-{manifest['revision']}",
        "creationInfo": {"created": "1970-01-01T00:00:00Z", "creators": ["Tool: dropforge docker/manifest.py"]},
        "packages": packages,
        "relationships": [
            {"spdxElementId": "SPDXRef-DOCUMENT", "relationshipType": "DESCRIBES", "relatedSpdxElement": one["SPDXID"]}
            for one in packages
        ],
    }  # fmt: skip


def package(name: str, version: str, locator: str) -> dict[str, Any]:
    kind = locator.split("/")[0].removeprefix("pkg:")
    return {
        "SPDXID": "SPDXRef-" + re.sub(r"[^A-Za-z0-9.-]", "-", f"{kind}-{name}"),
        "name": name, "versionInfo": version, "downloadLocation": "NOASSERTION", "filesAnalyzed": False,
        "licenseConcluded": "NOASSERTION", "licenseDeclared": "NOASSERTION", "copyrightText": "NOASSERTION",
        "externalRefs": [
            {"referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl", "referenceLocator": locator}
        ],
    }  # fmt: skip


def with_layers(image: str, *, docker: str) -> dict[str, Any]:
    """The image's own manifest, its id, the bytes of each layer that has any, oldest first, and of the whole.

    An image cannot hold its own id or the size of its last layer, so this is made after the build.
    """
    inside = subprocess.run(
        [docker, "run", "--rm", "--network", "none", "--entrypoint", "cat", image, "/opt/dropforge/manifest.json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    image_id = subprocess.run(
        [docker, "image", "inspect", "-f", "{{.Id}}", image], capture_output=True, text=True, check=True
    )
    manifest: dict[str, Any] = json.loads(inside.stdout)
    done = subprocess.run(
        [docker, "history", "--no-trunc", "--human=false", "--format", "{{.Size}}\t{{.CreatedBy}}", image],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    rows = [line.split("\t", 1) for line in reversed(done.stdout.splitlines())]
    parts = [
        {"bytes": int(size), "made_by": " ".join(by.split())[:160] or "the base image"}
        for size, by in rows
        if int(size)
    ]
    return manifest | {
        "image": image, "image_id": image_id.stdout.strip(), "bytes": sum(part["bytes"] for part in parts),
        "layers": parts,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

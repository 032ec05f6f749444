"""The licence of the base model, which the exports made from it must carry."""

from __future__ import annotations

import re
from pathlib import Path

LARGEST = 200_000
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FRONT_MATTER = re.compile(r"\A---\n(?P<fields>.*?)\n---", re.DOTALL)
_FIELD = re.compile(r"^(?P<name>license|license_name): *(?P<value>\S.*)$", re.MULTILINE)


def license_of(folder: Path) -> str:
    """Text of the LICENSE file, else the licence's name in README.md's header, else nothing.

    Tabs become spaces, and page breaks and carriage returns go, because a Modelfile cannot hold them.
    """
    for path in sorted(folder.glob("LICENSE*")):
        if path.is_file() and path.stat().st_size <= LARGEST:
            text = path.read_text(encoding="utf-8", errors="replace")
            return text.replace("\r", "").replace("\f", "").expandtabs(4).strip()
    return license_name(folder)


def license_name(folder: Path) -> str:
    """The licence's name in README.md's header, such as apache-2.0; empty without one."""
    readme = folder / "README.md"
    header = _FRONT_MATTER.match(readme.read_text(encoding="utf-8", errors="replace")) if readme.is_file() else None
    if header is None:
        return ""
    fields = {found["name"]: found["value"].strip("\"' ") for found in _FIELD.finditer(header["fields"])}
    return fields.get("license_name") or fields.get("license", "")


def origin(model_id: str, *, base: Path) -> dict[str, bool | int | str]:
    """A GGUF's metadata about where the model comes from: the licence's name and the base model."""
    organization, _, name = model_id.rpartition("/")
    found: dict[str, bool | int | str] = {"general.base_model.count": 1, "general.base_model.0.name": name}
    if HUB_ID.fullmatch(model_id):
        found["general.base_model.0.organization"] = organization
        found["general.base_model.0.repo_url"] = f"https://huggingface.co/{model_id}"
    if name_of_license := license_name(base):
        found["general.license"] = name_of_license
    return found

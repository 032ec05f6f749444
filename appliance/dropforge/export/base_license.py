"""The licence of the base model, which the exports made from it must carry."""

from __future__ import annotations

import re
from pathlib import Path

LARGEST = 200_000
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
    readme = folder / "README.md"
    header = _FRONT_MATTER.match(readme.read_text(encoding="utf-8", errors="replace")) if readme.is_file() else None
    if header is None:
        return ""
    fields = {found["name"]: found["value"].strip("\"' ") for found in _FIELD.finditer(header["fields"])}
    return fields.get("license_name") or fields.get("license", "")

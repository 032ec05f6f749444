"""Which names in the inbox are jobs, which are left alone, and how a hostile name is shown."""

from __future__ import annotations

import re
import unicodedata
from pathlib import PurePosixPath

from dropforge.spec_file import SUFFIXES

JOB_FOLDER_SUFFIX = ".job"
JOB_FILE_NAMES = tuple(f"job{suffix}" for suffix in SUFFIXES)

# What editors, browsers, rsync, syncthing and copy tools write before a file is finished. Left alone, never removed.
_TEMPORARY_SUFFIXES = (
    ".tmp", ".temp", ".part", ".partial", ".crdownload", ".filepart", ".swp", ".swo", ".swx", ".bak", ".download",
    ".opdownload", ".lock", "~", "#",
)  # fmt: skip
_TEMPORARY_PREFIXES = (".", "~", "#", "rsync.", "syncthing.", "~syncthing~")


def is_ignored(name: str) -> bool:
    """Hidden and temporary names: another program is still busy with the file."""
    lower = name.lower()
    return lower.startswith(_TEMPORARY_PREFIXES) or lower.endswith(_TEMPORARY_SUFFIXES)


def is_job_folder(name: str) -> bool:
    return name.lower().endswith(JOB_FOLDER_SUFFIX)


def is_spec_file(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def slug(name: str) -> str:
    """The name as part of an id: lower-case letters, digits and dashes, at most 40 characters."""
    return re.sub(r"[^a-z0-9]+", "-", PurePosixPath(name).stem.lower()).strip("-")[:40].rstrip("-") or "job"


def printable(name: str, *, limit: int = 120) -> str:
    """A name that is safe in logs, Markdown and terminals: control, format and undecodable characters are escaped."""
    # Text that Python calls printable holds nothing that `_safe` escapes, and nearly all names are.
    shown = name if name.isprintable() else "".join(_safe(character) for character in name)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def _safe(character: str) -> str:
    # C* = control, format (right-to-left marks), surrogates (bytes that are not UTF-8); Z* except space = separators.
    kind = unicodedata.category(character)
    if kind[0] == "C" or (kind[0] == "Z" and character != " "):
        return character.encode("unicode_escape", "backslashreplace").decode("ascii")
    return character

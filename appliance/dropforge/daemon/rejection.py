"""`rejected/<id>/`: the dropped file, unchanged and under its own name, beside ERROR.txt and error.json.

The folder is made first and the file renamed into it last, so that after a crash the file is in the inbox or here.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dropforge.daemon.crash_points import CrashHook
from dropforge.daemon.names import printable
from dropforge.daemon.queue import rename
from dropforge.errors import DropforgeError
from dropforge.events import utc_now
from dropforge.files import as_json, fill_new_folder, fsync_file, fsync_folder, read_json
from dropforge.paths import DataRoot
from dropforge.spec_file import MAX_BYTES

ERROR_TEXT = "ERROR.txt"
ERROR_JSON = "error.json"
_OWN_FILES = (ERROR_TEXT, ERROR_JSON)
_FILE_FOLDER = "file"


def reject(root: DataRoot, name: str, error: DropforgeError, *, job_id: str, crash: CrashHook) -> Path:
    """Move inbox/<name> to rejected/<id>/ and say why. Returns the folder."""
    folder = root.rejected / job_id
    # A file that carries the name of one of ours keeps it in a folder of its own.
    place = folder / _FILE_FOLDER / name if name in (*_OWN_FILES, _FILE_FOLDER) else folder / name
    value = {
        "schema": 1, "id": job_id, "file": printable(name), "time": utc_now(), "state": "rejected",
        "reason": error.reason.value, "problems": [_printable(asdict(problem)) for problem in error.problems],
    }  # fmt: skip
    place.parent.mkdir(parents=True)
    try:
        said = {ERROR_TEXT: _text(name, error, folder).encode("utf-8"), ERROR_JSON: as_json(value)}
        fill_new_folder(folder, said)
        fsync_folder(root.rejected)
        _make_durable(root.inbox / name)
        crash("reject.folder-made")
        rename(root.inbox / name, place)
    except BaseException:
        if not os.path.lexists(place):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    crash("reject.moved")
    return folder


def _make_durable(dropped: Path) -> None:
    """A refused spec is kept, so it must survive a power cut as well; a large file that is none is not waited for."""
    info = dropped.lstat()
    if stat.S_ISREG(info.st_mode) and info.st_size <= MAX_BYTES:
        fsync_file(dropped)


def rejections(root: DataRoot, *, newest: int | None = None) -> Iterator[dict[str, Any]]:
    """The error.json of every rejected file (or of so many of the newest), oldest first.

    Folders without a readable one, or without the file (it is still in the inbox), are left out.
    """
    names = sorted(os.listdir(root.rejected))  # noqa: PTH208  (10,000 of them: names are enough)
    for name in names if newest is None else names[len(names) - min(newest, len(names)) :]:
        try:
            if holds_a_file(root.rejected / name):
                yield read_json(root.rejected / name / ERROR_JSON)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            continue


def remove_unfinished(root: DataRoot) -> list[str]:
    """At start-up: folders whose file never arrived (a crash before the rename). The file is still in the inbox."""
    removed = []
    for folder in root.rejected.iterdir():
        if folder.is_dir() and not folder.is_symlink() and not holds_a_file(folder):
            shutil.rmtree(folder)
            removed.append(folder.name)
    return removed


def holds_a_file(folder: Path) -> bool:
    """True when the refused file has arrived in its folder."""
    kept = folder / _FILE_FOLDER
    inside = {entry.name for entry in folder.iterdir()} - set(_OWN_FILES)
    return bool(inside) and not (inside == {_FILE_FOLDER} and kept.is_dir() and not any(kept.iterdir()))


def _text(name: str, error: DropforgeError, folder: Path) -> str:
    problems = "\n\n".join(problem_text(asdict(problem)) for problem in error.problems)
    count = len(error.problems)
    return (
        f"{printable(name)} did not become a job. {'One thing is' if count == 1 else f'{count} things are'} wrong.\n\n"
        f"{problems}\n\n"
        f"Your file is kept unchanged in this folder (rejected/{folder.name}/).\n"
        "Correct it and drop it into inbox/ again. This folder may be deleted at any time.\n"
    )


def problem_text(problem: dict[str, str]) -> str:
    """One problem for people: what, where, why, what to do, code."""
    labels = {"what": "What", "where": "Where", "why": "Why", "fix": "What to do", "code": "Code"}
    return "\n".join(f"{label + ':':<12}{_lines(problem[key])}" for key, label in labels.items() if problem[key])


def _printable(problem: dict[str, str]) -> dict[str, str]:
    """Without characters that JSON in UTF-8 cannot hold or a terminal would obey."""
    return {key: "\n".join(printable(line, limit=2000) for line in text.splitlines()) for key, text in problem.items()}


def _lines(text: str) -> str:
    return f"\n{'':<12}".join(printable(line, limit=2000) for line in text.splitlines())

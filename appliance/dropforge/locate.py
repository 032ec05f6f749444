"""From a relative path in a spec to a real file, never outside the folders a job may read."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from dropforge.errors import DataError, Reason
from dropforge.paths import DataRoot, RunFolder

Locate = Callable[[str], Path]


def data_locator(root: DataRoot, run: RunFolder | None = None, *, beside: Path | None = None) -> Locate:
    """A function that finds data named in a spec: first in the job's own data, then beside the spec, then in datasets/.

    `datasets/rows.jsonl` is found there too, as it is written everywhere.

    Args:
        root: the data root; its datasets/ folder is searched last.
        run: the run whose data/ folder holds what came in a NAME.job folder.
        beside: the folder of the spec file, for jobs run in the foreground.
    """
    folders = [folder for folder in (run.job_data if run else None, beside, root.datasets) if folder]

    def locate(path: str) -> Path:
        for folder in [*folders, root.path] if path.startswith("datasets/") else folders:
            candidate = folder / path
            if os.path.lexists(candidate):
                return _safe(candidate, folder, path)
        looked = ", ".join(f"{folder.name}/" for folder in folders)
        raise DataError(
            f"data {path!r} does not exist",
            code="data-missing",
            where="data.train",
            why=f"looked in {looked}",
            fix="copy it to datasets/, or drop a folder NAME.job/ that holds job.yaml and the data",
            reason=Reason.MISSING_INPUT,
        )

    return locate


def _safe(candidate: Path, folder: Path, path: str) -> Path:
    """Refuse links and special files anywhere between `folder` and the file: they could lead out or block."""
    current = folder
    for part in Path(path).parts:
        current = current / part
        mode = os.lstat(current).st_mode
        if stat.S_ISLNK(mode):
            raise _refused(path, f"{part!r} is a symbolic link", "copy the file itself")
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise _refused(path, "it is neither a file nor a folder", "name a regular file")
    if stat.S_ISDIR(mode):
        for inner in candidate.rglob("*"):
            kind = inner.lstat().st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                raise _refused(path, f"{inner.relative_to(folder)} is a link or a special file", "copy the file itself")
    return candidate


def _refused(path: str, why: str, fix: str) -> DataError:
    return DataError(f"data {path!r} is refused", code="data-refused", where="data.train", why=why, fix=fix)

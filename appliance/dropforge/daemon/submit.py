"""Drop a job so that it is complete by construction: written into inbox/.staging, made durable, then renamed."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path

from dropforge.daemon.candidate import read_regular
from dropforge.daemon.names import JOB_FOLDER_SUFFIX, is_ignored, is_job_folder, is_spec_file, printable, slug
from dropforge.daemon.watcher import fingerprint, mark_ready
from dropforge.errors import CommandError
from dropforge.files import TEMPORARY_PREFIX, fsync_file, fsync_folder, regular_files
from dropforge.paths import DataRoot


def submit(root: DataRoot, spec_path: Path, *, files: Mapping[str, Path] | None = None) -> Path:
    """Put a spec file or a NAME.job/ folder into the inbox. Nothing is read by the daemon before all of it is there.

    Args:
        spec_path: a spec (.yaml, .yml, .json, .toml), or a folder whose name ends in .job.
        files: data that goes with a spec file: the relative path in the spec to the file or folder to copy. The job
            is then dropped as a folder.

    Returns:
        Its place in the inbox. The name carries a random part, so that nothing there is ever replaced.

    Raises:
        CommandError: submit-missing, submit-not-a-spec, submit-link. SpecError: inbox-* as the daemon would say.
    """
    if not os.path.lexists(spec_path):
        raise CommandError(
            f"{spec_path} does not exist", code="submit-missing", where=str(spec_path), fix="check the path"
        )
    root.create()
    token = secrets.token_hex(4)
    if spec_path.is_dir():
        return _submit_folder(root, spec_path, token)
    if not is_spec_file(spec_path.name):
        raise CommandError(f"{spec_path.name} is not a job spec", code="submit-not-a-spec", where=str(spec_path),
                           why="its name does not end in .yaml, .yml, .json or .toml", fix="rename it")  # fmt: skip
    if files:
        return _submit_with_files(root, spec_path, files, token)
    raw = read_regular(spec_path)
    staged = root.staging / _inbox_name(spec_path.stem, token, spec_path.suffix.lower())
    staged.write_bytes(raw)
    return _release(root, staged)


def _submit_folder(root: DataRoot, folder: Path, token: str) -> Path:
    if not is_job_folder(folder.name):
        raise CommandError(f"{folder.name} is not a job folder", code="submit-not-a-spec", where=str(folder),
                           why="its name does not end in .job",
                           fix="rename it, or name the spec file in it")  # fmt: skip
    staged = root.staging / _inbox_name(folder.stem, token, JOB_FOLDER_SUFFIX)
    _copy(folder, staged)
    return _release(root, staged)


def _submit_with_files(root: DataRoot, spec_path: Path, files: Mapping[str, Path], token: str) -> Path:
    raw = read_regular(spec_path)
    staged = root.staging / _inbox_name(spec_path.stem, token, JOB_FOLDER_SUFFIX)
    staged.mkdir()
    (staged / f"job{spec_path.suffix.lower()}").write_bytes(raw)
    for relative, source in files.items():
        if relative.startswith("/") or ".." in Path(relative).parts:
            raise CommandError(f"{printable(relative)!r} leads out of the job folder", code="submit-link",
                               where=printable(relative), fix="use a path below the folder of the spec")  # fmt: skip
        (staged / relative).parent.mkdir(parents=True, exist_ok=True)
        _copy(source, staged / relative)
    return _release(root, staged)


def _inbox_name(stem: str, token: str, suffix: str) -> str:
    """The user's own name where it is harmless, so that it can be recognised."""
    keep = (
        stem
        if stem == printable(stem, limit=100) and not is_ignored(stem) and len(stem.encode()) <= 120
        else slug(stem)
    )
    return f"{keep}.{token}{suffix}"


def _copy(source: Path, target: Path) -> None:
    """Copy plain files and folders; links and special files are refused, as the daemon would refuse them."""
    for path in (source, *(source.rglob("*") if source.is_dir() else ())):
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise CommandError(f"{path} is a link or a special file", code="submit-link", where=str(path),
                               fix="submit the file itself")  # fmt: skip
    if source.is_dir():
        shutil.copytree(
            source, target, ignore=lambda _folder, names: [n for n in names if n.startswith(TEMPORARY_PREFIX)]
        )
    else:
        shutil.copyfile(source, target)


def _release(root: DataRoot, staged: Path) -> Path:
    """Make everything durable, leave the mark that says complete, rename."""
    if staged.is_dir():
        for path in regular_files(staged):
            fsync_file(path)
        for folder in (staged, *(path for path in staged.rglob("*") if path.is_dir())):
            fsync_folder(folder)
    else:
        fsync_file(staged)
    seen = fingerprint(staged)
    assert seen is not None, "it was written just now"
    mark_ready(root, staged.name, seen)
    target = root.inbox / staged.name
    staged.rename(target)
    fsync_folder(root.staging)
    fsync_folder(root.inbox)
    return target

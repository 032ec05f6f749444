"""An entry of the inbox that has settled, read without trusting it: no links, no special files, bounded size."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from dropforge.daemon.names import JOB_FILE_NAMES, is_job_folder, is_spec_file, printable
from dropforge.daemon.watcher import FOLDER_ENTRIES
from dropforge.errors import SpecError
from dropforge.files import regular_files, sha256_bytes, sha256_file
from dropforge.spec_file import MAX_BYTES

COMPARED_FOLDER_BYTES = 64 * 1024 * 1024
"""Job folders with more data than this are never compared for being duplicates: hashing would hold up the queue."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What was read of a dropped file or job folder."""

    path: Path
    raw: bytes
    """The spec."""
    spec_name: str
    """Name of the spec file: its ending says how to parse it."""
    is_folder: bool
    digest: str
    """See Ticket.digest."""

    @property
    def suffix(self) -> str:
        return Path(self.spec_name).suffix.lower()

    @property
    def ends_in_a_line(self) -> bool:
        """True when the spec stops in the middle of a line, as a copy may. JSON shows by itself whether it is whole."""
        return self.suffix != ".json" and not self.raw.endswith(b"\n")

    @property
    def shown_name(self) -> str:
        """For the checker, which goes by the ending, and for messages."""
        return shown_name(self.spec_name)

    @property
    def spec_digest(self) -> str:
        return sha256_bytes(self.raw)


def shown_name(spec_name: str) -> str:
    """The name of a spec file, harmless to print, with its ending whole."""
    return printable(Path(spec_name).stem) + Path(spec_name).suffix.lower()


def read_candidate(path: Path) -> Candidate:
    """Raises SpecError (codes inbox-*) for what can never be a job, FileNotFoundError when it is gone."""
    if stat.S_ISDIR(path.lstat().st_mode):
        return _read_folder(path)
    if not is_spec_file(path.name) and stat.S_ISREG(path.lstat().st_mode):
        raise _refused(
            path, code="inbox-not-a-spec", what="not a job spec",
            why="its name does not end in .yaml, .yml, .json or .toml",
            fix="put data into datasets/, or into a folder NAME.job/ together with job.yaml",
        )  # fmt: skip
    raw = read_regular(path)
    return Candidate(path=path, raw=raw, spec_name=path.name, is_folder=False, digest=sha256_bytes(raw))


def read_regular(path: Path) -> bytes:
    """The bytes of a small regular file with one name. The file that was opened is checked, not the path."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        is_link = path.is_symlink()
        if isinstance(error, (FileNotFoundError, PermissionError)) and not is_link:
            raise
        why = "it is a symbolic link" if is_link else f"it cannot be opened as a file ({error.strerror})"
        raise _refused(
            path, code="inbox-not-a-file", what="not a plain file", why=why, fix="copy the file itself"
        ) from None
    with os.fdopen(fd, "rb") as stream:
        _refuse_odd_file(path, os.fstat(stream.fileno()))
        raw = stream.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise _refused(
            path, code="inbox-too-large", what="too large for a job spec",
            why=f"it holds more than {MAX_BYTES // 1024} KiB", fix="put data into its own file and name it in `data`",
        )  # fmt: skip
    return raw


def _refuse_odd_file(path: Path, info: os.stat_result) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise _refused(
            path, code="inbox-not-a-file", what="not a plain file", why="it is a pipe, socket or device",
            fix="drop a plain file",
        )  # fmt: skip
    if info.st_nlink != 1:
        raise _refused(
            path, code="inbox-hard-link", what="a file with several names",
            why="a hard link could be changed from outside while the job runs",
            fix="copy the file (cp) instead of linking it",
        )  # fmt: skip
    if info.st_size == 0:
        raise _refused(
            path, code="inbox-empty", what="an empty file", why="it holds no bytes",
            fix="write at least version, name, model, data, export",
        )  # fmt: skip


def _read_folder(path: Path) -> Candidate:
    if not is_job_folder(path.name):
        raise _refused(
            path, code="inbox-not-a-job-folder", what="not a job folder", why="its name does not end in .job",
            fix="rename it to NAME.job, with job.yaml and the data inside",
        )  # fmt: skip
    _refuse_contents(path)
    names = [name for name in JOB_FILE_NAMES if (path / name).is_file()]
    if len(names) != 1:
        why = f"it holds {' and '.join(names)}" if names else "it holds no job.yaml (or job.yml, job.json, job.toml)"
        raise _refused(
            path, code="inbox-no-spec", what="not a job folder with exactly one spec", why=why,
            fix="put the spec into job.yaml",
        )  # fmt: skip
    raw = read_regular(path / names[0])
    return Candidate(path=path, raw=raw, spec_name=names[0], is_folder=True, digest=_folder_digest(path))


def _refuse_contents(folder: Path) -> None:
    """Links and special files inside a job folder could lead outside or block a reader for ever."""
    for number, entry in enumerate(folder.rglob("*")):
        if number >= FOLDER_ENTRIES:
            raise _refused(
                folder, code="inbox-too-many-files", what="too large a folder",
                why=f"it holds more than {FOLDER_ENTRIES} entries", fix="put large collections into datasets/",
            )  # fmt: skip
        info = entry.lstat()
        regular = stat.S_ISREG(info.st_mode)
        if not (regular or stat.S_ISDIR(info.st_mode)) or (regular and info.st_nlink != 1):
            inside = printable(str(entry.relative_to(folder)))
            raise _refused(
                folder, code="inbox-link-inside", what="not a folder of plain files",
                why=f"{inside} is a link or a special file", fix="copy the file itself",
            )  # fmt: skip


def _folder_digest(folder: Path) -> str:
    files = regular_files(folder)
    if sum(file.stat().st_size for file in files) > COMPARED_FOLDER_BYTES:
        return ""
    whole = hashlib.sha256()
    for file in files:
        whole.update(f"{sha256_file(file)} {file.relative_to(folder)}\n".encode("utf-8", "surrogateescape"))
    return whole.hexdigest()


def _refused(path: Path, *, code: str, what: str, why: str, fix: str) -> SpecError:
    name = printable(path.name)
    return SpecError(f"{name} is {what}", code=code, where=f"inbox/{name}", why=why, fix=fix)

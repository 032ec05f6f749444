"""Checkpoints that are whole or absent: written aside, hashed, renamed; the newest that verifies wins."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from dropforge.files import fsync_folder, read_json, regular_files, rename_folder, sha256_file, write_json
from dropforge.paths import refuse_links

MANIFEST = "manifest.json"
PARTIAL = ".partial"
KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint folder and the optimizer step it was taken after."""

    path: Path
    step: int

    def verify(self) -> str:
        """Empty when every file has the size and hash of the manifest, else what is wrong."""
        if self.path.is_symlink():
            return "it is a link"
        try:
            files = read_json(self.path / MANIFEST)["files"]
        except (OSError, ValueError, KeyError) as error:
            return f"no readable manifest ({error})"
        for name, entry in files.items():
            path = self.path / name
            if path.is_symlink() or not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
            if sha256_file(path) != entry["sha256"]:
                return f"{name} does not match its hash"
        return ""


class CheckpointStore:
    """The checkpoints of one run: `step-00000042/` folders, newest last."""

    def __init__(self, folder: Path, *, keep: int = KEEP) -> None:
        self.folder = folder
        self.keep = keep

    @property
    def partial(self) -> Path:
        """Where the trainer writes; never read as a checkpoint."""
        return self.folder / PARTIAL

    def all(self) -> list[Checkpoint]:
        """Complete-looking checkpoints, oldest first. `verify` tells whether they are."""
        names = sorted(self.folder.glob("step-*"))
        return [Checkpoint(path, int(path.name[5:])) for path in names if path.name[5:].isdigit()]

    def newest_good(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that verifies, and why newer ones were passed over."""
        skipped: list[str] = []
        for checkpoint in reversed(self.all()):
            fault = checkpoint.verify()
            if not fault:
                return checkpoint, skipped
            skipped.append(f"{checkpoint.path.name}: {fault}")
        return None, skipped

    def commit(self, written: Path, step: int) -> Checkpoint:
        """Turn the folder the trainer wrote into checkpoint `step`: manifest, fsync, rename; then drop old ones.

        Raises EnvironmentFault (path-is-link) when the folder of checkpoints was replaced.
        """
        self._refuse_links()
        files = {
            str(path.relative_to(written)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in regular_files(written)
        }
        write_json(written / MANIFEST, {"step": step, "files": files})
        target = self.folder / f"step-{step:08d}"
        rename_folder(written, target)
        fsync_folder(self.folder.parent)  # this may be the first file that makes checkpoints/ itself worth keeping
        self._prune()
        return Checkpoint(target, step)

    def clean(self) -> None:
        """Remove what an interrupted save left behind. Raises EnvironmentFault (path-is-link) as `commit` does."""
        self._refuse_links()
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)

    def _refuse_links(self) -> None:
        refuse_links(self.partial, below=self.folder.parent.parent)

    def _prune(self) -> None:
        for old in self.all()[: -self.keep]:
            if old.path.is_symlink():
                old.path.unlink()
            else:
                shutil.rmtree(old.path)
        fsync_folder(self.folder)

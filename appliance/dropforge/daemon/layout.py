"""`state/layout.json`: which version of the folder contract a data root was written by.

A newer Dropforge brings an older root up to date; an older one refuses a newer root instead of guessing, and touches
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from dropforge import __version__
from dropforge.errors import EnvironmentFault
from dropforge.files import read_json, write_json
from dropforge.paths import DataRoot

LAYOUT = 1
Migration = Callable[[DataRoot], None]
MIGRATIONS: Mapping[int, Migration] = MappingProxyType({})
"""From layout N to N + 1. Each may be cut off anywhere and is then done again."""


def open_root(root: DataRoot) -> DataRoot:
    """Make the folders that are missing. Raises EnvironmentFault (data-root-unusable) when that is impossible."""
    try:
        return root.create()
    except OSError as error:
        raise unusable(root, error) from error


def unusable(root: DataRoot, error: OSError) -> EnvironmentFault:
    return EnvironmentFault(
        f"the data root cannot be written: {error.strerror}", code="data-root-unusable",
        where=str(error.filename or root.path),
        why="every job, its state and its result are files in it, so nothing can be accepted or run",
        fix="mount it writable (no `:ro`), with this user as its owner, and with free space",
    )  # fmt: skip


def bring_up_to_date(
    root: DataRoot, *, newest: int = LAYOUT, migrations: Mapping[int, Migration] = MIGRATIONS
) -> list[int]:
    """Migrate the root, or refuse it. To be called by its only daemon, before anything else is read.

    Returns:
        The layouts it was migrated from.

    Raises:
        EnvironmentFault: data-root-newer.
    """
    found, written_by = _read(root)
    if found > newest:
        raise EnvironmentFault(
            "the data root was written by a newer Dropforge", code="data-root-newer", where=str(root.path),
            why=f"its layout is {found} (version {written_by}), this version {__version__} knows up to {newest}",
            fix=f"start version {written_by} or newer; nothing was changed",
        )  # fmt: skip
    done = list(range(found, newest))
    for layout in done:
        migrations[layout](root)
        _write(root, layout + 1)
    if not (root.state / "layout.json").exists():
        _write(root, newest)
    return done


def _read(root: DataRoot) -> tuple[int, str]:
    """Layout and version of its writer. A root without the file is of layout 1, which was the first."""
    try:
        value = read_json(root.state / "layout.json")
        return int(value["layout"]), str(value["dropforge"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return 1, "unknown"


def _write(root: DataRoot, layout: int) -> None:
    write_json(root.state / "layout.json", {"layout": layout, "dropforge": __version__})

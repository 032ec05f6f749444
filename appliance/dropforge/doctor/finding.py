"""One line of the doctor's report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Finding:
    """`level`: ok, note (works, but know this), fault (a job could not run). A fault always has a `fix`."""

    level: str
    what: str
    fix: str = ""


def ok(what: str) -> Finding:
    return Finding(level="ok", what=what)


def note(what: str, fix: str = "") -> Finding:
    return Finding(level="note", what=what, fix=fix)


def fault(what: str, fix: str) -> Finding:
    return Finding(level="fault", what=what, fix=fix)

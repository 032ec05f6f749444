"""The gate before code that comes with a model: it runs only when three people's words agree, else the job is held.

    who starts Dropforge   DROPFORGE_ALLOW_REMOTE_CODE=1
    who writes the spec    model.remote_code: true, and for a hub model the full commit in model.revision
    who operates it        dropforge release JOB --trust-code FINGERPRINT, which writes state/approved-code/

The approval is bound to the fingerprint of every file but the weights: a changed line is another fingerprint and is
held again. A file in control/ releases a job but approves nothing, because control/ is not trusted.
"""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

from dropforge.errors import CommandError, ModelError, Reason
from dropforge.files import read_json, write_json
from dropforge.models.remote_code import CodeInside, foreign_class, needs_code, read_config, scan
from dropforge.models.source import ModelSource, resolve_model
from dropforge.paths import DataRoot, RunFolder
from dropforge.settings import settings
from dropforge.spec import ModelSpec

SHOWN_DIGITS = 16
_FULL_COMMIT = re.compile(r"[0-9a-f]{40}")


def resolve_approved(model: ModelSpec, *, root: DataRoot, run: RunFolder) -> ModelSource:
    """`resolve_model`, and the gate. A source with `runs_code` may be loaded with its code, every other without.

    Raises ModelError with reason remote_code (model-code-commit, model-code-elsewhere, model-code-held) when the code
    may not run, and what resolve_model raises.
    """
    is_folder = (root.models / model.id).is_dir() and model.revision is None
    if model.remote_code and not is_folder and "/" in model.id and not _FULL_COMMIT.fullmatch(model.revision or ""):
        raise ModelError(
            f"{model.id} may bring code, and the spec does not say which version of it",
            code="model-code-commit", where="model.revision", reason=Reason.REMOTE_CODE,
            why="a branch or a tag can point to other code tomorrow",
            fix=f"write the full commit, 40 digits, of the model's page; then cancel {run.id} and drop the new spec",
        )  # fmt: skip
    source = resolve_model(model, root=root)
    if model.remote_code and needs_code(read_config(source.path)):
        refuse_unapproved(source, root=root, run=run)
        return replace(source, runs_code=True)
    return source


def refuse_unapproved(source: ModelSource, *, root: DataRoot, run: RunFolder) -> None:
    """Write runs/ID/code.json, what would run, and raise ModelError unless all of it is allowed."""
    elsewhere = foreign_class(read_config(source.path))
    if elsewhere:
        raise ModelError(
            f"{source.id} wants code from another place, which nobody can approve here",
            code="model-code-elsewhere", where=f"config.json: auto_map: {elsewhere}", reason=Reason.REMOTE_CODE,
            why="the fingerprint covers the files of the model itself",
            fix="copy the model into models/ with that code beside it, and name it there without the other repository",
        )  # fmt: skip
    inside = scan(source.path)
    write_json(run.code, {"schema": 1, "model": source.id, "revision": source.revision, "folder": str(source.path),
                          **asdict(inside)})  # fmt: skip
    missing, steps = [], []
    if not settings().allow_remote_code:
        missing.append("this Dropforge was started without DROPFORGE_ALLOW_REMOTE_CODE=1")
        steps.append("start Dropforge with DROPFORGE_ALLOW_REMOTE_CODE=1")
    if not is_approved(root, inside):
        missing.append("nobody has approved this code")
        steps.append(f"read the files in {source.path}")
        steps.append(f"run `dropforge release {run.id} --trust-code {inside.fingerprint[:SHOWN_DIGITS]}`")
    elif missing:
        steps.append(f"run `dropforge release {run.id}`")
    if missing:
        names = ", ".join(inside.modules[:5]) + (" ..." if len(inside.modules) > 5 else "")
        raise ModelError(
            f"{source.id} brings code that would run here ({names or 'no .py file'})", code="model-code-held",
            where=f"runs/{run.id}/code.json", reason=Reason.REMOTE_CODE, why=" and ".join(missing),
            fix=f"only if you trust it: {'; '.join(steps)}. Otherwise `dropforge cancel {run.id}`",
        )  # fmt: skip


def approval_path(root: DataRoot, fingerprint: str) -> Path:
    return root.state / "approved-code" / f"{fingerprint}.json"


def is_approved(root: DataRoot, inside: CodeInside) -> bool:
    """Fails closed: an approval that cannot be read, or is of something else, is none."""
    try:
        value = read_json(approval_path(root, inside.fingerprint))
    except (OSError, ValueError):
        return False
    return isinstance(value, dict) and value.get("schema") == 1 and value.get("fingerprint") == inside.fingerprint


def approve(root: DataRoot, run: RunFolder, *, digits: str) -> CodeInside:
    """A person trusts the code that the job `run` was held for. `digits`: its fingerprint, or 12 digits of it or more.

    Raises CommandError (approve-nothing, approve-other).
    """
    try:
        value = read_json(run.code)
        inside = CodeInside(fingerprint=str(value["fingerprint"]), files=dict(value["files"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CommandError(
            f"{run.id} does not wait for an approval of code", code="approve-nothing", where=str(run.code),
            fix=f"`dropforge status {run.id}` says what it waits for",
        ) from error  # fmt: skip
    if len(digits) < 12 or not inside.fingerprint.startswith(digits.lower()):
        raise CommandError(
            f"{digits!r} is not the fingerprint of the code that {run.id} was held for", code="approve-other",
            where="--trust-code", why=f"its fingerprint begins with {inside.fingerprint[:SHOWN_DIGITS]}",
            fix="read the files named in code.json of its run folder, then give the first 12 digits or more",
        )  # fmt: skip
    path = approval_path(root, inside.fingerprint)
    path.parent.mkdir(exist_ok=True)
    write_json(path, {"schema": 1, "fingerprint": inside.fingerprint, "model": value.get("model"),
                      "revision": value.get("revision"), "approved": datetime.now(UTC).isoformat(timespec="seconds"),
                      "job": run.id})  # fmt: skip
    return inside

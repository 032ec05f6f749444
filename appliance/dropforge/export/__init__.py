"""Exports: each is made beside its final place, verified there, and only then renamed into the result.

One merged, repaired 16-bit folder is the source of everything but the adapter (stage.py).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dropforge.errors import DropforgeError, EnvironmentFault, ExportError, Reason
from dropforge.export.disk import refuse_full_disk
from dropforge.export.request import ExportReport, ExportRequest, Made, Message
from dropforge.export_kinds import split_detail
from dropforge.files import TEMPORARY_PREFIX, fsync_file, fsync_folder, regular_files, rename_folder

if TYPE_CHECKING:
    from dropforge.export.stage import Stage

__all__ = ["ExportReport", "ExportRequest", "Message", "export_all", "export_one"]

Progress = Callable[[str, int, int], None]
"""Called with an export, how many are finished, and how many there are."""


def export_all(
    request: ExportRequest, *, log: Callable[[str], None], on_progress: Progress = lambda kind, done, total: None
) -> tuple[ExportReport, ...]:
    """Make every export of `request.kinds`; one that fails is reported with ok False and takes no other with it.

    Finished exports of an earlier call under the same names are replaced. Errors that are not about an export (bugs)
    pass through.
    """
    from dropforge.export.stage import Stage

    stage = Stage(request, log=log)
    request.result.path.mkdir(parents=True, exist_ok=True)
    kinds = _ordered(request)
    reports: list[ExportReport] = []
    for done, kind in enumerate(kinds):
        on_progress(kind, done, len(kinds))
        reports.append(export_one(stage, kind))
    on_progress("", len(kinds), len(kinds))
    return tuple(reports)


def _ordered(request: ExportRequest) -> tuple[str, ...]:
    """As asked, but ollama last, and with a GGUF for it when there is none and none was asked."""
    from dropforge.export.export_ollama import MAKES, finished_gguf

    others = [kind for kind in dict.fromkeys(request.kinds) if kind != "ollama"]
    if "ollama" not in request.kinds:
        return tuple(others)
    if (
        not any(kind.startswith("gguf:") and not split_detail(kind[5:])[1] for kind in others)
        and finished_gguf(request) is None
    ):
        others.append(f"gguf:{MAKES}")
    return (*others, "ollama")


def export_one(stage: Stage, kind: str) -> ExportReport:
    """Make, verify and place one export."""
    start = time.monotonic()
    staging = stage.request.result.path / f"{TEMPORARY_PREFIX}{kind.replace(':', '-')}"
    try:
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir()
        refuse_full_disk(stage, kind)
        made = _make(stage, kind, staging)
        path = _place(made.path, staging=staging, target=_target(stage.request, kind, made))
    except DropforgeError as error:
        stage.log(f"{kind} failed: {error.problems[0].what}")
        return ExportReport.failed(kind, error, seconds=round(time.monotonic() - start, 3))
    except OSError as error:
        stage.log(f"{kind} failed: {error}")
        fault = EnvironmentFault(
            f"{kind} could not be written", code="export-io", where=str(error.filename or ""), why=str(error),
            fix="free some space, then run `dropforge retry`", reason=Reason.DISK,
        )  # fmt: skip
        return ExportReport.failed(kind, fault, seconds=round(time.monotonic() - start, 3))
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    files = regular_files(path) if path.is_dir() else [path]
    return ExportReport(
        kind=kind,
        ok=True,
        path=path.relative_to(stage.request.result.path).as_posix(),
        bytes=sum(file.stat().st_size for file in files),
        seconds=round(time.monotonic() - start, 3),
        checks={**made.checks, **({"base_weights": stage.base.note} if stage.has("base") and stage.base.note else {})},
    )


def _make(stage: Stage, kind: str, folder: Path) -> Made:
    from dropforge.export.export_adapter import export_adapter
    from dropforge.export.export_fp8 import export_fp8
    from dropforge.export.export_gguf import export_gguf
    from dropforge.export.export_lora_gguf import export_lora_gguf
    from dropforge.export.export_merged import export_merged
    from dropforge.export.export_merged_4bit import export_merged_4bit
    from dropforge.export.export_ollama import export_ollama
    from dropforge.export.export_projector import export_projector

    name, _, detail = kind.partition(":")
    if name == "adapter":
        return export_adapter(stage, folder)
    if name == "merged":
        return export_merged(stage, folder)
    if name == "merged_4bit":
        return export_merged_4bit(stage, folder)
    if name == "fp8":
        return export_fp8(stage, folder, detail)
    if name == "gguf":
        return export_gguf(stage, folder, detail)
    if name == "mmproj":
        return export_projector(stage, folder, detail)
    if name == "lora_gguf":
        return export_lora_gguf(stage, folder)
    if name == "ollama":
        return export_ollama(stage, folder)
    raise ExportError(f"this release cannot export {kind}", code="export-unknown", where="export")


def _target(request: ExportRequest, kind: str, made: Made) -> Path:
    result = request.result
    places = {
        "adapter": result.adapter, "merged": result.merged, "fp8": result.fp8, "fp8:block": result.fp8_block,
        "fp8:static": result.fp8_static,
        "merged_4bit": result.merged_4bit, "ollama": result.modelfile,
    }  # fmt: skip
    if kind == "lora_gguf":
        return result.lora_gguf / made.path.name
    return places.get(kind) or result.gguf / (made.name or made.path.name)


def _place(made: Path, *, staging: Path, target: Path) -> Path:
    """Rename into the final place; an older export of the same name is replaced."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if made.is_dir():
        assert made == staging, "a folder export fills its staging folder"
        rename_folder(made, target)
    else:
        fsync_file(made)
        made.replace(target)
        fsync_folder(target.parent)
    return target

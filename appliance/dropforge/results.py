"""The result folder: where it came from (provenance), what it is (card), that it is whole (checksums, COMPLETE)."""

from __future__ import annotations

import platform
import shutil
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

from dropforge import __version__
from dropforge.data.report import DATA_CARD, report_of
from dropforge.data.report_text import data_card
from dropforge.events import utc_now
from dropforge.files import read_json, regular_files, sha256_file, write_json, write_text
from dropforge.hardware import probe
from dropforge.model_card import model_card
from dropforge.paths import DataRoot, ResultFolder, RunFolder
from dropforge.spec import Spec

if TYPE_CHECKING:
    from dropforge.export import ExportReport
    from dropforge.models.source import ModelSource

LIBRARIES = (
    "torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes", "tokenizers", "safetensors",
    "triton", "numpy",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """What the training leaves for the result: plain values, saved beside the weights."""

    plan: dict[str, Any]
    summary: dict[str, Any]
    data: dict[str, Any]
    template: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)


def finish_result(
    result: ResultFolder, *, spec: Spec, run: RunFolder, source: ModelSource, record: TrainingRecord,
    exports: tuple[ExportReport, ...], seconds: dict[str, float], root: DataRoot,
) -> None:  # fmt: skip
    """Write provenance, model card and checksums; COMPLETE comes last, and only when every export is good."""
    result.complete.unlink(missing_ok=True)
    shutil.copyfile(run.spec_resolved, result.spec_resolved)
    timings = {name: round(value, 2) for name, value in {**record.seconds, **seconds}.items()}
    write_json(
        result.provenance,
        provenance(spec, run=run, source=source, record=record, exports=exports, seconds=timings, root=root),
    )
    write_text(result.model_card, model_card(spec, source=source, record=record, exports=exports))
    card = data_card(report_of(record.data), tokenizer=f"the tokenizer of {spec.model.id}")
    write_text(result.path / DATA_CARD, card)
    write_text(result.checksums, checksums(result))
    write_text(result.path.parent / "latest", run.id + "\n")
    if all(report.ok for report in exports):
        write_text(result.complete, f"{run.id} {utc_now()}\n")


def good_exports(result: ResultFolder) -> dict[str, ExportReport]:
    """Reports of exports that were verified earlier and are still there; a retry need not make them again."""
    from dropforge.errors import Problem
    from dropforge.export import ExportReport

    if not result.provenance.exists():
        return {}
    reports = [
        ExportReport(**{**entry, "problem": Problem(**entry["problem"]) if entry["problem"] else None})
        for entry in read_json(result.provenance)["exports"]
    ]
    return {report.kind: report for report in reports if report.ok and (result.path / report.path).exists()}


def provenance(
    spec: Spec, *, run: RunFolder, source: ModelSource, record: TrainingRecord, exports: tuple[ExportReport, ...],
    seconds: dict[str, float], root: DataRoot,
) -> dict[str, Any]:  # fmt: skip
    """Everything needed to tell where a model came from and to make it again."""
    hardware = probe(root.path)
    return {
        "dropforge": __version__,
        "job": run.id,
        "finished": utc_now(),
        "spec_sha256": sha256_file(run.spec_original),
        "spec_resolved_sha256": sha256_file(run.spec_resolved),
        "model": {"id": source.id, "kind": source.kind, "revision": source.revision, "files": _weights(source)},
        "method": spec.method,
        "seed": spec.train.seed,
        "data": record.data,
        "template": record.template,
        "plan": record.plan,
        "training": record.summary,
        "exports": [asdict(report) for report in exports],
        "seconds": seconds,
        "machine": {
            "system": platform.platform(),
            "python": platform.python_version(),
            "cpu_cores": hardware.cpu_cores,
            "memory_total": hardware.memory_total,
            "gpus": [asdict(gpu) for gpu in hardware.gpus],
        },
        "libraries": {name: _version(name) for name in LIBRARIES},
    }


def checksums(result: ResultFolder) -> str:
    """SHA256SUMS in the format of sha256sum, checkable with `sha256sum -c`."""
    left_out = {result.checksums, result.complete}
    files = [path for path in regular_files(result.path) if path not in left_out]
    return "".join(f"{sha256_file(path)}  {path.relative_to(result.path)}\n" for path in files)


def _weights(source: ModelSource) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(source.path.glob("*.safetensors"))}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

"""Which files of a result go into which repository of the hub, and under which names.

Every kind gets a repository of its own, because tools look at the top of one: transformers for config.json, PEFT for
adapter_config.json, llama.cpp and Ollama for *.gguf. A result of one kind goes to the name that was asked for; of
several, the merged folder does (else the adapter), and the others get an ending.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dropforge.export.request import ExportReport
from dropforge.files import regular_files
from dropforge.paths import ResultFolder

ENDINGS = {
    "merged": "", "adapter": "-lora", "gguf": "-GGUF", "fp8": "-FP8", "fp8:block": "-FP8-block",
    "fp8:static": "-FP8-static", "merged_4bit": "-4bit", "lora_gguf": "-lora-GGUF",
}  # fmt: skip
RELATIONS = {"merged": "finetune", "adapter": "adapter", "lora_gguf": "adapter"}
"""The hub's word for what a repository is to the base model; quantized for all others."""


@dataclass(frozen=True, kw_only=True)
class HubUpload:
    """One repository and what goes into it."""

    repo: str
    kind: str
    """merged, adapter, gguf (all GGUF files, projector and Modelfile together), fp8 ..."""
    files: tuple[tuple[str, Path], ...]
    """(path in the repository, file here); README.md, the model card, comes on top."""

    @property
    def relation(self) -> str:
        return RELATIONS.get(self.kind, "quantized")

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for _, path in self.files)

    def as_dict(self) -> dict[str, object]:
        return {"repo": self.repo, "kind": self.kind, "bytes": self.bytes, "files": [name for name, _ in self.files]}


def plan_uploads(result: ResultFolder, reports: tuple[ExportReport, ...], *, repo: str) -> tuple[HubUpload, ...]:
    """One upload per kind of export that was verified and is there; nothing that failed is published."""
    groups: dict[str, list[tuple[str, Path]]] = {}
    for report in reports:
        place = result.path / report.path
        if not report.ok or not report.path or report.kind == "hub" or not place.exists():
            continue
        kind = "gguf" if report.kind == "ollama" or report.kind.startswith(("gguf:", "mmproj")) else report.kind
        files = regular_files(place) if place.is_dir() else [place, *_siblings(place)]
        start = place if place.is_dir() else place.parent
        if report.kind == "ollama":
            start = result.path
        groups.setdefault(kind, []).extend((path.relative_to(start).as_posix(), path) for path in files)
    main = next((kind for kind in ("merged", "adapter", "gguf") if kind in groups), next(iter(groups), ""))
    return tuple(
        HubUpload(
            repo=repo if kind == main else repo + (ENDINGS.get(kind) or f"-{kind}"), kind=kind,
            files=tuple(sorted(dict(files).items())),
        )
        for kind, files in groups.items()
    )  # fmt: skip


def _siblings(path: Path) -> list[Path]:
    """The other parts of a split GGUF."""
    start, found, end = path.name.partition("-00001-of-")
    return [part for part in sorted(path.parent.glob(f"{start}-*-of-{end}")) if part != path] if found else []

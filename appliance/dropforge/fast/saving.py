"""Methods of models loaded by FastLanguageModel: merged and GGUF, through the same verified exporters as a job's."""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropforge.errors import CommandError, ExportError, Problem
from dropforge.export import ExportReport, ExportRequest, export_all
from dropforge.export.base_license import license_of
from dropforge.export.precheck import with_projector
from dropforge.export.user_imatrix import check_imatrix
from dropforge.export_kinds import check_export, normalise_exports
from dropforge.fast.extras import SAVING_LOCALLY, check_extras
from dropforge.models.plain_lora import to_plain_lora
from dropforge.paths import ResultFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOG = logging.getLogger("dropforge")
MERGED_METHODS = {
    "merged_16bit": "merged", "merged_4bit": "merged_4bit", "merged_4bit_forced": "merged_4bit", "lora": "adapter",
    "fp8": "fp8", "fp8_dynamic": "fp8", "fp8_block": "fp8:block",
}  # fmt: skip
"""save_method -> the export of a job that it is."""


def save_pretrained_merged(
    self: Any,
    save_directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    save_method: str = "merged_16bit",
    **extras: Any,
) -> dict[str, Any]:
    """Write base and adapter as one model (`merged_16bit`, or quantised: `merged_4bit`, `fp8`, `fp8_block`) or the
    adapter alone (`lora`) into a folder.

    The merge is computed in fp32 from the 16-bit base, never from the quantised copy, and compared with the trained
    model before it is put in place. Returns the numbers of that comparison.

    Raises CommandError api-save-method; ExportError when the comparison fails.
    """
    check_extras(extras, SAVING_LOCALLY, function="save_pretrained_merged", names=("tokenizer", "save_method"))
    kind = merged_kind(save_method)
    target = Path(save_directory)
    if save_method == "lora":
        self.save_pretrained(target)
        _tokenizer(self, tokenizer).save_pretrained(target)
        return {}
    (report,) = _export(self, tokenizer, kinds=(kind,), target=target)
    return report.checks


def save_pretrained_gguf(
    self: Any,
    save_directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quantization_method: str | list[str] = "q8_0",
    *,
    imatrix_file: str | Path | None = None,
    **extras: Any,
) -> dict[str, Any]:
    """Write one verified GGUF per method into the folder. Returns file name -> numbers of its verification.

    quantization_method: one name or several, as in a job's `gguf:TYPE` (q4_k_m, q8_0, f16 ...). Needs llama.cpp's
    tools (`make llama`). imatrix_file: an importance matrix of this base model for every quantised file.
    Raises CommandError api-save-method; ExportError, EnvironmentFault from the exporters.
    """
    check_extras(extras, SAVING_LOCALLY, function="save_pretrained_gguf", names=("tokenizer", "quantization_method"))
    kinds = gguf_kinds(quantization_method)
    imatrix = Path(imatrix_file) if imatrix_file is not None else None
    reports = _export(self, tokenizer, kinds=kinds, target=Path(save_directory), imatrix=imatrix)
    return {Path(report.path).name: report.checks for report in reports}


def merged_kind(save_method: str) -> str:
    """The job's export that a `save_method` is. Raises CommandError api-save-method."""
    if save_method not in MERGED_METHODS:
        raise CommandError(
            f"save_method cannot be {save_method!r}", code="api-save-method", where="save_method",
            fix=f"one of {', '.join(MERGED_METHODS)}",
        )  # fmt: skip
    return MERGED_METHODS[save_method]


def gguf_kinds(quantization_method: str | list[str]) -> tuple[str, ...]:
    """The job's exports that one or several methods are. Raises CommandError api-save-method."""
    methods = [quantization_method] if isinstance(quantization_method, str) else list(quantization_method)
    kinds = normalise_exports([f"gguf:{method}" for method in methods])
    try:
        for kind in kinds:
            check_export(kind)
    except ValueError as error:
        raise CommandError(str(error), code="api-save-method", where="quantization_method") from error
    found: tuple[str, ...] = kinds
    return found


def _tokenizer(model: Any, given: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    from dropforge.fast.language_model import needed_state

    return given or needed_state(model).tokenizer


def _export(
    model: Any, given: PreTrainedTokenizerBase | None, *, kinds: tuple[str, ...], target: Path,
    imatrix: Path | None = None,
) -> tuple[ExportReport, ...]:  # fmt: skip
    """Run the exporters in a scratch folder beside the target, then move what they made into it."""
    with exported(model, given, kinds=kinds, name=target.name, beside=target.parent, imatrix=imatrix) as (
        result,
        reports,
    ):
        target.mkdir(exist_ok=True)
        for report in reports:
            made = result.path / report.path
            for path in sorted(made.iterdir()) if made.is_dir() else [made]:
                path.replace(target / path.name)
        return reports


@contextmanager
def exported(
    model: Any,
    given: PreTrainedTokenizerBase | None,
    *,
    kinds: tuple[str, ...],
    name: str,
    beside: Path,
    imatrix: Path | None = None,
) -> Iterator[tuple[ResultFolder, tuple[ExportReport, ...]]]:
    """A result folder with these exports of the model, all verified, while the block lasts.

    `beside` is where the scratch folder is made. Raises ExportError for the first export that failed.
    """
    from dropforge.fast.language_model import needed_state

    state = needed_state(model)
    if imatrix is not None:
        check_imatrix(imatrix, base=state.source.path)
    beside.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".dropforge-", dir=beside))
    try:
        adapter, full = _save_trained(model, scratch, base=state.source.id)
        _tokenizer(model, given).save_pretrained(scratch / "tokenizer")
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "model"
        kinds = with_projector(kinds, base=state.source.path)
        request = ExportRequest(
            base_path=state.source.path, tokenizer=scratch / "tokenizer", result=ResultFolder(scratch / "result"),
            work=scratch / "work", kinds=kinds, name=name, slug=slug, model_id=state.source.id,
            adapter=adapter, full=full, license=license_of(state.source.path), imatrix=imatrix and imatrix.absolute(),
        )  # fmt: skip
        reports = export_all(request, log=lambda text: LOG.info("export: %s", text))
        for report in reports:
            if report.problem is not None:
                raise _as_error(report.problem)
        yield request.result, reports
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _as_error(problem: Problem) -> ExportError:
    error = ExportError(problem.what, code=problem.code)
    error.problems = (problem,)
    return error


def _save_trained(model: Any, scratch: Path, *, base: str) -> tuple[Path | None, Path | None]:
    """(adapter folder, None) or (None, folder of all weights)."""
    from peft import PeftModel

    from dropforge.fast.state import needed_state

    if not isinstance(model, PeftModel):
        model.save_pretrained(scratch / "full")
        return None, scratch / "full"
    model.save_pretrained(str(scratch / "adapter"))
    to_plain_lora(scratch / "adapter", needed_state(model).initial)
    path = scratch / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return scratch / "adapter", None

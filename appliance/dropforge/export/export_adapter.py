"""Export `adapter`: the PEFT folder, free of paths of this machine, proven to load onto its base unchanged."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from dropforge.errors import ExportError
from dropforge.export.adapter_file import CONFIG, WEIGHTS, read_adapter
from dropforge.export.compare import agreement
from dropforge.export.merge import stored_module
from dropforge.export.reference import logprobs, spread_positions, trained_model
from dropforge.export.request import Made
from dropforge.export.safetensors_stream import index_folder
from dropforge.export.stage import Stage
from dropforge.export.tokenizer_files import write_tokenizer
from dropforge.export.verify_merged import PROMPT_POSITIONS
from dropforge.files import read_json, sha256_file, write_json
from dropforge.models.pictures import stored_names


def export_adapter(stage: Stage, folder: Path) -> Made:
    """Fill the empty `folder`. Raises ExportError: export-no-adapter, export-adapter-wrong and adapter_file's codes."""
    request = stage.request
    if request.adapter is None:
        raise ExportError(
            "this job trained every weight, so there is no adapter", code="export-no-adapter", where="export",
            fix="write merged instead of adapter",
        )  # fmt: skip
    shutil.copyfile(request.adapter / WEIGHTS, folder / WEIGHTS)
    config = {**read_json(request.adapter / CONFIG), "base_model_name_or_path": request.model_id}
    write_json(folder / CONFIG, config)
    write_tokenizer(request.tokenizer, folder, base=request.base_path)
    return Made(path=folder, checks=verify_adapter(stage, folder))


def verify_adapter(stage: Stage, folder: Path) -> dict[str, Any]:
    """Same bytes, every module known to the base, loads in PEFT, predicts what the trained adapter predicts."""
    request = stage.request
    assert request.adapter is not None
    if sha256_file(folder / WEIGHTS) != sha256_file(request.adapter / WEIGHTS):
        raise _wrong("the exported adapter's weights are not the trained ones", where=WEIGHTS)
    parsed = read_adapter(folder)
    folder_16_bit = stage.base.folder
    base = index_folder(folder_16_bit)
    names = stored_names(folder_16_bit, base)
    unmatched = sorted(
        module for module in parsed.changes
        if f"{stored_module(names, module)}.weight" not in base and not module.endswith("lm_head")
    )  # fmt: skip
    if unmatched:
        raise _wrong(
            f"{len(unmatched)} modules of the adapter are not in the base model", where=", ".join(unmatched[:5])
        )
    prompts = stage.prompts()[:2]
    positions = [spread_positions(len(ids), most=PROMPT_POSITIONS) for ids in prompts]
    with trained_model(folder_16_bit, request.adapter, None, runs_code=request.runs_code) as model:
        truth = logprobs(model, prompts, positions)
    with trained_model(folder_16_bit, folder, None, runs_code=request.runs_code) as model:
        close = agreement(truth, logprobs(model, prompts, positions))
    if close.relative_error > 1e-6:
        raise _wrong("the exported adapter predicts something else", where=f"relative error {close.relative_error:.3g}")
    checks: dict[str, Any] = {"modules": len(parsed.changes), "tensors": parsed.tensors, "logits": close.as_dict()}
    if parsed.low_rank_all_zero:
        checks["note"] = "every lora_B is zero: the training changed nothing"
    return checks


def _wrong(what: str, *, where: str) -> ExportError:
    return ExportError(
        what, code="export-adapter-wrong", where=where, fix="check that `model` is the base the adapter was trained on"
    )

"""Does the merged folder hold exactly the trained model? Checked against PEFT's own arithmetic, never against ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropforge.errors import ExportError
from dropforge.export.compare import agreement
from dropforge.export.merge import HEAD
from dropforge.export.merged_values import StreamedValues, peft_values
from dropforge.export.reference import (
    Answer,
    Judged,
    answers,
    is_streamed,
    logprobs,
    merged_model,
    quiet_libraries,
    spread_positions,
    trained_model,
)
from dropforge.export.safetensors_stream import index_folder, read_tensor
from dropforge.models.pictures import stored_names

if TYPE_CHECKING:
    import torch

# Relative error of logits that rounding weights to 16 bits may cause.
LOGIT_BOUND = {"float16": 0.01, "bfloat16": 0.05}
# One unit in the last place, relative: rounding itself costs half of it, the rest covers another order of additions.
STEP = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
PIECE = 2**24
"""Numbers of a tensor that are compared at a time: a vocabulary's embedding would need six copies in float32."""
PROMPT_POSITIONS = 64
"""Predictions compared per prompt, evenly spaced."""


@dataclass(frozen=True, kw_only=True)
class VerifiedMerge:
    """The numbers, and what the merged model says for the exports that follow."""

    checks: dict[str, Any]
    answers: list[Answer]
    judged: list[Judged]
    """What it predicts in the rows of the evaluation split."""


def verify_merged(
    folder: Path, *, base: Path, adapter: Path | None, full: Path | None, prompts: list[list[int]], stop: int | None,
    judged: list[Judged] | None = None,
) -> VerifiedMerge:  # fmt: skip
    """Load both in transformers and compare names, shapes, every value, and logits.

    `prompts` are token ids; `judged` are rows of the evaluation split without predictions. Raises ExportError
    (export-merge-wrong) with the first difference found.
    """
    label = _one_dtype(folder)
    rows = [*prompts, *(row.ids for row in judged or [])]
    positions = [spread_positions(len(ids), most=PROMPT_POSITIONS) for ids in prompts]
    positions += [row.positions for row in judged or []]
    with trained_model(base, adapter, full) as model:
        truth = logprobs(model, rows, positions)
        if is_streamed(model):
            values = _compare_values(folder, peft_values(model, base=full or base), step=STEP[label])
        else:
            exact = str(model.dtype) == "torch.float32"
            if adapter is not None:
                with quiet_libraries():
                    model = model.merge_and_unload()
            values = _compare_values(folder, dict(model.state_dict()), step=STEP[label] * (1 if exact else 16))
        del model
    with merged_model(folder) as (merged, loading):
        if loading:
            raise _wrong("the merged folder does not fit its own configuration", why=str(loading)[:500])
        found = logprobs(merged, rows, positions)
        continued = answers(merged, prompts, stop=stop)
        values["checked_in_pieces"] = is_streamed(merged)
    close = agreement(truth[: len(prompts)], found[: len(prompts)])
    if not close.relative_error <= LOGIT_BOUND[label]:
        raise _wrong(
            "the merged model predicts something else than the trained model",
            why=f"relative error of logits {close.relative_error:.4g}, allowed {LOGIT_BOUND[label]:g}",
        )
    checks = {"dtype": label, **values, "logits": close.as_dict()}
    predicted = []
    for row, values_found in zip(judged or [], found[len(prompts) :], strict=True):
        predicted.append(replace(row, logprobs=values_found))
    if predicted:
        checks["eval"] = agreement(truth[len(prompts) :], found[len(prompts) :]).as_dict()
    return VerifiedMerge(checks=checks, answers=continued, judged=predicted)


def _one_dtype(folder: Path) -> str:
    kinds = {info.dtype for info in index_folder(folder).values()}
    names = {"F16": "float16", "BF16": "bfloat16"}
    if len(kinds) != 1 or not kinds <= set(names):
        raise _wrong("the merged folder must hold one 16-bit type", why=f"it holds {', '.join(sorted(kinds))}")
    return names[kinds.pop()]


def _compare_values(folder: Path, truth: Mapping[str, torch.Tensor], *, step: float) -> dict[str, Any]:
    """Every stored tensor against the tensor of the same name.

    Left to the logits: fused layouts, which have other names, and, for a model held whole, a head and an embedding
    that were one tensor and are two now, because PEFT's merge writes one's change into both although its forward pass
    does not.
    """
    stored = index_folder(folder)
    untied = HEAD in stored and not isinstance(truth, StreamedValues)
    loaded = {file: name for name, file in stored_names(folder, stored).items()}
    compared = zero = 0
    for file, info in stored.items():
        name = loaded.get(file, file)
        if name not in truth or (untied and _is_shared(name, truth)):
            continue
        mine, other = read_tensor(info, file), truth[name]
        if mine.shape != other.shape:
            raise _wrong(f"{name} has the wrong shape", why=f"{tuple(mine.shape)}, expected {tuple(other.shape)}")
        largest = _difference(mine, other, step=step)
        if largest is not None:
            raise _wrong(f"{name} differs from the trained weight", why=f"by up to {largest:.4g}")
        compared += 1
        zero += int(not bool(mine.any()))
    known = {loaded.get(file, file) for file in stored}
    absent = sorted(known - set(truth))
    tied = [name for name in truth if name not in known and not _is_shared(name, truth)]
    if bool(absent) != bool(tied):
        raise _wrong("the merged folder has other tensors than the model", why=", ".join((absent + tied)[:5]))
    return {"tensors": len(stored), "tensors_compared": compared, "tensors_all_zero": zero}


def _difference(mine: torch.Tensor, other: torch.Tensor, *, step: float) -> float | None:
    """The largest difference when some value is further off than `step` allows, else None. PIECE numbers at a time."""
    rows = max(1, PIECE // max(1, mine[0].numel())) if mine.dim() else 1
    pairs = list(zip(mine.split(rows), other.split(rows), strict=True)) if mine.dim() else [(mine, other)]
    size = max((float(right.float().abs().max()) for _, right in pairs if right.numel()), default=0.0)
    largest, wrong = 0.0, False
    for left, right in pairs:
        truth = right.float()
        difference = (left.float() - truth).abs()
        # Not "greater than": a value that is not a number is wrong too.
        wrong = wrong or not bool((difference <= truth.abs() * step + size * 1e-6 + 6e-8).all())
        largest = max(largest, float(difference.max()) if difference.numel() else 0.0)
    return largest if wrong else None


def _is_shared(name: str, truth: Mapping[str, torch.Tensor]) -> bool:
    """The tensor is one with another, as the head of a tied model is: in the state dict, but not in the file."""
    if isinstance(truth, StreamedValues):
        return name in truth.tied
    pointer = truth[name].data_ptr()
    return any(other != name and tensor.data_ptr() == pointer for other, tensor in truth.items())


def _wrong(what: str, *, why: str) -> ExportError:
    return ExportError(
        what, code="export-merge-wrong", where="merged", why=why,
        fix="this is a fault of Dropforge, not of your data; please report it with provenance.json",
    )  # fmt: skip

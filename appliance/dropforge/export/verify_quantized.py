"""Does a quantised folder hold the merged model? transformers loads it, dequantises it in its own way, and is asked.

Shape legend: T positions, V vocabulary.
"""

from __future__ import annotations

import contextlib
import gc
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropforge.errors import ExportError
from dropforge.export.compare import Agreement, agreement
from dropforge.export.quantized_folder import LinearLayers
from dropforge.export.reference import Answer, Judged, compute_dtype, logprobs, quiet_libraries, streams
from dropforge.export.safetensors_stream import index_folder, read_tensor
from dropforge.export.verify_pieces import Matrix, fp8_matrix, logprobs_in_pieces, nf4_matrix

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Limits:
    """Largest accepted numbers; measured ones are in docs/reference/export-errors.md."""

    weight: float
    """RMS of a matrix's error over the RMS of the matrix."""
    relative_error: float
    mean_kl: float
    bitsandbytes: bool = False
    """Whose format it is; otherwise compressed-tensors'."""


FP8 = Limits(weight=0.04, relative_error=0.4, mean_kl=0.3)
NF4 = Limits(weight=0.13, relative_error=0.7, mean_kl=0.8, bitsandbytes=True)


def verify_quantized(
    folder: Path, *, source: Path, layers: LinearLayers, answers: list[Answer], limits: Limits,
    judged: list[Judged] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """All checks; returns the measured numbers. `source` is the merged folder, `answers` and `judged` are its own.

    Raises ExportError (export-quantize-wrong) with the first difference found.
    """
    kept = _compare_kept(folder, source=source, layers=layers)
    rows = [[*answer.prompt, *answer.tokens[:-1]] for answer in answers]
    positions = [list(range(len(answer.prompt) - 1, len(row))) for answer, row in zip(answers, rows, strict=True)]
    rows += [row.ids for row in judged or []]
    positions += [row.positions for row in judged or []]
    if streams(source):
        found, worst = _in_pieces(folder, source, layers, limits, rows, positions)
    else:
        found, worst = _whole(folder, source, layers, limits, rows, positions)
    close = agreement([answer.logprobs for answer in answers], found[: len(answers)])
    _check_logits(close, limits)
    checks = {
        "matrices_quantized": len(layers.quantized), "left_in_16_bits": list(layers.kept), "tensors_kept": kept,
        "worst_weight_error": round(worst[0], 5), "worst_tensor": worst[1], "logits": close.as_dict(),
        "checked_in_pieces": streams(source),
    }  # fmt: skip
    if judged:
        over_eval = agreement([row.logprobs for row in judged if row.logprobs is not None], found[len(answers) :])
        checks["eval"] = over_eval.as_dict()
        _check_logits(over_eval, limits)
    return checks


def _whole(
    folder: Path, source: Path, layers: LinearLayers, limits: Limits, rows: list[list[int]], positions: list[list[int]]
) -> tuple[list[Array], tuple[float, str]]:
    """Predictions and the worst matrix, of the folder as transformers loads it."""
    with _loaded(folder, source=source) as (model, loading):
        if loading:
            raise _wrong("the quantised folder does not fit its own configuration", why=str(loading)[:500])

        def matrix(module: str) -> torch.Tensor:
            return _dequantized(model.get_submodule(module), limits)

        # In the first forward pass compressed-tensors dequantises its weights, and bitsandbytes rearranges its own.
        if limits.bitsandbytes:
            worst = _compare_weights(matrix, source=source, layers=layers, limits=limits)
        with contextlib.redirect_stderr(io.StringIO()):
            found = logprobs(model, rows, positions)
        if not limits.bitsandbytes:
            worst = _compare_weights(matrix, source=source, layers=layers, limits=limits)
    return found, worst


def _in_pieces(
    folder: Path, source: Path, layers: LinearLayers, limits: Limits, rows: list[list[int]], positions: list[list[int]]
) -> tuple[list[Array], tuple[float, str]]:
    """The same, one matrix at a time, dequantised by compressed-tensors or bitsandbytes."""
    matrix = nf4_matrix(folder) if limits.bitsandbytes else fp8_matrix(folder)
    try:
        worst = _compare_weights(matrix, source=source, layers=layers, limits=limits)
    except KeyError as error:
        raise _wrong("the quantised folder does not fit its own configuration", why=f"{error} is missing") from error
    found = logprobs_in_pieces(
        source, matrix=matrix, quantized=layers.quantized, folder=folder, rows=rows, positions=positions
    )
    return found, worst


def _compare_kept(folder: Path, *, source: Path, layers: LinearLayers) -> int:
    """Everything that is not quantised must be the merged tensor, bit for bit; returns how many that are."""
    import torch

    stored, merged = index_folder(folder), index_folder(source)
    quantized = {f"{module}.weight" for module in layers.quantized}
    missing = sorted(set(merged) - set(stored))
    if missing:
        raise _wrong("tensors are missing in the quantised folder", why=", ".join(missing[:5]))
    kept = [name for name in merged if name not in quantized]
    for name in kept:
        if not torch.equal(read_tensor(stored[name], name), read_tensor(merged[name], name)):
            raise _wrong(f"{name} is not the merged tensor", why="it is not quantised, so it must be equal")
    whole = [name for name in quantized if stored[name].dtype in {"F32", "F16", "BF16"}]
    if whole:
        raise _wrong("matrices are not quantised", why=", ".join(sorted(whole)[:5]))
    return len(kept)


@contextmanager
def _loaded(folder: Path, *, source: Path) -> Iterator[tuple[Any, dict[str, list[Any]]]]:
    """The folder in transformers on the CPU, and what its loading report lists."""
    from transformers import AutoModelForCausalLM

    loaded: Any
    # compressed-tensors shows progress bars that no setting turns off, and its import touches what torch deprecates.
    with quiet_libraries(), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype=compute_dtype(source), device_map={"": "cpu"}, local_files_only=True,
            trust_remote_code=False, output_loading_info=True,
        )  # fmt: skip
    model, report = loaded
    del loaded
    try:
        yield model.eval(), {key: sorted(map(str, value)) for key, value in report.items() if value}
    finally:
        del model
        gc.collect()


def _compare_weights(matrix: Matrix, *, source: Path, layers: LinearLayers, limits: Limits) -> tuple[float, str]:
    """Every quantised matrix as the runtime sees it against the merged one; returns the worst error and its name."""
    merged = index_folder(source)
    worst: tuple[float, str] = (0.0, "")
    for module in layers.quantized:
        name = f"{module}.weight"
        truth = read_tensor(merged[name], name).float()
        mine = matrix(module)
        difference, size = float((mine - truth).norm()), float(truth.norm())
        error = difference / size if size > 0 else (0.0 if difference == 0 else float("inf"))
        if not error <= limits.weight:
            raise _wrong(
                f"{name} is not the merged weight", why=f"off by {error:.4g} of its size, allowed {limits.weight:g}"
            )
        worst = max(worst, (error, name))
    return worst


def _dequantized(module: Any, limits: Limits) -> torch.Tensor:
    """float32 [out, in] of a linear layer."""
    weight: torch.Tensor = module.weight.data
    if limits.bitsandbytes:
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight, module.weight.quant_state)
    return weight.float()


def _check_logits(close: Agreement, limits: Limits) -> None:
    if not (close.relative_error <= limits.relative_error and close.mean_kl <= limits.mean_kl):
        raise _wrong(
            "the quantised model predicts something else than the merged model",
            why=f"relative error {close.relative_error:.4g} (allowed {limits.relative_error:g}), "
            f"mean KL {close.mean_kl:.4g} (allowed {limits.mean_kl:g}) over {close.positions} positions",
        )


def _wrong(what: str, *, why: str) -> ExportError:
    return ExportError(
        what, code="export-quantize-wrong", where="export", why=why[:800],
        fix="use another export meanwhile, and please report this with provenance.json",
    )  # fmt: skip

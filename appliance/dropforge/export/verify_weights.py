"""Does every tensor of a GGUF hold the weights it was made from? Rows are read back and compared with the 16-bit file.

Logits tell whether the whole works; this tells whether each part is what it should be, for any model, trained or not:
how much rounding to a block type changes a matrix hardly depends on the matrix.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropforge.errors import ExportError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

ROWS = 64
"""Rows read per tensor, evenly spaced: blocks never span rows, so a sample costs little."""

# Largest relative RMS error per stored type; measured values are in docs/reference/export-errors.md.
LIMITS = {
    "F32": 0.0, "F16": 0.001, "BF16": 0.004, "Q8_0": 0.02, "Q6_K": 0.05, "Q5_0": 0.12, "Q5_1": 0.12, "Q5_K": 0.1,
    "Q4_0": 0.22, "Q4_1": 0.22, "Q4_K": 0.2, "IQ4_NL": 0.22, "IQ4_XS": 0.22, "Q3_K": 0.4, "IQ3_S": 0.4,
    "IQ3_XXS": 0.5, "Q2_K": 0.7, "IQ2_S": 0.7, "IQ2_XS": 0.75, "IQ2_XXS": 0.8, "IQ1_M": 1.1, "IQ1_S": 1.1,
    "TQ1_0": 1.2, "TQ2_0": 1.2,
}  # fmt: skip


def compare_weights(path: Path, *, source: Path) -> dict[str, Any]:
    """Compare a GGUF with the 16-bit GGUF it was made from; returns tensors by stored type and the worst error.

    Raises ExportError (gguf-weights): a tensor is missing, added, of another shape, or off by more than its type may.
    """
    import gguf

    mine = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    truth = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    if set(mine) != set(truth):
        raise _wrong(path, f"tensors differ: {', '.join(sorted(set(mine) ^ set(truth))[:5])}")
    worst: tuple[float, str] = (0.0, "")
    for name, tensor in mine.items():
        if list(tensor.shape) != list(truth[name].shape):
            raise _wrong(path, f"{name} has another shape")
        error = _error(_rows(tensor), _rows(truth[name]))
        limit = LIMITS.get(tensor.tensor_type.name, 0.0)
        if not error <= limit:
            raise _wrong(
                path, f"{name} ({tensor.tensor_type.name}) is off by {error:.4g} of its size, allowed {limit:g}"
            )
        worst = max(worst, (error, name))
    return {
        "tensors_by_type": dict(Counter(tensor.tensor_type.name for tensor in mine.values())),
        "worst_weight_error": round(worst[0], 5),
        "worst_tensor": worst[1],
    }


def _rows(tensor: Any) -> Array:
    """float32 [rows, row length]: at most ROWS rows, the first and the last among them."""
    import numpy as np
    from gguf.quants import dequantize

    data = tensor.data.reshape(-1, tensor.data.shape[-1])
    chosen = np.unique(np.linspace(0, len(data) - 1, ROWS).astype(int))
    return dequantize(data[chosen], tensor.tensor_type).astype(np.float32)


def _error(mine: Array, truth: Array) -> float:
    """Root mean square of the difference over that of the truth; a zero tensor must be exactly zero."""
    import numpy as np

    difference = float(np.sqrt(((mine - truth) ** 2).mean()))
    size = float(np.sqrt((truth**2).mean()))
    return difference / size if size > 0 else (0.0 if difference == 0 else float("inf"))


def _wrong(path: Path, why: str) -> ExportError:
    return ExportError(
        "the GGUF does not hold the merged weights", code="gguf-weights", where=path.name, why=why,
        fix="use another export meanwhile, and please report this with provenance.json",
    )  # fmt: skip

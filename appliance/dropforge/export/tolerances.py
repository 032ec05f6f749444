"""How far each GGUF type may be from the merged model. Measured values and margins: docs/reference/export-errors.md."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """Largest accepted numbers of one type (compare.Agreement), and whether greedy text must be equal."""

    relative_error: float
    mean_kl: float
    greedy: bool = False


_EXACT = {"f32": Bounds(0.01, 0.001, True), "f16": Bounds(0.01, 0.001, True), "bf16": Bounds(0.05, 0.02, True)}
_BY_BITS = {
    "q8_0": Bounds(0.12, 0.05),
    "q6_k": Bounds(0.2, 0.1),
    "q5": Bounds(0.4, 0.3),
    "q4": Bounds(0.7, 0.8),
    "iq4": Bounds(0.7, 0.8),
    "q3": Bounds(0.9, 1.5),
    "iq3": Bounds(0.9, 1.5),
    "q2": Bounds(1.2, 4.0),
    "iq2": Bounds(1.2, 4.0),
    "iq1": Bounds(10.0, 50.0),
    # Ternary types are made for models trained in them; for others only loading, tokens and finite numbers are checked.
    "tq": Bounds(10.0, 50.0),
}


def bounds(gguf_type: str) -> Bounds:
    """Bounds of a type such as q4_k_m."""
    if gguf_type in _EXACT:
        return _EXACT[gguf_type]
    return next(limit for start, limit in _BY_BITS.items() if gguf_type.startswith(start))

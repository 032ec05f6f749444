"""Dropforge: drop a job in a folder, get a trained model out.

Importing this package has no side effects and imports nothing heavy; torch comes in with the first name that needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dropforge.fast_language_model import FastLanguageModel as FastLanguageModel
    from dropforge.hardware_dtypes import is_bfloat16_supported as is_bfloat16_supported

__version__ = "0.1.0"

_LAZY = {
    "FastLanguageModel": "dropforge.fast_language_model",
    "is_bfloat16_supported": "dropforge.hardware_dtypes",
    "is_bf16_supported": "dropforge.hardware_dtypes",
}


def __getattr__(name: str) -> Any:
    """The names of the Python API, imported when they are first used."""
    if name not in _LAZY:
        raise AttributeError(f"module 'dropforge' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])

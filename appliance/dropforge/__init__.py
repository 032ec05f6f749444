"""Dropforge: drop a job in a folder, get a trained model out.

Importing this package has no side effects and imports nothing heavy; torch comes in with the first name that needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dropforge.fast.language_model import FastLanguageModel as FastLanguageModel
    from dropforge.fast.model import FastModel as FastModel
    from dropforge.fast.repairs import fix_untrained_tokens as fix_untrained_tokens
    from dropforge.fast.scaling import average_models as average_models
    from dropforge.fast.scaling import average_weights as average_weights
    from dropforge.fast.scaling import scale_adapter as scale_adapter
    from dropforge.fast.state import model_report as model_report
    from dropforge.hardware_dtypes import is_bfloat16_supported as is_bfloat16_supported
    from dropforge.models.new_tokens import add_new_tokens as add_new_tokens
    from dropforge.trainers import DropforgeTrainer as DropforgeTrainer
    from dropforge.trainers import DropforgeTrainingArguments as DropforgeTrainingArguments
    from dropforge.trainers_preference import PatchDPOTrainer as PatchDPOTrainer

__version__ = "0.1.0"

_LAZY = {
    "FastLanguageModel": "dropforge.fast.language_model",
    "FastModel": "dropforge.fast.model",
    "PatchDPOTrainer": "dropforge.trainers_preference",
    "DropforgeTrainer": "dropforge.trainers",
    "DropforgeTrainingArguments": "dropforge.trainers",
    "add_new_tokens": "dropforge.models.new_tokens",
    "average_models": "dropforge.fast.scaling",
    "average_weights": "dropforge.fast.scaling",
    "fix_untrained_tokens": "dropforge.fast.repairs",
    "model_report": "dropforge.fast.state",
    "scale_adapter": "dropforge.fast.scaling",
    "is_bfloat16_supported": "dropforge.hardware_dtypes",
    "is_bf16_supported": "dropforge.hardware_dtypes",
}


# Names that scripts written elsewhere import: what to do instead.
_ELSEWHERE = {
    "FastVisionModel": "vision models are not trained in this release",
    "FastSentenceTransformer": "embedding models are not trained in this release",
    "FastDiffusionModel": "diffusion models are not trained in this release",
    "PatchFastRL": "online reinforcement learning is not in this release",
    "check_python_modules": "running generated code is not in this release",
    "create_locked_down_function": "running generated code is not in this release",
    "unsloth_train": "call trainer.train()",
    "UnslothTrainer": "import DropforgeTrainer",
    "UnslothTrainingArguments": "import DropforgeTrainingArguments",
}


def __getattr__(name: str) -> Any:
    """The names of the Python API, imported when they are first used."""
    if name in _ELSEWHERE:
        raise ImportError(f"dropforge has no {name}: {_ELSEWHERE[name]} (docs/guides/porting.md)")
    if name not in _LAZY:
        raise AttributeError(f"module 'dropforge' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])

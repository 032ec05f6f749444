"""Which transformers class and which tokenizer or processor a model needs, by its config alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dropforge.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class ModelKind:
    """How a model is loaded and what PEFT calls its task."""

    auto_class: Any
    task_type: str | None
    """None where PEFT has no name for it: the plain wrapper then."""
    processor: bool = False
    """Whether it comes with a processor (images, sound) in place of a tokenizer."""


# transformers' table -> (its auto class, PEFT's name of the task, whether inputs pass a processor), in order of choice.
_TABLES = (
    ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM", "CAUSAL_LM", False),
    ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "AutoModelForImageTextToText", "CAUSAL_LM", True),
    ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "AutoModelForSpeechSeq2Seq", None, True),
    ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", False),
    ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM", None, False),
    ("MODEL_MAPPING_NAMES", "AutoModel", "FEATURE_EXTRACTION", False),
)
_TASKS = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS", "QuestionAnswering": "QUESTION_ANS",
          "ForCausalLM": "CAUSAL_LM", "Seq2Seq": "SEQ_2_SEQ_LM"}  # fmt: skip
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def model_kind(config: Any, *, auto_model: Any, only_causal: bool) -> ModelKind:
    """The class asked for, or the first of transformers' tables that has the config's type.

    Raises ModelError model-no-class: nothing fits, or not as a causal language model where only that is wanted.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    if auto_model is not None:
        name = str(auto_model.__name__)
        task = next((task for part, task in _TASKS.items() if part in name), None)
        return ModelKind(auto_class=auto_model, task_type=task, processor=_needs_processor(config))
    remote = dict(getattr(config, "auto_map", None) or {})
    for table, auto, task, processor in _TABLES[:1] if only_causal else _TABLES:
        if config.model_type in getattr(modeling_auto, table) or auto in remote:
            return ModelKind(auto_class=getattr(transformers, auto), task_type=task, processor=processor)
    raise ModelError(
        f"a {config.model_type!r} model is no causal language model" if only_causal
        else f"transformers has no class for a {config.model_type!r} model",
        code="model-no-class", where="model_name",
        fix="load it with FastModel.from_pretrained" if only_causal else "name the class with auto_model=",
    )  # fmt: skip


def _needs_processor(config: Any) -> bool:
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    return config.model_type in PROCESSOR_MAPPING_NAMES


def load_processor(folder: Path, kind: ModelKind, *, repair: bool, repairs: list[str]) -> Any:
    """A tokenizer, mended for chat training where the model is a causal one; or a processor. Adds to `repairs`."""
    from transformers import AutoProcessor, AutoTokenizer

    if kind.processor and any((folder / name).is_file() for name in _PROCESSOR_FILES):
        return AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not repair or kind.task_type != "CAUSAL_LM":
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    from dropforge.models.tokenizer import load_tokenizer

    tokenizer, choice = load_tokenizer(folder)
    repairs += choice.repairs
    return tokenizer

"""What a model loaded by FastLanguageModel or FastModel remembers about itself, and how it tells of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dropforge.errors import CommandError
from dropforge.models.source import ModelSource

if TYPE_CHECKING:
    import torch
    from dropforge_kernels.patch.report import PatchReport
    from dropforge_kernels.patch.session import Session
    from transformers import PreTrainedTokenizerBase

STATE = "dropforge_state"


@dataclass
class ModelState:
    """Written at loading, amended by get_peft_model, for_training and the repairs; reached with ``state_of``."""

    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    max_seq_length: int
    full_finetuning: bool
    kernels: str
    compute_dtype: torch.dtype
    adapter: str | None = None
    """The folder of the adapter that training goes on from."""
    stored_rows: int | None = None
    """Embedding rows of the model as it is stored."""
    task_type: str | None = "CAUSAL_LM"
    checkpointing: bool = False
    offload_embedding: bool = False
    """The input embedding goes to host memory when training begins."""
    tiled_mlp: bool = False
    fp16_overflows: bool = False
    """The family's activations leave fp16's range, so a trainer must not compute in it."""
    repairs: list[str] = field(default_factory=list)
    """What was wrong with the checkpoint or its tokenizer, and what was done about it: one sentence each."""
    untrained: frozenset[int] = frozenset()
    """Token ids whose embedding rows were never trained."""
    initial: dict[str, torch.Tensor] = field(default_factory=dict)
    """The fresh adapter, where its initialisation took a part out of the base (models.plain_lora)."""
    session: Session | None = None

    @property
    def report(self) -> PatchReport | None:
        """Which kernels run in this model, and which do not and why; None before the first ``for_training``."""
        return self.session.report if self.session else None


def state_of(model: Any) -> ModelState | None:
    """The state of a model that this library loaded, also through PEFT's wrapper; None for any other model."""
    state = getattr(model, STATE, None)
    return state if isinstance(state, ModelState) else None


def needed_state(model: Any) -> ModelState:
    """As ``state_of``. Raises CommandError api-not-loaded for a model that this library did not load."""
    state = state_of(model)
    if state is None:
        raise CommandError(
            "this model was not loaded by FastLanguageModel", code="api-not-loaded", where="model",
            fix="load it with FastLanguageModel.from_pretrained; for a model of your own use "
            "dropforge_kernels.patch.session.patched(model)",
        )  # fmt: skip
    return state


def model_report(model: Any) -> list[str]:
    """Sentences about a loaded model: where it came from, how it is held, every repair, which kernels run in it.

    Raises CommandError api-not-loaded.
    """
    state = needed_state(model)
    revision = f" at revision {state.source.revision}" if state.source.revision else ""
    lines = [f"model: {state.source.id} ({state.source.kind}{revision})", f"weights: {held(model)}"]
    if state.adapter:
        lines.append(f"adapter: goes on from {state.adapter}")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    lines.append(f"trained: {trained} values, rows of at most {state.max_seq_length} tokens")
    lines += [f"repair: {line}" for line in state.repairs]
    if state.report is not None:
        lines += state.report.lines()
    return lines


def held(model: Any) -> str:
    """How the weights lie in memory, in words."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return str(model.dtype).removeprefix("torch.")
    fields = config if isinstance(config, dict) else config.to_dict()
    method = str(getattr(fields.get("quant_method"), "value", fields.get("quant_method")))
    if method != "bitsandbytes":
        return method
    return f"{fields.get('bnb_4bit_quant_type')} (4 bits)" if fields.get("load_in_4bit") else "int8"

"""From a name to a loaded model: the source, the checks that need no weights, the weights, what had to be mended."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropforge.errors import ModelError
from dropforge.fast.adapter_base import RECORD, Candidate, check_adapter, describe_base
from dropforge.fast.checks import check_dtype, check_kernels, check_offload, check_precision, check_stored_precision
from dropforge.fast.classes import ModelKind, load_processor, model_kind
from dropforge.fast.rope import check_length, scale_positions
from dropforge.fast.source import AdapterFolder, find_source
from dropforge.fast.state import STATE, ModelState, needed_state
from dropforge.models.source import ModelSource

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

LOG = logging.getLogger("dropforge")
GPU_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True, kw_only=True)
class LoadRequest:
    """The arguments of from_pretrained, as given; see FastLanguageModel.from_pretrained."""

    model_name: str
    max_seq_length: int | None
    dtype: str | torch.dtype | None
    load_in_4bit: bool | None
    load_in_8bit: bool
    load_in_16bit: bool
    full_finetuning: bool
    token: str | None
    revision: str | None
    trust_remote_code: bool
    local_files_only: bool
    rope_scaling: Mapping[str, Any] | None
    device_map: str | Mapping[str, Any] | None
    attn_implementation: str | None
    kernels: str
    use_gradient_checkpointing: bool | str
    fix_tokenizer: bool
    resize_model_vocab: int | None
    float32_mixed_precision: bool | None
    offload_embedding: bool = False
    tiled_mlp: bool = False
    auto_model: Any = None
    """A transformers class, or None: the one that fits the config."""
    only_causal: bool = True
    model_arguments: Mapping[str, Any] | None = None
    """Further fields of the model's config, such as num_labels."""

    @property
    def precisions(self) -> dict[str, bool]:
        """Argument name -> asked for."""
        return {
            "load_in_4bit": bool(self.load_in_4bit), "load_in_8bit": self.load_in_8bit,
            "load_in_16bit": self.load_in_16bit, "full_finetuning": self.full_finetuning,
        }  # fmt: skip


def load(request: LoadRequest) -> tuple[PreTrainedModel, Any]:
    """(model, tokenizer or processor). Everything that can be refused is refused before weights are read."""
    from dropforge.fast.repairs import look_for_untrained

    check_precision(request.precisions)
    asked = check_dtype(request.dtype)
    check_kernels(request.kernels)
    source, adapter = find_source(
        request.model_name, revision=request.revision, remote_code=request.trust_remote_code,
        offline=request.local_files_only, token=request.token,
    )  # fmt: skip
    config = _config(request, source)
    check_stored_precision(config, request.precisions, request.load_in_4bit)
    if request.offload_embedding:
        check_offload(config, trained="full_finetuning" if request.full_finetuning else "")
    repairs: list[str] = []
    length = _length(request, config, repairs)
    kind = model_kind(config, auto_model=request.auto_model, only_causal=request.only_causal)
    processor = load_processor(_tokenizer_folder(adapter, source), kind, repair=request.fix_tokenizer, repairs=repairs)
    tokenizer = getattr(processor, "tokenizer", processor)
    rows = getattr(config.get_text_config(), "vocab_size", None)
    wanted = max(len(tokenizer), request.resize_model_vocab or 0)
    if adapter is not None:
        base = _candidate(request, source, config=config, kind=kind, rows=max(wanted, rows or 0))
        check_adapter(adapter.config, folder=adapter.path, base=base, argument="model_name")
    compute, overflows = _compute_dtype(asked, config, repairs)
    model = _load_weights(request, source, config=config, kind=kind, compute=compute)
    _fit_vocabulary(model, wanted, repairs)
    state = ModelState(
        source=source, tokenizer=tokenizer, max_seq_length=length, full_finetuning=request.full_finetuning,
        kernels=request.kernels, compute_dtype=compute, task_type=kind.task_type,
        checkpointing=bool(request.use_gradient_checkpointing), offload_embedding=request.offload_embedding,
        tiled_mlp=request.tiled_mlp, fp16_overflows=overflows, repairs=repairs,
        adapter=request.model_name if adapter is not None else None, stored_rows=rows,
    )  # fmt: skip
    setattr(model, STATE, state)
    _agree_on_special_tokens(model, tokenizer, repairs)
    if request.fix_tokenizer:
        look_for_untrained(model, state)
    if adapter is not None:
        model = _continue_from(adapter, model)
    for line in repairs:
        LOG.warning("%s: %s", request.model_name, line)
    return model, processor


def _config(request: LoadRequest, source: ModelSource) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(
        source.path, local_files_only=True, trust_remote_code=request.trust_remote_code,
        **dict(request.model_arguments or {}),
    )  # fmt: skip


def _length(request: LoadRequest, config: Any, repairs: list[str]) -> int:
    from dropforge.fast.rope import known_length

    known = known_length(config)
    length = request.max_seq_length if request.max_seq_length is not None else min(known or 2048, 2048)
    check_length(config, max_seq_length=length, rope_scaling=request.rope_scaling)
    if request.rope_scaling is not None:
        repairs.append(scale_positions(config, request.rope_scaling))
    return length


def _candidate(request: LoadRequest, source: ModelSource, *, config: Any, kind: ModelKind, rows: int) -> Candidate:
    import torch

    with torch.device("meta"):
        empty = kind.auto_class.from_config(config, trust_remote_code=request.trust_remote_code)
    return Candidate(empty=empty, name=source.id, rows=rows, tokenizer=source.path)


def _tokenizer_folder(adapter: AdapterFolder | None, source: ModelSource) -> Path:
    return adapter.path if adapter is not None and (adapter.path / "tokenizer.json").is_file() else source.path


def _compute_dtype(asked: torch.dtype | None, config: Any, repairs: list[str]) -> tuple[torch.dtype, bool]:
    from dropforge.fast.repairs import FP16_OVERFLOW, compute_dtype
    from dropforge.hardware_dtypes import default_dtype, is_bfloat16_supported

    family = str(config.get_text_config().model_type)
    compute, line = compute_dtype(asked or default_dtype(), model_type=family, bf16=is_bfloat16_supported())
    if line:
        repairs.append(line)
    return compute, family in FP16_OVERFLOW


def _load_weights(
    request: LoadRequest, source: ModelSource, *, config: Any, kind: ModelKind, compute: torch.dtype
) -> PreTrainedModel:
    import torch

    stored = getattr(config, "quantization_config", None) is not None
    arguments: dict[str, Any] = {"dtype": compute, "config": config, "use_safetensors": True}
    four_bit = request.load_in_4bit
    if four_bit is None:
        four_bit = not (request.load_in_8bit or request.load_in_16bit or request.full_finetuning)
    if not stored and (four_bit or request.load_in_8bit):
        arguments["quantization_config"] = _bitsandbytes(compute, four_bit=four_bit)
    elif request.full_finetuning and request.float32_mixed_precision is not False and request.dtype is None:
        arguments["dtype"] = torch.float32  # small updates vanish in 16-bit weights; the trainer computes in 16 bits
    if torch.cuda.is_available():
        arguments["device_map"] = _device_map(request) or {"": torch.cuda.current_device()}
    elif request.device_map is not None and request.device_map not in (*GPU_MAPS, "unsloth"):
        arguments["device_map"] = request.device_map
    if request.attn_implementation is not None:
        arguments["attn_implementation"] = request.attn_implementation
    try:
        model: PreTrainedModel = kind.auto_class.from_pretrained(
            source.path, local_files_only=True, trust_remote_code=request.trust_remote_code, **arguments
        )
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(
            f"model {source.id!r} cannot be loaded", code="model-load", where="model_name",
            why=str(error).split("\n")[0], fix="check that this version of transformers knows the model's type",
        ) from error  # fmt: skip
    if stored:
        # What a pre-quantised checkpoint computes in is written in it, and may be another type than this GPU's.
        for module in model.modules():
            if "compute_dtype" in vars(module):
                vars(module)["compute_dtype"] = compute
    return model


def _device_map(request: LoadRequest) -> str | Mapping[str, Any] | None:
    if request.device_map == "unsloth":
        LOG.warning('device_map="unsloth" means "balanced": the layers are spread evenly over the GPUs')
        return "balanced"
    return request.device_map


def _bitsandbytes(compute: torch.dtype, *, four_bit: bool) -> Any:
    from transformers import BitsAndBytesConfig

    if not four_bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def _fit_vocabulary(model: PreTrainedModel, rows: int, repairs: list[str]) -> None:
    from dropforge.models.drawn_rows import grow_vocabulary

    had = grow_vocabulary(model, rows)
    if had < rows:
        repairs.append(
            f"the embedding grew from {had} to {rows} rows, the new ones drawn from the distribution of the old"
        )


def _agree_on_special_tokens(model: Any, tokenizer: Any, repairs: list[str]) -> None:
    """Pad as in the tokenizer; and generation ends at the tokenizer's end token and at the one that ends a turn."""
    from dropforge.models.template_end import end_of_turn, template_notes

    if tokenizer.pad_token_id is not None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return
    generation.pad_token_id = tokenizer.pad_token_id
    ends = generation.eos_token_id
    known = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    turn = end_of_turn(tokenizer)
    wanted = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(turn) if turn else None]
    new = [index for index in dict.fromkeys(wanted) if index is not None and index not in known]
    if new:
        generation.eos_token_id = [*known, *new] if len(known) + len(new) > 1 else new[0]
        names = ", ".join(repr(tokenizer.convert_ids_to_tokens(index)) for index in new)
        repairs.append(f"generation did not end at {names}, which ends a text or a turn; now it does")
    repairs += template_notes(tokenizer)


def _continue_from(adapter: AdapterFolder, model: PreTrainedModel) -> PreTrainedModel:
    from peft import PeftModel, set_peft_model_state_dict
    from safetensors.torch import load_file

    from dropforge.fast.adapter import hold_in_fp32

    model.requires_grad_(False)
    base = describe_base(model, vocabulary=needed_state(model).stored_rows)
    wrapped: Any = PeftModel.from_pretrained(model, str(adapter.path), is_trainable=True)
    for config in wrapped.peft_config.values():
        if RECORD not in (config.auto_mapping or {}):
            config.auto_mapping = base
    stored = adapter.path / "adapter_model.safetensors"
    if hold_in_fp32(wrapped) and stored.is_file():
        # They were read into 16-bit copies; once more, into those that are to be trained.
        set_peft_model_state_dict(wrapped, load_file(stored))
    return wrapped  # type: ignore[no-any-return]

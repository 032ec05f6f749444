"""Load the base model as the plan says, and attach what will be trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropforge.errors import ModelError
from dropforge.fast.adapter import choose_targets, hold_in_fp32, lora_config, within_layers
from dropforge.fast.adapter_base import describe_base
from dropforge.fast.checks import check_layers
from dropforge.fast.rope import known_length
from dropforge.models.drawn_rows import grow_vocabulary
from dropforge.models.pictures import auto_class, freeze_towers, within_language
from dropforge.models.plain_lora import to_plain_lora
from dropforge.models.source import ModelSource
from dropforge.plan import Plan
from dropforge.spec import AdapterSpec

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(source: ModelSource, *, plan: Plan, vocab_size: int) -> PreTrainedModel:
    """The base model in eval mode, on the plan's device, with at least `vocab_size` embedding rows.

    Raises:
        ModelError: the folder holds no causal language model that transformers knows.
    """
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # of loading shards; the job has its own progress
    arguments: dict[str, Any] = {"dtype": getattr(torch, plan.compute_dtype), "use_safetensors": True}
    if plan.weight_dtype == "nf4":
        arguments["quantization_config"] = _nf4(getattr(torch, plan.compute_dtype))
    else:
        arguments["dtype"] = getattr(torch, plan.weight_dtype)
    if plan.device == "cuda":
        arguments["device_map"] = {"": 0}
    try:
        model: PreTrainedModel = auto_class(source.path).from_pretrained(
            source.path, local_files_only=True, trust_remote_code=source.runs_code, **arguments
        )
    except (ValueError, KeyError, OSError) as error:
        raise _unloadable(source, error) from error
    model.config.use_cache = False
    grow_vocabulary(model, vocab_size)
    return model


def _nf4(compute_dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def attach_adapter(model: PreTrainedModel, adapter: AdapterSpec, *, seed: int, checkpointing: bool) -> PreTrainedModel:
    """The model with LoRA matrices as its only trained weights, or every weight trained for `type: full`.

    Of a model that reads pictures too, the language model alone is trained.

    Args:
        seed: LoRA's A matrices are random; the same seed gives the same ones.
        checkpointing: activations will be recomputed, so the inputs must require gradients.

    Raises:
        ModelError: adapter-target-unknown, when target_modules or modules_to_save name nothing in this model.
    """
    from transformers import set_seed

    set_seed(seed)
    if adapter.type == "full":
        freeze_towers(model.requires_grad_(True))
        return model
    from peft import get_peft_model

    # Frozen, and otherwise as loaded: norms and head stay in the compute type.
    model.requires_grad_(False)
    wrapped: Any = get_peft_model(model, _lora_config(model, adapter))
    if adapter.init_lora_weights == "loftq":
        from dropforge.fast.loftq import start_from_residual

        start_from_residual(wrapped, folder=Path(str(model.name_or_path)))
    hold_in_fp32(wrapped)
    if checkpointing:
        wrapped.enable_input_require_grads()
    return wrapped  # type: ignore[no-any-return]


def _lora_config(model: PreTrainedModel, adapter: AdapterSpec) -> LoraConfig:
    layers = check_layers(model.config, layers=adapter.layers_to_transform, argument="adapter.layers_to_transform")
    chosen = choose_targets(
        model, target_modules=adapter.target_modules, modules_to_save=adapter.modules_to_save, section="adapter."
    )
    chosen = within_language(model, chosen)
    init = adapter.init_lora_weights
    return lora_config(
        within_layers(model, chosen, layers), init_lora_weights=True if init == "default" else init, loftq_config=None,
        task_type="CAUSAL_LM", r=adapter.r, lora_alpha=adapter.lora_alpha or adapter.r,
        lora_dropout=adapter.lora_dropout, use_rslora=adapter.use_rslora, use_dora=adapter.use_dora,
        layers_to_transform=layers, bias="none", auto_mapping=describe_base(model),
    )  # fmt: skip


def check_fit(source: ModelSource, *, adapter: AdapterSpec, max_seq_length: int) -> None:
    """Refuse what can be refused before any weight is read; looks at the config and at an empty model.

    Raises:
        ModelError: model-load (no causal language model), model-length, adapter-target-unknown.
        CommandError: api-layers, api-target-parts.
    """
    import torch
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source.path, local_files_only=True, trust_remote_code=source.runs_code)
        with torch.device("meta"):
            model = auto_class(source.path).from_config(config, trust_remote_code=source.runs_code)
    except (ValueError, KeyError, OSError) as error:
        raise _unloadable(source, error) from error
    known = known_length(config)
    if known is not None and max_seq_length > known:
        raise ModelError(
            f"model.max_seq_length is {max_seq_length}, and this model knows {known} positions",
            code="model-length",
            where="model.max_seq_length",
            why="positions it never saw come out as noise",
            fix=f"set model.max_seq_length: {known}",
        )
    if adapter.type == "lora":
        _lora_config(model, adapter)


def _unloadable(source: ModelSource, error: Exception) -> ModelError:
    return ModelError(
        f"model {source.id!r} cannot be loaded",
        code="model-load",
        where="model.id",
        why=str(error).split("\n")[0],
        fix="check that it is a text-generation model that this version of transformers knows",
    )


def save_trained(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    adapter: AdapterSpec,
    source: ModelSource,
    folder: Any,
    initial: Mapping[str, torch.Tensor],
) -> None:
    """Write adapter/ (PEFT) or full/ (transformers), and tokenizer/, into `folder`. Same weights, same bytes.

    `initial` is what plain_lora.initial_pairs gave when the adapter was attached.
    """
    import json

    if adapter.type == "full":
        model.save_pretrained(folder / "full")
    else:
        model.save_pretrained(folder / "adapter")
        to_plain_lora(folder / "adapter", initial)
        config_path = folder / "adapter" / "adapter_config.json"
        config = json.loads(config_path.read_text())
        # A path of this machine helps nobody, and sets are written in the order of this process's hash seed.
        config["base_model_name_or_path"] = source.id
        for key in ("target_modules", "modules_to_save", "exclude_modules"):
            if isinstance(config.get(key), list):
                config[key] = sorted(config[key])
        config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (folder / "adapter" / "README.md").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder / "tokenizer")

"""FastLanguageModel: load a causal language model, put an adapter on it, train it with any Hugging Face trainer.

The call shapes are those that fine-tuning scripts already use; what stands behind them is transformers, PEFT and this
library's kernels (``dropforge_kernels.patch``), swapped into that one model and reported.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dropforge.fast.adapter import Switches
from dropforge.fast.attach import attach
from dropforge.fast.extras import ADAPTER, LOADING, check_extras
from dropforge.fast.loading import LoadRequest, load
from dropforge.fast.methods import give_methods
from dropforge.fast.modes import to_inference, to_training
from dropforge.fast.state import ModelState, needed_state, state_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["FastLanguageModel", "ModelState", "needed_state", "state_of"]


class FastLanguageModel:
    """Loads and prepares causal language models. Static methods only; there are no instances."""

    @staticmethod
    def from_pretrained(
        model_name: str = "builtin:tiny-llama",
        max_seq_length: int | None = 2048,
        dtype: str | torch.dtype | None = None,
        load_in_4bit: bool | None = None,
        load_in_8bit: bool = False,
        full_finetuning: bool = False,
        *,
        load_in_16bit: bool = False,
        token: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        local_files_only: bool = False,
        rope_scaling: Mapping[str, Any] | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        attn_implementation: str | None = None,
        use_gradient_checkpointing: bool | str = True,
        fix_tokenizer: bool = True,
        resize_model_vocab: int | None = None,
        float32_mixed_precision: bool | None = None,
        offload_embedding: bool = False,
        tiled_mlp: bool = False,
        kernels: str = "auto",
        **extras: Any,
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """(model, tokenizer), with the tokenizer repaired (pad apart from eos, a chat template that ends answers).

        Args:
            model_name: hub id, folder of a model, of a PEFT adapter or of a trainer's checkpoint (its base is loaded
                and training goes on from it), a folder under models/ of the data root, or builtin:tiny-llama,
                builtin:tiny-qwen3. Names are never redirected.
            max_seq_length: longest training row in tokens; more than the model knows needs `rope_scaling`. None: the
                model's own limit, at most 2048.
            dtype: None chooses by the hardware: bf16, else fp16, and fp32 on a CPU. Families whose activations leave
                fp16's range compute in bf16 or fp32 instead, and that is reported.
            load_in_4bit, load_in_8bit, load_in_16bit, full_finetuning: how the weights are held, at most one of them.
                load_in_4bit=None means True unless another is set. A checkpoint stored quantised is loaded as it is.
            token: for gated hub models; default: the one huggingface_hub finds.
            rope_scaling: {"rope_type": "linear" | "dynamic" | "yarn" | "llama3" | "longrope", "factor": ...}.
            device_map: None is the current GPU; "balanced" spreads the layers over all of them.
            fix_tokenizer: False leaves tokenizer and template as they are stored.
            resize_model_vocab: at least so many embedding rows.
            float32_mixed_precision: False holds the weights of full fine-tuning in 16 bits instead of fp32.
            offload_embedding: the frozen input embedding lies in pinned host memory while the model trains, and the GPU
                fetches each batch's rows over the bus: 1 GiB less for Llama-3-8B. Not for a trained or tied one.
            tiled_mlp: hand-written layers compute the MLP some tokens at a time and keep none of it, also where a batch
                would fit without; else the memory planner decides that.
            kernels: "auto" swaps this library's kernels in on a GPU and reports what it could not swap; "required"
                swaps everywhere and raises instead; "off" trains with transformers' own code.
            extras: the further names in dropforge.fast.extras.LOADING (docs/reference/python-api.md).

        Raises:
            CommandError: api-two-precisions, api-dtype, api-length, api-rope-scaling, api-kernels,
                api-offload-embedding, api-argument, api-not-built: before any weight is loaded.
            ModelError, EnvironmentFault: unknown, incomplete, pickled or gated model; no network; an adapter that
                does not fit its base.
        """
        check_extras(extras, LOADING, function="from_pretrained", names=_names(FastLanguageModel.from_pretrained))
        request = LoadRequest(
            model_name=model_name, max_seq_length=max_seq_length, dtype=dtype, load_in_4bit=load_in_4bit,
            load_in_8bit=load_in_8bit, load_in_16bit=load_in_16bit, full_finetuning=full_finetuning, token=token,
            revision=revision, trust_remote_code=trust_remote_code, local_files_only=local_files_only,
            rope_scaling=rope_scaling, device_map=device_map, attn_implementation=attn_implementation,
            use_gradient_checkpointing=use_gradient_checkpointing, fix_tokenizer=fix_tokenizer,
            resize_model_vocab=resize_model_vocab, float32_mixed_precision=float32_mixed_precision, kernels=kernels,
            offload_embedding=bool(offload_embedding), tiled_mlp=bool(tiled_mlp or extras.get("unsloth_tiled_mlp")),
        )  # fmt: skip
        model, tokenizer = load(request)
        give_methods(model)
        return model, tokenizer

    @staticmethod
    def get_peft_model(
        model: PreTrainedModel,
        r: int = 16,
        target_modules: str | Iterable[str] | None = None,
        lora_alpha: int = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        layers_to_transform: int | list[int] | None = None,
        layers_pattern: str | list[str] | None = None,
        use_gradient_checkpointing: bool | str | None = None,
        random_state: int = 3407,
        max_seq_length: int | None = None,
        use_rslora: bool = False,
        modules_to_save: list[str] | None = None,
        init_lora_weights: bool | str = True,
        loftq_config: Any = None,
        use_dora: bool = False,
        task_type: str | None = None,
        *,
        finetune_vision_layers: bool = True,
        finetune_language_layers: bool = True,
        finetune_attention_modules: bool = True,
        finetune_mlp_modules: bool = True,
        finetune_last_n_layers: int | None = None,
        exclude_modules: str | list[str] | None = None,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, int] | None = None,
        target_parameters: list[str] | None = None,
        **extras: Any,
    ) -> PreTrainedModel:
        """The model with LoRA matrices as its trained weights, ready to train. Arguments as in PEFT's LoraConfig.

        Args:
            r, lora_alpha, lora_dropout, bias, use_rslora, use_dora, layers_pattern, exclude_modules, rank_pattern,
                alpha_pattern, target_parameters: as in LoraConfig.
            target_modules: None is the seven projections q, k, v, o, gate, up, down where the model has them, else
                "all-linear". "embed_tokens" and "lm_head" in it are trained in full (as modules_to_save), in fp32;
                where the two are one matrix they stay one. Names of parts of a fused layer (qkv_proj, gate_up_proj)
                mean that layer. One text is an expression for whole paths.
            use_gradient_checkpointing: True, False, or a text such as "unsloth" or "dropforge", which means True; None
                is as at loading. On a GPU the memory planner decides what each layer of a patched model keeps.
            random_state: seed of the matrices.
            max_seq_length: may lower the limit given at loading.
            init_lora_weights: also "gaussian", "pissa", "olora", "loftq" (which starts from what 4 bits lost).
            layers_to_transform, finetune_last_n_layers, finetune_*: which layers and parts of the model are adapted.
            extras: the further names in dropforge.fast.extras.ADAPTER (docs/reference/python-api.md).

        A model loaded with full_finetuning=True is returned without an adapter; one that has this adapter, as it is.

        Raises ModelError adapter-target-unknown; CommandError api-not-loaded (not made by from_pretrained),
        api-adapter-twice (it has another adapter), api-target-parts, api-layers, api-switches, api-init, api-lora,
        api-argument, api-not-built.
        """
        check_extras(extras, ADAPTER, function="get_peft_model", names=_names(FastLanguageModel.get_peft_model))
        switches = Switches(
            vision=finetune_vision_layers, language=finetune_language_layers, attention=finetune_attention_modules,
            mlp=finetune_mlp_modules,
        )  # fmt: skip
        wrapped = attach(
            model, targets=target_modules, modules_to_save=modules_to_save, switches=switches,
            layers=layers_to_transform, last_layers=finetune_last_n_layers, seed=random_state,
            checkpointing=None if use_gradient_checkpointing is None else bool(use_gradient_checkpointing),
            max_seq_length=max_seq_length,
            init=init_lora_weights, loftq_config=loftq_config, task_type=task_type,
            fields={
                "r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, "bias": bias,
                "layers_pattern": layers_pattern, "use_rslora": use_rslora, "use_dora": use_dora,
                "exclude_modules": exclude_modules, "rank_pattern": dict(rank_pattern or {}),
                "alpha_pattern": dict(alpha_pattern or {}), "target_parameters": target_parameters,
            },
        )  # fmt: skip
        give_methods(wrapped)
        return to_training(wrapped)  # type: ignore[no-any-return]

    @staticmethod
    def for_training(model: PreTrainedModel, use_gradient_checkpointing: bool | str | None = None) -> PreTrainedModel:
        """Training mode: layers recomputed as asked, no cache, kernels swapped in. Returns the model itself."""
        return to_training(model, use_gradient_checkpointing)  # type: ignore[no-any-return]

    @staticmethod
    def for_inference(model: PreTrainedModel) -> PreTrainedModel:
        """Evaluation mode: cache on, nothing recomputed, left padding, transformers' own code. Returns the model."""
        return to_inference(model)  # type: ignore[no-any-return]


def _names(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)

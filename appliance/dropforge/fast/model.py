"""FastModel: the same for any other class of transformers: other architectures, classification, encoder-decoders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dropforge.fast.extras import LOADING, check_extras
from dropforge.fast.language_model import FastLanguageModel
from dropforge.fast.loading import LoadRequest, load
from dropforge.fast.methods import give_methods

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class FastModel:
    """Loads and prepares any model that transformers knows. What has no kernels here trains with its own code."""

    @staticmethod
    def from_pretrained(
        model_name: str,
        max_seq_length: int | None = None,
        dtype: str | torch.dtype | None = None,
        load_in_4bit: bool | None = None,
        load_in_8bit: bool = False,
        full_finetuning: bool = False,
        *,
        auto_model: Any = None,
        num_labels: int | None = None,
        id2label: Mapping[int, str] | None = None,
        label2id: Mapping[str, int] | None = None,
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
    ) -> tuple[PreTrainedModel, Any]:
        """(model, tokenizer or processor). Arguments and errors as FastLanguageModel.from_pretrained, and:

        auto_model: a class such as AutoModelForSequenceClassification; None takes the first that fits the config, in
        the order causal, image and text, speech, encoder-decoder, masked, headless.
        num_labels, id2label, label2id: of a classification head.
        """
        check_extras(extras, LOADING, function="from_pretrained", names=("auto_model", "num_labels", "max_seq_length"))
        labels = {"num_labels": num_labels, "id2label": id2label, "label2id": label2id}
        request = LoadRequest(
            model_name=model_name, max_seq_length=max_seq_length, dtype=dtype, load_in_4bit=load_in_4bit,
            load_in_8bit=load_in_8bit, load_in_16bit=load_in_16bit, full_finetuning=full_finetuning, token=token,
            revision=revision, trust_remote_code=trust_remote_code, local_files_only=local_files_only,
            rope_scaling=rope_scaling, device_map=device_map, attn_implementation=attn_implementation,
            use_gradient_checkpointing=use_gradient_checkpointing, fix_tokenizer=fix_tokenizer,
            resize_model_vocab=resize_model_vocab, float32_mixed_precision=float32_mixed_precision, kernels=kernels,
            offload_embedding=bool(offload_embedding), tiled_mlp=bool(tiled_mlp or extras.get("unsloth_tiled_mlp")),
            auto_model=auto_model, only_causal=False,
            model_arguments={name: value for name, value in labels.items() if value is not None},
        )  # fmt: skip
        model, processor = load(request)
        give_methods(model)
        return model, processor

    @staticmethod
    def get_peft_model(
        model: PreTrainedModel, r: int = 16, target_modules: str | Iterable[str] | None = None, **arguments: Any
    ) -> PreTrainedModel:
        """As FastLanguageModel.get_peft_model, with the same arguments. A classification head is trained in full."""
        return FastLanguageModel.get_peft_model(model, r, target_modules, **arguments)

    @staticmethod
    def for_training(model: PreTrainedModel, use_gradient_checkpointing: bool | str | None = None) -> PreTrainedModel:
        """See FastLanguageModel.for_training."""
        return FastLanguageModel.for_training(model, use_gradient_checkpointing)

    @staticmethod
    def for_inference(model: PreTrainedModel) -> PreTrainedModel:
        """See FastLanguageModel.for_inference."""
        return FastLanguageModel.for_inference(model)

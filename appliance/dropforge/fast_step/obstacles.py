"""What keeps a training from the fast step, or from CUDA graphs, each in words."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from torch import nn


def fast_obstacle(args: Any, model: nn.Module, dataset: Any) -> str:
    """Why the trainer must keep its own step; empty when it need not. args: transformers' TrainingArguments."""
    config: Any = model.config
    text = config.get_text_config()
    checks = (
        (args.world_size > 1, "several processes train together"),
        (args.n_gpu > 1, "several GPUs are visible to one process"),
        (bool(args.deepspeed) or bool(args.fsdp), "DeepSpeed or FSDP is on"),
        (bool(args.fp16), "fp16 needs a gradient scaler"),
        (args.label_smoothing_factor > 0, "label smoothing needs the logits"),
        (getattr(args, "loss_type", "nll") != "nll", "the loss is not the plain one"),
        (bool(args.neftune_noise_alpha), "NEFTune's noise depends on each row's length"),
        (args.torch_compile, "torch.compile is on"),
        (args.train_sampling_strategy != "random", "the sampling strategy is not random"),
        (args.dataloader_drop_last, "incomplete last batches are dropped"),
        (getattr(text, "attention_dropout", 0.0) > 0, "attention dropout"),
        (getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None), "a mixture of experts"),
        (getattr(args, "activation_offloading", False), "TRL's activation offloading is on"),
        (not isinstance(dataset, Dataset), "the data set is streamed"),
        (isinstance(dataset, Dataset) and not _is_tokenised(args, dataset), "the data set is not tokenised"),
    )
    return next((reason for found, reason in checks if found), "")


def _is_tokenised(args: Any, dataset: Dataset) -> bool:
    """It is, or TRL's SFTTrainer is about to do it (texts, conversations, prompts with completions)."""
    names = set(dataset.column_names)
    if "input_ids" in names:
        return True
    prepares = "dataset_text_field" in vars(args) and not (args.dataset_kwargs or {}).get("skip_prepare_dataset")
    return prepares and names.isdisjoint({"image", "images"})


def _tokens(args: Any, dataset: Any) -> bool:
    """Whether the trainer will have token ids: they are there, or TRL makes them of texts and conversations."""
    names = set(dataset.column_names if isinstance(dataset, Dataset) else ())
    prepares = not (getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset", False)
    texts = {"messages", "prompt", "completion", getattr(args, "dataset_text_field", "text")}
    return "input_ids" in names or bool(prepares and names & texts and not names & {"image", "images"})


def capture_obstacle(args: Any, model: nn.Module) -> str:
    """Why the step cannot be captured; empty when it can be tried."""
    if args.device.type != "cuda":
        return "CUDA graphs need a GPU"
    kwargs = args.gradient_checkpointing_kwargs or {}
    if args.gradient_checkpointing and has_dropout(model) and kwargs.get("preserve_rng_state", True):
        return "dropout inside recomputed layers needs the host's random state"
    return ""


def has_dropout(model: nn.Module) -> bool:
    """Whether anything in the model drops values in training."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())

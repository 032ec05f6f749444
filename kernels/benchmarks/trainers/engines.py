"""One trainer per engine, each with the settings its own documentation shows, on the same rows and the same LoRA.

trl               TRL's SFTTrainer, PEFT, sdpa, batch 2, accumulation 4, recomputed layers (its defaults)
hf_liger          transformers' Trainer and Liger with its fused loss, batch 2, accumulation 4
unsloth           Unsloth, batch 2, accumulation 4
unsloth_packed    Unsloth, packing to rows of PACKED tokens, one row a step
unsloth_rows      Unsloth, rows as they are, one a step: its compiled path, for data of one length
dropforge         ours, batch 2, accumulation 4: the same documents per step, packing "auto"
dropforge_packed  ours, packing to buckets of PACKED tokens, one bucket a step
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

PACKED = 8192
"""Tokens of a packed row, and the longest row of the others."""
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ENGINES = ("trl", "hf_liger", "unsloth", "unsloth_packed", "unsloth_rows", "dropforge", "dropforge_packed")
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "bias": "none", "target_modules": TARGETS}


def build(engine: str, path: Path, rows: list[list[int]], *, steps: int, out: Path, count: Callable[[int], None],
          stack: ExitStack, length: int = PACKED) -> Any:  # fmt: skip
    """The trainer of an engine. count: gets the real tokens of every batch. stack: keeps patches open."""
    import torch

    cuda = torch.cuda.is_available()
    packed, single = engine.endswith("_packed"), engine.endswith(("_packed", "_rows"))
    common: dict[str, Any] = {
        "output_dir": str(out), "max_steps": steps, "learning_rate": 2e-4,
        "optim": "adamw_8bit" if cuda else "adamw_torch", "bf16": cuda, "use_cpu": not cuda,
        "logging_steps": 10, "report_to": "none", "save_strategy": "no",
        "gradient_checkpointing": True, "seed": 3407, "disable_tqdm": True, "dataloader_pin_memory": cuda,
        "per_device_train_batch_size": 1 if single else 2, "gradient_accumulation_steps": 1 if single else 4,
    }  # fmt: skip
    if engine.startswith("unsloth"):
        return _unsloth(path, rows, common, packed=packed, count=count, length=length)
    model, tokenizer = _peft(path, cuda=cuda)
    if engine == "trl":
        return _trl(model, tokenizer, rows, common, count, length)
    if engine == "hf_liger":
        return _hf_liger(model, tokenizer, rows, common, count)
    return _dropforge(model, tokenizer, rows, common, packed=packed, count=count, stack=stack, length=length)


def _dataset(rows: list[list[int]], *, labels: bool = False) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": rows, **({"labels": rows} if labels else {})})


def _peft(path: Path, *, cuda: bool) -> tuple[Any, Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16 if cuda else torch.float32, attn_implementation="sdpa",
        **({"device_map": {"": 0}} if cuda else {}),
    )  # fmt: skip
    model.config.use_cache = False
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA)), AutoTokenizer.from_pretrained(path)


def _counted(trainer: Any, count: Callable[[int], None]) -> Any:
    inner = trainer.data_collator

    def collate(features: list[dict[str, Any]]) -> Any:
        count(sum(len(feature["input_ids"]) for feature in features))
        return inner(features)

    trainer.data_collator = collate
    return trainer


def _trl(model: Any, tokenizer: Any, rows: list[list[int]], common: dict[str, Any], count: Any, length: int) -> Any:
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(max_length=length, **common)
    trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=_dataset(rows), args=args)
    return _counted(trainer, count)


def _hf_liger(model: Any, tokenizer: Any, rows: list[list[int]], common: dict[str, Any], count: Any) -> Any:
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model.enable_input_require_grads()
    args = TrainingArguments(use_liger_kernel=True, **common)
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
    trainer = Trainer(model=model, args=args, train_dataset=_dataset(rows, labels=True), data_collator=collator)
    return _counted(trainer, count)


def _unsloth(
    path: Path, rows: list[list[int]], common: dict[str, Any], *, packed: bool, count: Any, length: int
) -> Any:
    from unsloth import FastLanguageModel  # noqa: I001  # it must come before what it patches
    import torch
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(path), max_seq_length=length, dtype=torch.bfloat16, load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(model, use_gradient_checkpointing="unsloth", random_state=3407, **LORA)
    args = SFTConfig(max_length=length, packing=packed, **common)
    trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=_dataset(rows), args=args)
    if not type(trainer).__name__.startswith("Unsloth"):
        raise RuntimeError(f"the trainer is {type(trainer).__name__}, not Unsloth's")
    return _counted(trainer, count)


def _dropforge(
    model: Any, tokenizer: Any, rows: list[list[int]], common: dict[str, Any], *, packed: bool, count: Any,
    stack: ExitStack, length: int,
) -> Any:  # fmt: skip
    from dropforge.fast_step.trainer import FastOptions, FastStepMixin
    from dropforge_kernels.patch.session import open_session
    from trl import SFTConfig, SFTTrainer

    class Counted(FastStepMixin, SFTTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            count(inputs.tokens)
            return super().training_step(model, inputs, num_items_in_batch)

    kernels = open_session(model)
    stack.callback(kernels.close)
    for line in kernels.report.lines():
        print(line, flush=True)
    args = SFTConfig(max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
                     **{**common, "gradient_checkpointing": False})  # fmt: skip
    fast = FastOptions(packing=packed or "auto", budget=length, rows_per_step=1 if packed else None)
    trainer = Counted(
        model=model, processing_class=tokenizer, train_dataset=_dataset(rows), args=args, fast=fast, kernels=kernels
    )
    if trainer.fast is None:
        raise RuntimeError(f"the fast step is off: {trainer.report.notes}")
    return trainer

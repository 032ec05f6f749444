"""Tiny random models, random documents, and trainers with and without the fast step."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # As in tests/kernels/conftest.py: must be set before the first import of dropforge_kernels.ops in this process.
    os.environ["TRITON_INTERPRET"] = "1"

SMALL = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture
def tiny() -> Callable[..., Any]:
    """tiny(family, lora=, dtype=, device=, **config): the same weights at every call."""

    def make(family: str = "qwen3", *, lora: bool = False, dropout: float = 0.0, dtype=torch.float32, device="cpu",
             **config) -> Any:  # fmt: skip
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(11)
        fields = {**SMALL, **({"head_dim": 16} if family == "qwen3" else {}), **config}
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields), dtype=dtype)
        model.config.use_cache = False
        if lora:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(
                model, LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules="all-linear",
                                  task_type="CAUSAL_LM"),
            )  # fmt: skip
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(std=0.05)
        return model.to(device)

    return make


@pytest.fixture
def documents() -> Callable[..., Any]:
    """documents(count, longest): a data set of random tokens, the first third of each not learnt."""

    def make(count: int = 50, longest: int = 60, seed: int = 0) -> Any:
        from datasets import Dataset

        rng = random.Random(seed)
        rows = [[rng.randrange(3, 97) for _ in range(rng.randrange(3, longest))] for _ in range(count)]
        labels = [[-100] * (len(row) // 3) + row[len(row) // 3 :] for row in rows]
        return Dataset.from_dict({"input_ids": rows, "labels": labels})

    return make


@pytest.fixture
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w3")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3"
    )


@pytest.fixture
def train(tmp_path: Path, tokenizer: Any) -> Callable[..., Any]:
    """train(model, dataset, fast=, kernels=, resume=, callbacks=, eval_dataset=, **arguments): the trainer, after it."""

    def run(model: Any, dataset: Any, *, fast: Any = None, kernels: Any = None, resume: Any = None,
            callbacks: Any = None, eval_dataset: Any = None, **arguments: Any) -> Any:  # fmt: skip
        from dropforge.fast_step.trainer import FastStepMixin
        from transformers import PrinterCallback, Trainer
        from trl import SFTConfig, SFTTrainer

        class Plain(SFTTrainer):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                inputs = {**inputs, "use_cache": False}
                return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

        class Fast(FastStepMixin, Plain):
            pass

        cuda = next(model.parameters()).is_cuda
        given = {
            "output_dir": str(tmp_path / "out"), "max_length": None, "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2, "max_steps": 10, "learning_rate": 3e-3, "optim": "adamw_torch",
            "logging_steps": 1, "save_strategy": "no", "seed": 5, "data_seed": 7, "gradient_checkpointing": False,
            "dataset_kwargs": {"skip_prepare_dataset": True}, "report_to": "none", "disable_tqdm": True,
            "bf16": False, "use_cpu": not cuda, "dataloader_pin_memory": False,
        }  # fmt: skip
        extra = {} if fast is None else {"fast": fast, "kernels": kernels}
        trainer: Any = (Plain if fast is None else Fast)(
            model=model, args=SFTConfig(**{**given, **arguments}), processing_class=tokenizer, train_dataset=dataset,
            eval_dataset=eval_dataset, callbacks=callbacks, **extra,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


class Bench:
    """A model on the GPU, its flat gradients, and steps of packed micro-batches."""

    def __init__(self, model, dataset, *, budget=2048, per_step=40, capture=True, layers=None) -> None:
        from dropforge.fast_step.flat import FlatParameters
        from dropforge.fast_step.report import FastReport
        from dropforge.fast_step.step import BucketStep
        from dropforge.packing.choose import choose_packing
        from dropforge.packing.feed import Feeder
        from dropforge.packing.rows import token_rows

        rows = token_rows(dataset)
        plan = choose_packing(rows, documents_per_step=per_step, per_micro=4, budget=budget, seed=1).plan
        self.feeder = Feeder(rows, plan, pad=0, pin=True)
        self.model = model
        self.flat = FlatParameters([[p for p in model.parameters() if p.requires_grad]])
        self.report = FastReport()
        self.loss_of = lambda inputs: self.model(**inputs).loss
        self.step = BucketStep(
            lambda inputs: self.loss_of(inputs), grads=self.flat.grads.values(), device=torch.device("cuda", 0),
            report=self.report, split=self.feeder.split, capture=capture, why_not="" if capture else "off",
            layers=layers,
        )  # fmt: skip

    def steps(self, count):
        """(loss, gradient) of each step."""
        out = []
        for number in range(count):
            batch = self.feeder.step(0, number)
            self.flat.zero_grad()
            self.step.begin()
            for micro in batch.micro:
                self.step.run(micro)
            torch.cuda.synchronize()
            out.append((float(self.step.loss), next(iter(self.flat.grads.values())).clone()))
        self.feeder.close()
        return out


@pytest.fixture
def new_bench() -> type[Bench]:
    """new_bench(model, dataset, budget=, per_step=, capture=, layers=); ``steps(count)`` runs optimizer steps."""
    return Bench

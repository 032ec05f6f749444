"""The same with transformers' own loading: TRL's trainer and a PEFT config, and this library's kernels in the model.

    python examples/python/plain_trl.py --model Qwen/Qwen3-0.6B

Two lines are ours: the import of the trainer, which also takes TRL's own arguments, and `with patched(model)`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from dropforge.trainers import SFTConfig, SFTTrainer
from dropforge_kernels.patch.session import patched
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

DATA = Path(__file__).resolve().parents[1] / "elements" / "elements.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description="a plain TRL script on the kernels")
    parser.add_argument("--model", help="hub id or folder; left out: a tiny random model")
    parser.add_argument("--max-steps", type=int, default=60)
    parser.add_argument("--output", default="elements-adapter", help="folder of the adapter")
    asked = parser.parse_args()

    folder = asked.model or tiny_model()
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="auto" if asked.model else None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))

    with patched(model) as report:  # leaving the block restores the model
        print(*report.lines(), sep="\n")
        trainer = SFTTrainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=load_dataset("json", data_files=str(DATA), split="train"),
            args=SFTConfig(
                output_dir=f"{asked.output}-checkpoints", max_length=512, max_steps=asked.max_steps,
                per_device_train_batch_size=8, learning_rate=2e-4, logging_steps=min(10, asked.max_steps),
                save_strategy="no", report_to="none",
            ),
        )  # fmt: skip
        trainer.train()
    model.save_pretrained(asked.output)


def tiny_model() -> str:
    """The folder of builtin:tiny-llama, made where the data root is."""
    from dropforge.models.source import resolve_model
    from dropforge.paths import DataRoot
    from dropforge.settings import settings
    from dropforge.spec import ModelSpec

    return str(resolve_model(ModelSpec(id="builtin:tiny-llama"), root=DataRoot(settings().data_root)).path)


if __name__ == "__main__":
    main()

"""Two processes with two micro-batches each take the same step as one process with all rows at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import torch
from datasets import Dataset
from dropforge import FastLanguageModel
from dropforge.trainers import SFTConfig, SFTTrainer

texts = [f"{n} " + "tale of a cat and a dog " * (n % 7) + "end." for n in range(24)]
model, tokenizer = FastLanguageModel.from_pretrained("builtin:tiny-llama", 128, load_in_16bit=True)
model = FastLanguageModel.get_peft_model(model, r=4, target_modules=["q_proj", "down_proj"], use_gradient_checkpointing=False)
ranks = int(os.environ.get("WORLD_SIZE", 1))
config = SFTConfig(output_dir="out", report_to="none", save_strategy="no", logging_steps=1, seed=11, learning_rate=1e-2,
                   lr_scheduler_type="constant", max_grad_norm=0.0, max_steps=2, optim="sgd", use_cpu=True,
                   per_device_train_batch_size=12 if ranks == 1 else 3, gradient_accumulation_steps=1 if ranks == 1 else 2)
trainer = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=Dataset.from_dict({"text": texts}), args=config)
trainer.train()
if trainer.is_world_process_zero():
    total = {name: p.double().sum().item() for name, p in model.named_parameters() if p.requires_grad}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    json.dump({"weights": total, "losses": losses, "ranks": trainer.args.world_size}, open(sys.argv[1], "w"))
"""


@pytest.mark.slow
def test_ranks_share_the_count_of_tokens(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    answers = []
    for number, launch in enumerate(([], torchrun)):
        out = tmp_path / f"{number}.json"
        done = subprocess.run(
            [sys.executable, *launch, str(script), str(out)], capture_output=True, text=True, cwd=tmp_path, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        answers.append(json.loads(Path(out).read_text()))
    one, two = answers
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    for name, value in one["weights"].items():
        assert two["weights"][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name

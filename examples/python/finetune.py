"""LoRA on the chemical elements (examples/elements): load, adapt, train on the answers, ask, save as one model.

python examples/python/finetune.py                                     # a tiny model, on a CPU: about a minute
python examples/python/finetune.py --model Qwen/Qwen3-0.6B --4bit      # on a GPU
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import load_dataset
from dropforge import FastLanguageModel, model_report
from dropforge.trainers import SFTConfig, SFTTrainer

DATA = Path(__file__).resolve().parents[1] / "elements" / "elements.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description="LoRA fine-tuning with the Python API")
    parser.add_argument("--model", default="builtin:tiny-llama", help="hub id or folder")
    parser.add_argument("--4bit", action="store_true", dest="four_bit", help="hold the weights as NF4")
    parser.add_argument("--max-steps", type=int, default=60)
    parser.add_argument("--output", default="elements-model", help="folder of the finished model")
    asked = parser.parse_args()

    model, tokenizer = FastLanguageModel.from_pretrained(asked.model, max_seq_length=512, load_in_4bit=asked.four_bit)
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
    print(*model_report(model), sep="\n")

    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=load_dataset("json", data_files=str(DATA), split="train"),  # a column `messages`
        args=SFTConfig(
            output_dir=f"{asked.output}-checkpoints",
            assistant_only_loss=True,  # the questions are read, the answers are learnt
            max_steps=asked.max_steps,
            per_device_train_batch_size=8,
            learning_rate=2e-4,
            warmup_steps=5,
            logging_steps=min(10, asked.max_steps),
            save_strategy="no",
            report_to="none",
        ),
    )
    trainer.train()

    FastLanguageModel.for_inference(model)
    question = [{"role": "user", "content": "What is the chemical symbol of gold?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt.to(model.device), max_new_tokens=16)
    print(tokenizer.decode(answer[0][prompt["input_ids"].shape[1] :], skip_special_tokens=True))

    model.save_pretrained_merged(asked.output, tokenizer)
    print(f"saved in {asked.output}")


if __name__ == "__main__":
    main()

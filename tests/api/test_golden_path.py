"""The script people bring: written for the established API, with its import lines (and names on the hub) changed."""

from __future__ import annotations

import math

import pytest
import torch


# bitsandbytes looks for Hugging Face's optional package of CPU kernels and says that it is not there.
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_causal_lm_golden_path(rows, tmp_path):
    from dropforge import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name = "builtin:tiny-llama",
        max_seq_length = 2048,
        dtype = None,
        load_in_4bit = True,
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(
        model,
        r = 16,
        lora_alpha = 16,
        lora_dropout = 0,
        bias = "none",
        target_modules = ["q_proj","k_proj","v_proj","o_proj",
                          "gate_proj","up_proj","down_proj"],
        use_gradient_checkpointing = "unsloth",
        random_state = 3407,
    )  # fmt: skip
    from datasets import Dataset
    from dropforge.chat_templates import get_chat_template, standardize_sharegpt

    tokenizer = get_chat_template(tokenizer, chat_template="llama-3.1")
    ds = Dataset.from_list(rows)
    ds = standardize_sharegpt(ds)

    def format(examples):
        texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=False)
                 for c in examples["conversations"]]  # fmt: skip
        return {"text": texts}

    ds = ds.map(format, batched=True)
    from dropforge.trainers import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model = model, tokenizer = tokenizer, train_dataset = ds,
        dataset_text_field = "text", max_seq_length = 2048, packing = False,
        args = SFTConfig(
            per_device_train_batch_size = 2,
            gradient_accumulation_steps = 4,
            warmup_steps = 1,
            max_steps = 3,
            learning_rate = 2e-3,
            optim = "adamw_8bit",
            weight_decay = 0.001,
            lr_scheduler_type = "linear",
            seed = 3407,
            output_dir = "outputs",
            logging_steps = 1,
            report_to = "none",
        ),
    )  # fmt: skip
    from dropforge.chat_templates import train_on_responses_only

    trainer = train_on_responses_only(
        trainer,
        instruction_part = "<|start_header_id|>user<|end_header_id|>\n\n",
        response_part = "<|start_header_id|>assistant<|end_header_id|>\n\n",
    )  # fmt: skip
    answers = [tokenizer.decode([label for label in row["labels"] if label != -100]) for row in trainer.train_dataset]
    assert sorted(answers)[0].rstrip("\n") == "It is Lima.<|im_end|>"
    first = tokenizer.decode(trainer.train_dataset[0]["input_ids"])
    assert first.count("<s>") == 1 and first.count("<|im_end|>") == 3  # system, question, answer

    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    changed = [name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])]
    assert len(changed) == len(before)

    FastLanguageModel.for_inference(model)
    assert not model.training and tokenizer.padding_side == "left"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Capital of Peru?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert model.generate(**prompt, max_new_tokens=2).shape[1] > prompt["input_ids"].shape[1]

    model.save_pretrained("out_lora")
    tokenizer.save_pretrained("out_lora")
    again, _ = FastLanguageModel.from_pretrained("out_lora", load_in_4bit=True)
    trained = dict(model.named_parameters())
    pairs = [(p, trained[name]) for name, p in again.named_parameters() if "lora_" in name]
    assert pairs and all(p.requires_grad and torch.equal(p, other) for p, other in pairs)

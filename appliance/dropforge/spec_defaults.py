"""Fill in every default that depends on other fields, so that spec.resolved.yaml alone repeats a run.

Values are the recommended hyperparameters of the LoRA literature as practised (rank 16, alpha = rank, 2e-4 for SFT).
"""

from __future__ import annotations

from dropforge.spec import Spec

PREFERENCE = {"dpo", "orpo", "kto", "simpo", "reward"}
ONLINE_RL = {"grpo", "dr_grpo", "dapo", "bnpo", "gspo", "rloo", "ppo"}


def resolve(spec: Spec) -> Spec:
    """The same job with no field left open. Idempotent: `resolve(resolve(s)) == resolve(s)`."""
    adapter, train = spec.adapter, spec.train
    rate = train.learning_rate or default_learning_rate(spec)
    batch = _batch(spec)
    filled_train = train.model_copy(
        update={
            "num_train_epochs": train.num_train_epochs if train.num_train_epochs or train.max_steps else 1.0,
            "learning_rate": rate,
            "embedding_learning_rate": train.embedding_learning_rate or _embedding_rate(spec, rate),
            "warmup_ratio": 0.05 if train.warmup_ratio is None and train.warmup_steps is None else train.warmup_ratio,
            **batch,
        }
    )
    filled_adapter = adapter.model_copy(update={"lora_alpha": adapter.lora_alpha or adapter.r})
    data = spec.data
    if spec.method == "cpt" and "train_on" not in data.model_fields_set:
        data = data.model_copy(update={"train_on": "everything"})
    return spec.model_copy(update={"train": filled_train, "adapter": filled_adapter, "data": data})


def default_learning_rate(spec: Spec) -> float:
    """Peak learning rate by method; full fine-tuning takes a tenth of the LoRA rate."""
    if spec.method in ONLINE_RL or spec.method in PREFERENCE:
        rate = 5e-6
    elif spec.method == "cpt":
        rate = 5e-5
    elif spec.method in {"embedding", "reranker", "classifier"}:
        rate = 2e-5
    else:
        rate = 2e-4
    return rate / 10 if spec.adapter.type == "full" and rate > 2e-5 else rate


def _embedding_rate(spec: Spec, rate: float) -> float | None:
    """Continued pretraining that trains embeddings beside LoRA: a tenth. Full fine-tuning learns at one rate."""
    return rate / 10 if spec.method == "cpt" and spec.adapter.type == "lora" and spec.trains_embeddings else None


def _batch(spec: Spec) -> dict[str, int]:
    """All three batch numbers, consistent with each other (one device)."""
    train = spec.train
    micro, steps, batch = (
        train.per_device_train_batch_size,
        train.gradient_accumulation_steps,
        train.effective_batch_size,
    )
    if micro and steps:
        return {
            "effective_batch_size": micro * steps,
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": steps,
        }
    batch = batch or (micro or 1) * (steps or 1) * (1 if micro or steps else 16)
    if micro is None:
        micro = batch // steps if steps else next(m for m in (8, 4, 2, 1) if batch % m == 0)
    return {
        "effective_batch_size": batch,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": batch // micro,
    }

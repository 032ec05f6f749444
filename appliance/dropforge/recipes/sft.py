"""Supervised fine-tuning and continued pretraining.

Loss: next-token cross-entropy over the labels that are not -100, averaged over all counted tokens of an optimizer step
(so gradient accumulation equals the large batch). sft counts the assistant's turns, cpt every token.
"""

from __future__ import annotations

from dropforge.recipes.inputs import TrainingInputs
from dropforge.trl_adapter import TrainingSummary, train_sft


def train(inputs: TrainingInputs) -> TrainingSummary:
    """Train to the end of the spec, or from the newest good checkpoint on. Errors: see trl_adapter.train_sft."""
    return train_sft(
        inputs.model,
        inputs.tokenizer,
        train=inputs.spec.train,
        plan=inputs.plan,
        dataset=inputs.data.train,
        eval_dataset=inputs.data.eval,
        trained_tokens=inputs.data.report.trained_tokens,
        store=inputs.store,
        log=inputs.log,
        stop=inputs.stop,
        packing=inputs.spec.data.packing,
        kernels=inputs.kernels,
    )

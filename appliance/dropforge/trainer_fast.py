"""Which trainings through ``dropforge.trainers`` take the fast step (dropforge.fast_step), and how it packs."""

from __future__ import annotations

import logging
from typing import Any

from dropforge.fast_state import ModelState
from dropforge.fast_step.isolation import packing_obstacle
from dropforge.fast_step.obstacles import fast_obstacle, has_dropout
from dropforge.fast_step.trainer import FastOptions

LOG = logging.getLogger("dropforge")


def fast_options(
    fast: FastOptions | bool, *, config: Any, model: Any, dataset: Any, state: ModelState | None
) -> FastOptions | None:
    """The options to train with, or None for the trainer's own step. Amends `config`.

    True means: for a model that this library loaded, on a GPU; and on a CPU where rows are packed, since documents are
    then alone in their rows whatever the attention. Where TRL was asked to pack, our packing takes its place: as many
    rows per step, of the same length.
    """
    if state is not None:
        # Without dropout nothing random is computed again, and asking for the random state would forbid CUDA graphs.
        kwargs = {"use_reentrant": False, "preserve_rng_state": has_dropout(model)}
        config.gradient_checkpointing_kwargs = kwargs
    wanted = state is not None and (config.packing or config.device.type == "cuda")
    if fast is False or (fast is True and not wanted):
        return None
    chosen = FastOptions() if fast is True else fast
    if not config.packing:
        return chosen
    reason = fast_obstacle(config, model, dataset) or packing_obstacle(model)
    if reason:
        LOG.warning("TRL packs the rows, and its own step trains them: %s", reason)
        return None
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    config.packing = False
    return FastOptions(packing=True, budget=config.max_length, rows_per_step=rows, capture=chosen.capture)

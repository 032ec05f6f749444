"""Which trainings through ``dropforge.trainers`` take the fast step (dropforge.fast_step), and how it packs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from dropforge.fast.state import ModelState
from dropforge.fast_step.isolation import packing_obstacle
from dropforge.fast_step.obstacles import fast_obstacle, has_dropout
from dropforge.fast_step.options import FastOptions

LOG = logging.getLogger("dropforge")


OWN_STEP = ("compute_loss", "training_step", "get_train_dataloader", "get_batch_samples", "create_optimizer")
"""Methods of a trainer that the fast step goes around: a subclass that has its own keeps the plain step."""
OWN_PARTS = {
    "data_collator": "the script has its own data collator",
    "compute_loss_func": "the script has its own loss",
    "optimizer_cls_and_kwargs": "the script has its own optimizer",
}


def own_parts(trainer: type, library: type, given: Mapping[str, Any]) -> str:
    """What of the script's own the fast step would pass over, in words; empty when nothing is.

    trainer: the class made; library: ours. given: the trainer's further arguments.
    """
    for name in OWN_STEP:
        if getattr(trainer, name) is not getattr(library, name):
            return f"{trainer.__name__} has its own {name}"
    for name, reason in OWN_PARTS.items():
        if given.get(name) is not None:
            return reason
    optimizers = given.get("optimizers") or (None, None)
    return OWN_PARTS["optimizer_cls_and_kwargs"] if optimizers[0] is not None else ""


def fast_options(
    fast: FastOptions | bool, *, config: Any, model: Any, dataset: Any, state: ModelState | None, own: str = ""
) -> FastOptions | None:
    """The options to train with, or None for the trainer's own step. Amends `config`.

    True means: for a model that this library loaded, on a GPU; and on a CPU where rows are packed, since documents are
    then alone in their rows whatever the attention. Where TRL was asked to pack, our packing takes its place: as many
    rows per step, of the same length. own: see ``own_parts``; the plain step trains then, and the log says why.
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
        if own:
            LOG.warning("TRL's own step trains: %s", own)
        return None if own else chosen
    reason = own or fast_obstacle(config, model, dataset) or packing_obstacle(model)
    if reason:
        LOG.warning("TRL packs the rows, and its own step trains them: %s", reason)
        return None
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    config.packing = False
    return FastOptions(packing=True, budget=config.max_length, rows_per_step=rows, capture=chosen.capture,
                       compile=chosen.compile)  # fmt: skip

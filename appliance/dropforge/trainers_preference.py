"""TRL's preference trainers under older names and places of arguments: DPO, KTO, ORPO, CPO (and SimPO, its loss)."""

from __future__ import annotations

import warnings
from typing import Any

import trl
from peft import PeftModel
from transformers import TrainingArguments as PlainTrainingArguments

from dropforge.fast.modes import to_training
from dropforge.fast.state import state_of
from dropforge.parameter_groups import EmbeddingRateMixin
from dropforge.plain_head import add_plain_head
from dropforge.trainer_arguments import OlderNames, as_config, fit_to_model, split_moved, with_moved
from dropforge.trainer_checks import check_trainable
from dropforge.trainers import RunRecord

with warnings.catch_warnings():
    # Everything in trl.experimental says so at import; the versions are pinned.
    warnings.simplefilter("ignore")
    from trl.experimental.cpo import CPOConfig as PlainCPOConfig
    from trl.experimental.cpo import CPOTrainer as PlainCPOTrainer
    from trl.experimental.orpo import ORPOConfig as PlainORPOConfig
    from trl.experimental.orpo import ORPOTrainer as PlainORPOTrainer


class DPOConfig(OlderNames, trl.DPOConfig):
    """trl.DPOConfig with older names, see OlderNames."""


class KTOConfig(OlderNames, trl.KTOConfig):
    """trl.KTOConfig with older names, see OlderNames."""


class ORPOConfig(OlderNames, PlainORPOConfig):
    """TRL's ORPOConfig with older names, see OlderNames."""


class CPOConfig(OlderNames, PlainCPOConfig):
    """TRL's CPOConfig with older names, see OlderNames. loss_type="simpo" is SimPO."""


class _Older(RunRecord, EmbeddingRateMixin):
    """Mixin before a preference trainer: `tokenizer`, and config fields given to the trainer."""

    _plain: type
    _config: type

    def __init__(
        self, model: Any, ref_model: Any = None, args: PlainTrainingArguments | None = None, *, tokenizer: Any = None,
        processing_class: Any = None, **others: Any,
    ) -> None:  # fmt: skip
        stay, moved = split_moved(self._plain, self._config, others)
        state = state_of(model)
        config = fit_to_model(with_moved(as_config(args, self._config), moved), state)
        check_trainable(model, state)
        if state is not None:
            to_training(model)
        if ref_model is not None:
            stay["ref_model"] = ref_model
        super().__init__(  # type: ignore[call-arg]
            model=model, args=config, processing_class=processing_class or tokenizer or (state and state.tokenizer),
            **stay,
        )  # fmt: skip
        if config.use_cpu:
            own: Any = self
            for made in (own.model, getattr(own, "ref_model", None)):
                if made is not None:
                    add_plain_head(made.get_base_model() if isinstance(made, PeftModel) else made)


class DPOTrainer(_Older, trl.DPOTrainer):
    """trl.DPOTrainer with older names and places. ref_model=None: the model without its adapter is the reference."""

    _plain, _config = trl.DPOTrainer, DPOConfig


class KTOTrainer(_Older, trl.KTOTrainer):
    """trl.KTOTrainer with older names and places. ref_model=None: the model without its adapter is the reference."""

    _plain, _config = trl.KTOTrainer, KTOConfig


class ORPOTrainer(_Older, PlainORPOTrainer):
    """TRL's ORPOTrainer with older names and places; it needs no reference."""

    _plain, _config = PlainORPOTrainer, ORPOConfig


class CPOTrainer(_Older, PlainCPOTrainer):
    """TRL's CPOTrainer with older names and places; it needs no reference."""

    _plain, _config = PlainCPOTrainer, CPOConfig


def PatchDPOTrainer() -> None:  # noqa: N802  (the name that scripts call)
    """Nothing to do: DPOTrainer of this module is ready as it is. Kept so that scripts port by their import lines."""

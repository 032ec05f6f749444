"""What can be seen to be wrong before a trainer is made: nothing that can be trained, no rows, no column to read."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sized
from typing import Any

from dropforge.errors import CommandError, DataError
from dropforge.fast.state import ModelState, held

LOG = logging.getLogger("dropforge")
READ = ("input_ids", "messages", "conversations", "prompt", "completion", "images", "image")
"""Columns that TRL's SFTTrainer reads by their names, beside the one of texts."""


def check_trainable(model: Any, state: ModelState | None) -> None:
    """A loaded model must have an adapter or be meant to be trained whole.

    Raises CommandError api-no-adapter for quantised weights without one; a model that is trained whole without having
    been asked to gets a log line.
    """
    from peft import PeftModel

    if state is None or state.full_finetuning or isinstance(model, PeftModel):
        return
    if getattr(model.config, "quantization_config", None) is not None:
        raise CommandError(
            f"this model is held as {held(model)} and has no adapter, so nothing in it can be trained",
            code="api-no-adapter", where="model",
            fix="call model = FastLanguageModel.get_peft_model(model), or load it with full_finetuning=True",
        )  # fmt: skip
    LOG.warning(
        "every weight of the model is trained, in %s: get_peft_model was not called, nor full_finetuning=True given",
        held(model),
    )


def check_rows(dataset: Any, config: Any, *, argument: str) -> None:
    """A data set must have rows and a column to train on; streams and rows that the script prepares are not looked at.

    Raises DataError: api-no-rows, api-no-column.
    """
    if isinstance(dataset, dict):
        for name, part in dataset.items():
            check_rows(part, config, argument=f"{argument}[{name!r}]")
        return
    columns = getattr(dataset, "column_names", None)
    if not isinstance(columns, list) or (config.dataset_kwargs or {}).get("skip_prepare_dataset"):
        return
    if isinstance(dataset, Sized) and len(dataset) == 0:
        raise DataError(
            f"{argument} has no rows", code="api-no-rows", where=argument, fix="look at what filter() or select() left"
        )
    field = config.dataset_text_field
    if field in columns or any(name in columns for name in READ):
        return
    near = difflib.get_close_matches(field, columns, n=1)
    raise DataError(
        f"{argument} has no column {field!r}", code="api-no-column", where=f"{argument}, dataset_text_field",
        why=f"its columns are {', '.join(columns)}",
        fix=f"give dataset_text_field={near[0]!r}" if near
        else "name the column of texts in dataset_text_field, or write the texts with formatting_func or map()",
    )  # fmt: skip

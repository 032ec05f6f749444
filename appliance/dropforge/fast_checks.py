"""What FastLanguageModel refuses, each by the name of its argument; nothing here loads a weight."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropforge.errors import CommandError, ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn

DTYPES = ("bfloat16", "float16", "float32")


def check_precision(flags: Mapping[str, bool]) -> None:
    """At most one way to hold the weights. `flags`: argument name -> its value."""
    chosen = [name for name, value in flags.items() if value]
    if len(chosen) > 1:
        raise CommandError(
            f"{' and '.join(chosen)} cannot be used together",
            code="api-two-precisions",
            where=", ".join(chosen),
            why="each of them decides how the weights are held, and full fine-tuning trains them in 16 or 32 bits",
            fix="set only one of them to True",
        )


def check_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """None (decide by the hardware), a torch dtype, or its name."""
    import torch

    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise CommandError(
            f"dtype cannot be {dtype!r}", code="api-dtype", where="dtype",
            fix=f"None chooses by the hardware; else one of {', '.join(DTYPES)}",
        )  # fmt: skip
    return getattr(torch, name)  # type: ignore[no-any-return]


def check_length(config: Any, *, max_seq_length: int, rope_scaling: Mapping[str, Any] | None) -> None:
    """`max_seq_length` must lie within what the model was made for, unless its positions are scaled."""
    if max_seq_length < 1:
        raise CommandError(
            f"max_seq_length must be at least 1, not {max_seq_length}", code="api-length", where="max_seq_length"
        )
    known = getattr(config, "max_position_embeddings", None)
    if known is None or max_seq_length <= known or rope_scaling is not None:
        return
    factor = max_seq_length / known
    raise CommandError(
        f"max_seq_length={max_seq_length} is more than the {known} positions this model knows",
        code="api-length",
        where="max_seq_length",
        why="positions it never saw come out as noise unless the rotary embedding is scaled",
        fix=f"use max_seq_length={known}, or pass rope_scaling={{'rope_type': 'linear', 'factor': {factor:g}}}",
    )


def check_modules(model: nn.Module, *, argument: str, names: str | Iterable[str] | None) -> None:
    """Every name must be the last part of some module's path."""
    if names is None or isinstance(names, str):
        return
    known = {path.rsplit(".", 1)[-1] for path, module in model.named_modules() if path and not any(module.children())}
    paths = {path for path, _ in model.named_modules()}
    for name in names:
        if name in known or any(path == name or path.endswith(f".{name}") for path in paths):
            continue
        near = difflib.get_close_matches(name, sorted(known), n=1)
        raise ModelError(
            f"{argument}: this model has no module {name!r}",
            code="adapter-target-unknown",
            where=argument,
            why=f"its modules are {', '.join(sorted(known))}",
            fix=f"did you mean {near[0]!r}?" if near else "use 'all-linear', or names from that list",
        )


def check_same_architecture(adapter: Mapping[str, Any], *, folder: Path, model: nn.Module) -> None:
    """An adapter's targets must exist in the base it is put on."""
    targets = adapter.get("target_modules")
    if isinstance(targets, list):
        check_modules(model, argument=f"target_modules of {folder.name}/adapter_config.json", names=targets)

"""What FastLanguageModel refuses, each by the name of its argument; nothing here loads a weight."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dropforge.errors import CommandError, ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn

KERNEL_POLICIES = ("auto", "required", "off")
BIASES = ("none", "all", "lora_only")
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


def check_modules(model: nn.Module, *, argument: str, names: str | Iterable[str] | None, fix: str = "") -> None:
    """Every name must be the last part of some module's path; a text must match a whole path, or be "all-linear"."""
    if names is None or names == "all-linear":
        return
    known = {path.rsplit(".", 1)[-1] for path, module in model.named_modules() if path and not any(module.children())}
    paths = {path for path, _ in model.named_modules()}
    if isinstance(names, str):
        _check_pattern(names, paths, known=known, argument=argument)
        return
    for name in names:
        if name in known or any(path == name or path.endswith(f".{name}") for path in paths):
            continue
        near = difflib.get_close_matches(name, sorted(known), n=1)
        raise ModelError(
            f"{argument}: this model has no module {name!r}",
            code="adapter-target-unknown",
            where=argument,
            why=f"its modules are {', '.join(sorted(known))}",
            fix=fix or (f"did you mean {near[0]!r}?" if near else _choices(argument)),
        )


def _check_pattern(pattern: str, paths: set[str], *, known: set[str], argument: str) -> None:
    try:
        if any(re.fullmatch(pattern, path) for path in paths):
            return
        why = "as one text it is an expression for whole paths such as model.layers.0.self_attn.q_proj"
    except re.error as error:
        why = f"it is no valid expression: {error}"
    near = difflib.get_close_matches(pattern, sorted(known), n=1)
    raise ModelError(
        f"{argument}: no module matches {pattern!r}", code="adapter-target-unknown", where=argument, why=why,
        fix=f"for the layers of that name write [{near[0]!r}], as a list" if near else _choices(argument),
    )  # fmt: skip


def check_name_patterns(model: nn.Module, *, argument: str, patterns: Iterable[str]) -> None:
    """Every pattern must match the end of some module's path, as PEFT matches rank_pattern, alpha_pattern and a list of
    exclude_modules. PEFT leaves out those that match nothing without a word."""
    paths = [path for path, _ in model.named_modules() if path]
    for pattern in patterns:
        try:
            if any(re.match(rf"(.*\.)?({pattern})$", path) for path in paths):
                continue
            why = "PEFT would pass over it without a word"
        except re.error as error:
            why = f"it is no valid expression: {error}"
        leaves = sorted({path.rsplit(".", 1)[-1] for path in paths})
        near = difflib.get_close_matches(pattern.rsplit(".", 1)[-1], leaves, n=1)
        raise ModelError(
            f"{argument}: no module of this model matches {pattern!r}", code="adapter-target-unknown", where=argument,
            why=why, fix=f"did you mean {near[0]!r}?" if near else "use the end of a module's path, such as 'q_proj'",
        )  # fmt: skip


def _choices(argument: str) -> str:
    return "use names from that list" + (", or 'all-linear'" if argument.endswith("target_modules") else "")


def check_lora(*, r: int, lora_alpha: float, lora_dropout: float, bias: str) -> None:
    """The numbers of an adapter, before PEFT touches the model. Raises CommandError api-lora."""
    numbers = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout}
    fixes = {
        "r": (_is_number(r) and r == int(r) and r > 0, "a whole number of at least 1, such as 16"),
        "lora_alpha": (_is_number(lora_alpha) and lora_alpha > 0, "a number above 0, such as r or 2 * r"),
        "lora_dropout": (_is_number(lora_dropout) and 0 <= lora_dropout < 1, "a number from 0 to less than 1"),
    }
    for name, (good, fix) in fixes.items():
        if not good:
            raise CommandError(f"{name} cannot be {numbers[name]!r}", code="api-lora", where=name, fix=f"write {fix}")
    if bias not in BIASES:
        raise CommandError(
            f"bias cannot be {bias!r}", code="api-lora", where="bias", fix=f"one of {', '.join(BIASES)}"
        )  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_kernels(kernels: str) -> None:
    """One of the policies of dropforge_kernels.patch."""
    if kernels not in KERNEL_POLICIES:
        raise CommandError(
            f"kernels cannot be {kernels!r}", code="api-kernels", where="kernels",
            fix=f"one of {', '.join(KERNEL_POLICIES)}",
        )  # fmt: skip


def check_stored_precision(config: Any, flags: Mapping[str, bool], load_in_4bit: bool | None) -> None:
    """A checkpoint that is stored quantised stays so: no other precision can be asked of it."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return
    fields = stored if isinstance(stored, dict) else stored.to_dict()
    method = str(getattr(fields.get("quant_method"), "value", fields.get("quant_method")))
    own = {"bitsandbytes": "load_in_4bit" if fields.get("load_in_4bit") else "load_in_8bit"}.get(method, method)
    wrong = [name for name, value in flags.items() if value and name != own]
    if not wrong:
        return
    raise CommandError(
        f"{wrong[0]} does not fit this checkpoint, which is stored as {own.removeprefix('load_in_')}",
        code="api-two-precisions", where=wrong[0],
        why="quantised weights cannot be turned back into those they were made from",
        fix="leave the precision out" + ("" if load_in_4bit else ", or name the model it was made from"),
    )  # fmt: skip


def check_offload(config: Any, *, trained: str = "") -> None:
    """offload_embedding takes a frozen table that is not the head as well. trained: the argument that trains it.

    Raises CommandError api-offload-embedding.
    """
    why = f"{trained} trains the embedding, and its gradient would have to go to host memory in every step"
    if getattr(config, "tie_word_embeddings", False):
        why = "the head is the embedding's own matrix, which the GPU needs for the loss"
    elif not trained:
        return
    raise CommandError(
        "this model's embedding cannot be held in host memory", code="api-offload-embedding",
        where="offload_embedding", why=why, fix="leave offload_embedding out",
    )  # fmt: skip


def check_layers(config: Any, *, layers: int | Iterable[int] | None, argument: str) -> list[int] | None:
    """Indices of decoder layers, each of which must exist. PEFT would leave the others out without a word."""
    if layers is None:
        return None
    chosen = [layers] if isinstance(layers, int) else list(layers)
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    wrong = [index for index in chosen if count is not None and not 0 <= index < count]
    if wrong or not chosen:
        raise CommandError(
            f"{argument}: there is no layer {wrong[0]}" if wrong else f"{argument} names no layer", code="api-layers",
            where=argument, fix=f"use indices from 0 to {count - 1}" if count else "leave it out for all layers",
        )  # fmt: skip
    return chosen

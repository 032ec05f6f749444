"""New tokens for a vocabulary, with embeddings that start where the model already has meaning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from dropforge.errors import CommandError
from dropforge.models.drawn_rows import vocabulary_tables

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def add_new_tokens(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: Sequence[str],
    *,
    method: Literal["mean", "interpolation"] = "mean",
    interpolation: float = 0.5,
) -> int:
    """Grow vocabulary and embedding by `new_tokens`; returns how many were not there before.

    Call it before LoRA is attached, and train `embed_tokens` and `lm_head` (`modules_to_save`), or the new rows stay as
    they start.

    Args:
        method: `mean` starts every new row as the mean of all rows; `interpolation` as
            `interpolation * mean of all + (1 - interpolation) * mean of the rows of the pieces the text had before`.
            (Hewitt 2021, "Initializing new word embeddings for pretrained language models".)

    Raises CommandError api-new-tokens for a model with adapters, or with quantised embeddings.
    """
    import torch

    _check(new_tokens, method)
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise CommandError(
            "new tokens cannot be added to a model that has adapters", code="api-new-tokens", where="model",
            fix="call add_new_tokens before get_peft_model",
        )  # fmt: skip
    fresh = [token for token in dict.fromkeys(new_tokens) if token not in tokenizer.get_vocab()]
    if not fresh:
        return 0
    pieces: list[list[int]] = [list(tokenizer(token, add_special_tokens=False)["input_ids"]) for token in fresh]
    tokenizer.add_tokens(fresh)
    with torch.no_grad():
        tables = _tables(model)
        used = min(table.shape[0] for table in tables)
        starts = [_starts(table, pieces, method=method, interpolation=interpolation) for table in tables]
        if len(tokenizer) > used:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        first = tokenizer.get_vocab()[fresh[0]]
        for table, rows in zip(_tables(model), starts, strict=True):
            table[first : first + len(fresh)] = rows
    return len(fresh)


def _check(new_tokens: Sequence[str], method: str) -> None:
    if isinstance(new_tokens, str):
        raise CommandError(
            "new_tokens is one text, and would be added letter by letter", code="api-new-tokens", where="new_tokens",
            fix=f"write a list: [{new_tokens!r}]",
        )  # fmt: skip
    if method not in ("mean", "interpolation"):
        raise CommandError(
            f"method cannot be {method!r}", code="api-new-tokens", where="method", fix="one of mean, interpolation"
        )


def _tables(model: Any) -> list[Any]:
    """The vocabulary's tables. Raises CommandError api-new-tokens for quantised ones."""
    found = vocabulary_tables(model)
    if not all(table.is_floating_point() for table in found):
        raise CommandError(
            "new tokens cannot be added to quantised embeddings", code="api-new-tokens", where="model",
            fix="load the model without quantising embed_tokens and lm_head",
        )  # fmt: skip
    return found


def _starts(table: Any, pieces: Sequence[Sequence[int]], *, method: str, interpolation: float) -> Any:
    """(len(pieces), width) rows to start from, computed in float32."""
    import torch

    mean = table.detach().float().mean(dim=0)
    rows = []
    for ids in pieces:
        own = table.detach()[list(ids)].float().mean(dim=0) if ids else mean
        rows.append(mean if method == "mean" else interpolation * mean + (1 - interpolation) * own)
    return torch.stack(rows).to(table.dtype)

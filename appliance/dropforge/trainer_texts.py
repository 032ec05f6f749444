"""Rows as token ids: texts with one begin and one end token each, conversations with the answers as labels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any


def formatted(dataset: Any, formatting_func: Callable[[Any], Any], config: Any) -> Any:
    """A data set, or each one in a dictionary, with what the function writes as its column of texts.

    The function gets one row and returns its text, or in the older way gets a batch, a list per column, and returns a
    list of texts; which of them is found out by the first row. Streams are left to TRL.
    """
    if isinstance(dataset, dict):
        return {name: formatted(part, formatting_func, config) for name, part in dataset.items()}
    columns = getattr(dataset, "column_names", None)
    if not can_format(dataset):
        return dataset
    field, batched = config.dataset_text_field, _takes_batches(formatting_func, dataset)
    return dataset.map(
        lambda rows: {field: formatting_func(rows)}, batched=batched, remove_columns=columns,
        num_proc=config.dataset_num_proc, desc="texts",
    )  # fmt: skip


def _takes_batches(formatting_func: Callable[[Any], Any], dataset: Any) -> bool:
    wrong = (AttributeError, LookupError, TypeError, ValueError)  # what a function says to rows of the other kind
    try:
        return isinstance(formatting_func(dataset[0]), list)
    except wrong:
        with suppress(*wrong):
            if isinstance(formatting_func(dataset[:1]), list):
                return True
        raise


def can_format(dataset: Any) -> bool:
    """Whether ``formatted`` changes this data set: it is there in full and has a row."""
    from datasets import Dataset

    return isinstance(dataset, Dataset) and len(dataset) > 0


def prepared(dataset: Any, tokenizer: Any, config: Any) -> Any:
    """``answers_of`` and ``tokenised`` of a data set, or of each one in a dictionary."""
    if isinstance(dataset, dict):
        return {name: prepared(part, tokenizer, config) for name, part in dataset.items()}
    return tokenised(answers_of(dataset, tokenizer, config), tokenizer, config)


def answers_of(dataset: Any, tokenizer: Any, config: Any) -> Any:
    """Conversations with `assistant_only_loss` as input_ids and labels; other data sets as they are. Amends `config`.

    TRL needs {% generation %} marks in the chat template for that; here the answers are found by how the template
    renders (dropforge.data.render), so that any template will do. Raises DataError as that does.
    """
    from dropforge.data.render import Renderer
    from dropforge.data.tokenize import tokenize_conversations

    columns = getattr(dataset, "column_names", None)
    if _ready(config) or not config.assistant_only_loss or not isinstance(columns, list) or "messages" not in columns:
        return dataset
    renderer = Renderer(tokenizer)

    def encode(row: dict[str, Any], index: int) -> dict[str, Any]:
        # A column holds the keys of all its rows: those a turn does not have come as None.
        turns: Any = [{key: value for key, value in turn.items() if value is not None} for turn in row["messages"]]
        rendered = renderer.render(turns, where=f"row {index + 1}", tools=row.get("tools"))
        (tokens,) = tokenize_conversations(tokenizer, [rendered])
        return {"input_ids": tokens.input_ids, "labels": tokens.labels}

    return dataset.map(encode, with_indices=True, remove_columns=columns, **_how(dataset, config, desc="answers"))


def _how(dataset: Any, config: Any, *, desc: str) -> dict[str, Any]:
    """Processes and the name of the progress bar, which a stream does not take."""
    from datasets import Dataset

    return {"num_proc": config.dataset_num_proc, "desc": desc} if isinstance(dataset, Dataset) else {}


def _ready(config: Any) -> bool:
    """The script prepares its rows itself."""
    return bool((config.dataset_kwargs or {}).get("skip_prepare_dataset", False))


def tokenised(dataset: Any, tokenizer: Any, config: Any) -> Any:
    """A data set of rendered texts as input_ids; others (conversations, prompts, tokenised, streamed) as they are.

    A chat template writes both tokens into the text; a tokenizer that adds the first, and TRL that adds the second,
    would make two.
    """
    field = config.dataset_text_field
    columns = getattr(dataset, "column_names", None)
    if _ready(config) or not isinstance(columns, list) or field not in columns or "input_ids" in columns:
        return dataset

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": encode_text(row[field], tokenizer)}

    return dataset.map(encode, remove_columns=columns, **_how(dataset, config, desc="tokens"))


def encode_text(text: str, tokenizer: Any) -> list[int]:
    """Token ids of one training text, with neither a second begin token nor a second end token."""
    ids: list[int] = tokenizer(text)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    if eos is not None and tokenizer.eos_token and not text.rstrip().endswith(tokenizer.eos_token):
        ids = [*ids, eos]
    return ids

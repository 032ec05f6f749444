"""Rendered texts as token ids with one begin token and one end token each."""

from __future__ import annotations

from typing import Any


def tokenised(dataset: Any, tokenizer: Any, config: Any) -> Any:
    """A data set of rendered texts as input_ids; others (conversations, prompts, tokenised, streamed) as they are.

    A chat template writes both tokens into the text; a tokenizer that adds the first, and TRL that adds the second,
    would make two.
    """
    field = config.dataset_text_field
    columns = getattr(dataset, "column_names", None)
    if not isinstance(columns, list) or field not in columns or "input_ids" in columns:
        return dataset

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": encode_text(row[field], tokenizer)}

    return dataset.map(encode, remove_columns=columns, num_proc=config.dataset_num_proc, desc="tokens")


def encode_text(text: str, tokenizer: Any) -> list[int]:
    """Token ids of one training text, with neither a second begin token nor a second end token."""
    ids: list[int] = tokenizer(text)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    if eos is not None and tokenizer.eos_token and not text.rstrip().endswith(tokenizer.eos_token):
        ids = [*ids, eos]
    return ids

"""Chat templates and data sets for scripts: by-name templates, ShareGPT rows as role/content, loss on answers only."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dropforge.errors import CommandError, DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

LOG = logging.getLogger("dropforge")
IGNORED = -100
ROLES = {
    "system": "system", "human": "user", "user": "user", "input": "user",
    "gpt": "assistant", "assistant": "assistant", "output": "assistant", "model": "assistant", "chatgpt": "assistant",
}  # fmt: skip


def get_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str = "chatml") -> PreTrainedTokenizerBase:
    """The same tokenizer with the named chat template (the names of ``dropforge.models.templates.TEMPLATES``).

    The vocabulary does not grow: where the template's end marker is missing, turns end with the end token.
    Raises DataError template-unknown.
    """
    from dropforge.models.tokenizer import use_template

    for repair in use_template(tokenizer, chat_template):
        LOG.info("tokenizer: %s", repair)
    return tokenizer


def standardize_sharegpt(dataset: Dataset, *, column: str = "conversations") -> Dataset:
    """Rows of {"from", "value"} turns become rows of {"role", "content"} turns; such rows stay as they are.

    Raises DataError: api-sharegpt (no such column, or a turn with neither form), api-sharegpt-role.
    """
    if column not in dataset.column_names:
        raise DataError(
            f"the data set has no column {column!r}", code="api-sharegpt", where="column",
            why=f"its columns are {', '.join(dataset.column_names)}", fix="name the column with column=",
        )  # fmt: skip

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {column: [_turn(turn, index) for turn in row[column]]}

    features = dataset.map(convert, with_indices=True, remove_columns=[column], desc="role and content")
    return features.select_columns(list(dataset.column_names))


def _turn(turn: dict[str, Any], row: int) -> dict[str, str]:
    if "role" in turn and "content" in turn:
        return {"role": turn["role"], "content": turn["content"]}
    if "from" not in turn or "value" not in turn:
        raise DataError(
            "a turn has neither from and value nor role and content", code="api-sharegpt", where=f"row {row + 1}",
            why=f"its keys are {', '.join(sorted(turn))}",
        )  # fmt: skip
    if turn["from"] not in ROLES:
        raise DataError(
            f"nobody is called {turn['from']!r} in a conversation", code="api-sharegpt-role", where=f"row {row + 1}",
            fix=f"known: {', '.join(sorted(ROLES))}",
        )  # fmt: skip
    return {"role": ROLES[turn["from"]], "content": turn["value"]}


def train_on_responses_only(trainer: Any, instruction_part: str, response_part: str) -> Any:
    """Set every label to -100 that is not inside an answer, in the trainer's data sets. Returns the trainer.

    An answer starts after `response_part` and ends before the next `instruction_part` (or at the row's end); so the
    token that ends the turn is learnt. The markers are looked for in the text of the row, and tokens are kept by their
    character positions, so it does not matter how the markers are cut into tokens. Rows without an answer are dropped.

    Raises DataError api-no-responses when no row has one (wrong markers would make every loss 0); CommandError
    api-packed, because packed rows have lost where a document begins.
    """
    if trainer.args.packing:
        raise CommandError(
            "train_on_responses_only cannot mask packed rows", code="api-packed", where="packing",
            fix="set packing=False, or give the trainer conversations and assistant_only_loss=True",
        )  # fmt: skip
    tokenizer = trainer.processing_class
    trainer.train_dataset = _mask(trainer.train_dataset, tokenizer, instruction_part, response_part)
    if trainer.eval_dataset is not None:
        trainer.eval_dataset = _mask(trainer.eval_dataset, tokenizer, instruction_part, response_part)
    return trainer


def _mask(dataset: Dataset, tokenizer: Any, instruction: str, response: str) -> Dataset:
    def label(row: dict[str, Any]) -> dict[str, Any]:
        return {"labels": response_labels(row["input_ids"], tokenizer, instruction=instruction, response=response)}

    masked = dataset.map(label, desc="labels of answers")
    kept = masked.filter(lambda row: any(value != IGNORED for value in row["labels"]), desc="rows with an answer")
    if len(kept) == 0:
        example = tokenizer.decode(dataset[0]["input_ids"])[:200] if len(dataset) else ""
        raise DataError(
            "no row has an answer to learn from",
            code="api-no-responses",
            where="instruction_part, response_part",
            why=f"{response!r} is in none of the {len(dataset)} rows; the first begins {example!r}",
            fix="copy both markers from a rendered row, or raise max_seq_length if rows are cut before the answer",
        )
    if len(kept) < len(dataset):
        LOG.warning("%d of %d rows have no answer and are dropped", len(dataset) - len(kept), len(dataset))
    return kept


def response_labels(input_ids: list[int], tokenizer: Any, *, instruction: str, response: str) -> list[int]:
    """input_ids with -100 wherever a token does not lie whole inside an answer."""
    text, spans = _text_and_spans(input_ids, tokenizer)
    answers = list(_answers(text, instruction=instruction, response=response))
    labels = []
    for token, (start, end) in zip(input_ids, spans, strict=True):
        inside = any(begin <= start and end <= stop and start < end for begin, stop in answers)
        labels.append(token if inside else IGNORED)
    return labels


def _answers(text: str, *, instruction: str, response: str) -> Iterator[tuple[int, int]]:
    position = 0
    while (found := text.find(response, position)) >= 0:
        begin = found + len(response)
        following = text.find(instruction, begin)
        stop = len(text) if following < 0 else following
        yield begin, stop
        position = stop


def _text_and_spans(input_ids: list[int], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The row as text, and the characters of each token in it."""
    text = tokenizer.decode(input_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if again["input_ids"] == list(input_ids):
        return text, again["offset_mapping"]
    # The tokenizer does not give back the ids it decoded (a row cut inside a character, say): what each token adds to
    # the text is then measured by decoding ever longer beginnings.
    spans, length = [], 0
    for count in range(1, len(input_ids) + 1):
        part = tokenizer.decode(input_ids[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        spans.append((length, len(part)))
        length = len(part)
    return text, spans

"""Chat templates and data sets for scripts, with the names and meanings people know from notebooks.

The same things in a job: `data.template`, `data.format`, `data.train_on` (docs/guides/datasets.md).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from dropforge.data.responses import Markers, find_markers, given_markers
from dropforge.data.responses import response_labels as _response_labels
from dropforge.data.sharegpt import ASSISTANT, INSPECTED_ROWS, SYSTEM, USER, TurnKeys, merge_columns
from dropforge.errors import CommandError, DataError
from dropforge.models.new_tokens import add_new_tokens
from dropforge.models.templates import ALIASES, TEMPLATES

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "CHAT_TEMPLATES", "add_new_tokens", "apply_chat_template", "get_chat_template", "response_labels",
    "standardize_data_formats", "standardize_sharegpt", "to_sharegpt", "train_on_responses_only",
]  # fmt: skip

LOG = logging.getLogger("dropforge")
IGNORED = -100
CHECKED_STREAMING_ROWS = 16
CHAT_TEMPLATES = tuple(sorted([*TEMPLATES, *ALIASES]))
"""Every name that `get_chat_template` and `data.template` take."""


def get_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | tuple[str, str] = "chatml",
    mapping: Mapping[str, str] | None = None,
    map_eos_token: bool = True,
    system_message: str | None = None,
    patch_saving: bool = True,
) -> PreTrainedTokenizerBase:
    """The same tokenizer with another chat template.

    The vocabulary does not grow: where the template's end marker is missing, turns end with the end token.

    Args:
        chat_template: a name of CHAT_TEMPLATES, an example with {INPUT} and {OUTPUT}, or a pair (Jinja text, text that
            ends an answer).
        mapping: other key and role names the template shall read: {"role": "from", "content": "value",
            "user": "human", "assistant": "gpt"}. The usual names keep working.
        map_eos_token: make the marker that ends an answer the tokenizer's end token.
        system_message: text for conversations without a system turn, in place of the template's own.
        patch_saving: taken for scripts that pass it. Template and end token are part of the tokenizer and are saved
            with it in any case.

    Raises DataError template-unknown, template-invalid.
    """
    from dropforge.models.templates import Template
    from dropforge.models.templates.apply import apply_template
    from dropforge.models.tokenizer import use_template

    if isinstance(chat_template, tuple):
        text, end = chat_template
        own = Template(name="own", file="", end_of_turn=end, source="given by the caller", inline=text)
        repairs: Sequence[str] = apply_template(
            tokenizer, own, map_eos_token=map_eos_token, system=system_message, mapping=mapping
        )
    else:
        options = {"map_eos_token": map_eos_token, "system": system_message, "mapping": mapping}
        repairs = use_template(tokenizer, chat_template, **options)
    for repair in repairs:
        LOG.info("tokenizer: %s", repair)
    return tokenizer


def to_sharegpt(
    dataset: Dataset,
    merged_prompt: str = "",
    merged_column_name: str = "instruction",
    output_column_name: str = "output",
    remove_unused_columns: bool = True,
    conversation_extension: int = 1,
    random_state: int = 3407,
) -> Dataset:
    """Columns to conversations: a column `conversations` of human and gpt turns.

    Args:
        merged_prompt: the question as a sentence: `{column}` inserts a value, `[[...]]` is left out when its first
            column is empty, doubled braces are literal. Empty: the column `merged_column_name` as it is.
        output_column_name: the column with the answer.
        conversation_extension: join so many rows into one conversation: row i with row i of the shuffled set
            (seed random_state, random_state + 1, ...).

    Raises KeyError (no such column), TypeError (the rows are conversations already), ValueError (the sentence).
    """
    return merge_columns(
        dataset, merged_prompt=merged_prompt, merged_column_name=merged_column_name,
        output_column_name=output_column_name, remove_unused_columns=remove_unused_columns,
        conversation_extension=conversation_extension, random_state=random_state,
    )  # fmt: skip


def standardize_sharegpt(
    dataset: Dataset,
    tokenizer: Any = None,
    aliases_for_system: Sequence[str] = SYSTEM,
    aliases_for_user: Sequence[str] = USER,
    aliases_for_assistant: Sequence[str] = ASSISTANT,
    *,
    column: str = "conversations",
) -> Dataset:
    """Turns of {"from", "value"} or any other two keys become {"role", "content"}; such turns stay as they are.

    Which key is the role is seen in the first 10 rows: by the names in it, else by the key's name, else the one with
    fewer different values. `tokenizer` is for processors of images, whose contents become lists of text parts.

    Raises DataError: api-sharegpt (no such column, or turns that cannot be read), api-sharegpt-role.
    """
    if column not in dataset.column_names:
        raise DataError(
            f"the data set has no column {column!r}", code="api-sharegpt", where="column",
            why=f"its columns are {', '.join(dataset.column_names)}", fix="name the column with column=",
        )  # fmt: skip
    sample = [row[column] for row in islice(dataset, INSPECTED_ROWS)]
    keys = TurnKeys(sample, system=aliases_for_system, user=aliases_for_user, assistant=aliases_for_assistant)
    as_parts = getattr(tokenizer, "image_processor", None) is not None

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        turns = [keys.read(turn, row=index) for turn in row[column]]
        if as_parts:
            turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        return {column: turns}

    features = dataset.map(convert, with_indices=True, remove_columns=[column], desc="role and content")
    return features.select_columns(list(dataset.column_names))


standardize_data_formats = standardize_sharegpt


def apply_chat_template(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str,
    default_system_message: str | None = None,
    extra_eos_tokens: Sequence[str] | None = None,
) -> Dataset:
    """The data set with a column `text`: its conversations written with a template given as an example.

    `chat_template` holds {INPUT} and {OUTPUT} (once, or twice to show how turns follow each other) and perhaps
    {SYSTEM}. The tokenizer keeps the template, so that what is exported chats in the same way.

    An answer ends with the special token that stands behind {OUTPUT}, else with the tokenizer's end token, which is
    then written there. `extra_eos_tokens` are tokens of the vocabulary that may stand there too though they are not
    special; the one that does becomes the end token.

    Raises DataError template-invalid, api-sharegpt (no column `conversations` or `messages`).
    """
    from dropforge.models.tokenizer import use_template

    also = {"extra_ends": tuple(extra_eos_tokens)} if extra_eos_tokens else {}
    for repair in use_template(tokenizer, chat_template, system=default_system_message, **also):
        LOG.info("tokenizer: %s", repair)
    column = next((name for name in ("conversations", "messages") if name in dataset.column_names), "conversations")
    rows = standardize_sharegpt(dataset, column=column)

    def write(batch: dict[str, list[Any]]) -> dict[str, list[str]]:
        texts = [str(tokenizer.apply_chat_template(turns, tokenize=False)) for turns in batch[column]]
        return {"text": texts}

    return rows.map(write, batched=True, desc="chat template")


def train_on_responses_only(
    trainer: Any,
    instruction_part: str | None = None,
    response_part: str | None = None,
    force_match: bool = True,
    tokenizer: Any = None,
    return_function: bool = False,
    num_proc: int | None = None,
    last_response_only: bool = False,
    mask_out_tokens: Sequence[int | str] | None = None,
) -> Any:
    """Set every label to -100 that is not inside an answer, in the trainer's data sets. Returns the trainer.

    Without markers they are read off the tokenizer's chat template, and an answer is exactly its text and the marker
    that ends it. With markers an answer starts after `response_part` and ends before the next `instruction_part` (or at
    the row's end). They are looked for in the text of the row, and tokens are kept by their character positions, so it
    does not matter how the markers are cut into tokens. Labels that are -100 already stay so. Rows without an answer
    are dropped and counted.

    Args:
        force_match: markers must stand in the row as they are given. False: blanks and line breaks around them may
            differ or be missing; those behind `response_part` are still not learnt.
        tokenizer: default: the trainer's.
        return_function: return the function rows -> {"labels"} instead; `trainer` may then be None.
        num_proc: processes that mask rows.
        last_response_only: only the last answer of a row is learnt.
        mask_out_tokens: tokens (ids or texts) that are never learnt.

    Raises DataError api-no-responses when no row has one (wrong markers would make every loss 0), api-no-markers;
    CommandError api-packed, because packed rows have lost where a document begins.
    """
    if trainer is not None and trainer.args.packing:
        raise CommandError(
            "train_on_responses_only cannot mask packed rows", code="api-packed", where="packing",
            fix="set packing=False, or give the trainer conversations and assistant_only_loss=True",
        )  # fmt: skip
    tokenizer = tokenizer if tokenizer is not None else trainer.processing_class
    if (instruction_part is None) != (response_part is None):
        raise CommandError(
            "one marker is missing", code="api-markers", where="instruction_part, response_part",
            fix="give both, or neither (they are then read off the chat template)",
        )  # fmt: skip
    if response_part is None:
        markers = find_markers(tokenizer)
    else:
        markers = given_markers(str(instruction_part), response_part, exact=force_match)
    ids = {t if isinstance(t, int) else tokenizer.convert_tokens_to_ids(t) for t in mask_out_tokens or ()}

    def label(row: dict[str, Any]) -> dict[str, Any]:
        found = _response_labels(
            row["input_ids"], tokenizer, markers=markers, last_only=last_response_only, never=ids,
            labels=row.get("labels"),
        )  # fmt: skip
        return {"labels": found}

    if return_function:
        return label
    trainer.train_dataset = _mask(trainer.train_dataset, tokenizer, label, markers, num_proc)
    if trainer.eval_dataset is not None:
        trainer.eval_dataset = _mask(trainer.eval_dataset, tokenizer, label, markers, num_proc)
    return trainer


def response_labels(input_ids: list[int], tokenizer: Any, *, instruction: str, response: str) -> list[int]:
    """input_ids with -100 wherever a token does not end between `response` and the next `instruction`."""
    return _response_labels(input_ids, tokenizer, markers=Markers(response=response, instruction=instruction))


def _mask(
    dataset: Any, tokenizer: Any, label: Callable[[Any], dict[str, Any]], markers: Markers, num_proc: int | None
) -> Any:  # fmt: skip
    from datasets import IterableDataset

    if isinstance(dataset, IterableDataset):
        masked = dataset.map(label)
        sample = list(masked.take(CHECKED_STREAMING_ROWS))
        if sample and not any(_learns(row) for row in sample):
            raise _nothing(sample[0], tokenizer, markers, rows=len(sample))
        return masked.filter(_learns)
    masked = dataset.map(label, desc="labels of answers", num_proc=num_proc)
    kept = masked.filter(_learns, desc="rows with an answer", num_proc=num_proc)
    if len(kept) == 0:
        raise _nothing(dataset[0] if len(dataset) else None, tokenizer, markers, rows=len(dataset))
    if len(kept) < len(dataset):
        LOG.warning("%d of %d rows have no answer and are dropped", len(dataset) - len(kept), len(dataset))
    return kept


def _learns(row: dict[str, Any]) -> bool:
    return any(value != IGNORED for value in row["labels"])


def _nothing(row: dict[str, Any] | None, tokenizer: Any, markers: Markers, *, rows: int) -> DataError:
    text = tokenizer.decode(row["input_ids"]) if row else ""
    if markers.response in text:
        why = f"{markers.response!r} is there, but nothing follows it: the rows are cut before the answer"
        fix = "raise max_seq_length"
    else:
        why = f"{markers.response!r} is in none of the {rows} rows; the first begins {text[:200]!r}"
        fix = "copy both markers from a rendered row, or raise max_seq_length if rows are cut before the answer"
    return DataError(
        "no row has an answer to learn from", code="api-no-responses", where="instruction_part, response_part",
        why=why, fix=fix,
    )  # fmt: skip

"""The trained model and the merged model in transformers, on the CPU: the truth the exports are compared with.

Shape legend: T positions, V vocabulary.
"""

from __future__ import annotations

import gc
import itertools
import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropforge.errors import ExportError, Reason
from dropforge.export.safetensors_stream import index_folder
from dropforge.export.streamed_model import CannotStream, streamed_model
from dropforge.models.pictures import auto_class, stored_names

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array = np.ndarray[Any, np.dtype[np.float32]]

ANSWER_TOKENS = 8
STREAMED_ANSWER_TOKENS = 4
"""Every token costs a streamed model one more reading of all its weights."""
MEMORY_SHARE = 0.7
WHOLE_BYTES = int(1.5 * 2**30)
"""A model of at most so many bytes in float32 is held in memory; a larger one is read from disk as it runs."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One prompt, its greedy continuation, and what the model thought at each step."""

    prompt: list[int]
    tokens: list[int]
    """Greedy continuation, ANSWER_TOKENS long whatever ends in it: every step is a prediction to compare."""
    end: int
    """How many of `tokens` belong to the answer, its end token included."""
    logprobs: Array
    """float32 [T, V]: natural log-probabilities of the token after the prompt, after one more token ..."""
    margins: list[float]
    """By how much (in log-probability) the chosen token leads the second, per step."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A row of the evaluation split, and what the merged model predicts in it."""

    ids: list[int]
    positions: list[int]
    """Places in `ids` after which the next token is predicted; the tokens there are among those that are learnt."""
    logprobs: Array | None = None
    """float32 [len(positions), V]."""


def compute_dtype(folder: Path, *, copies: int = 1) -> torch.dtype:
    """float32 when the model fits into memory that way, else bfloat16. For models that are held whole.

    Raises ExportError (export-verify-memory) when neither fits, because an export that was not verified does not count.
    """
    import psutil
    import torch

    numbers = count_numbers(folder)
    available = psutil.virtual_memory().available * MEMORY_SHARE
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        if numbers * size * copies <= available:
            return dtype
    raise ExportError(
        "the verification does not fit into memory", code="export-verify-memory", reason=Reason.OOM_HOST,
        why=f"needs about {numbers * 2 * copies / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free to use",
        fix="run `dropforge retry` on a machine with more memory; the trained weights are safe",
    )  # fmt: skip


def count_numbers(folder: Path) -> int:
    """How many numbers the weights in a model folder are."""
    return sum(math.prod(info.shape) for info in index_folder(folder).values())


def streams(folder: Path) -> bool:
    """True when the model is too large to be held whole and is read from disk as it runs."""
    return count_numbers(folder) * 4 > WHOLE_BYTES


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars, notices and hints of transformers and PEFT inside the block; their settings come back.

    PEFT's hints (tied embeddings and the like) are about what the comparison that follows decides anyway.
    """
    import warnings

    from transformers.utils import logging as library

    level, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity(logging.ERROR)
    library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()


@contextmanager
def trained_model(base: Path, adapter: Path | None, full: Path | None, *, runs_code: bool = False) -> Iterator[Any]:
    """The model as it was trained: the 16-bit base with the adapter attached by PEFT, or the fully trained weights."""
    folder = full or base
    if streams(folder) and not runs_code:
        with suppress(CannotStream), streamed_model(folder, adapter=adapter) as model:
            yield model
            return
    with _whole_trained_model(folder, adapter, runs_code=runs_code) as model:
        yield model


@contextmanager
def _whole_trained_model(folder: Path, adapter: Path | None, *, runs_code: bool) -> Iterator[Any]:
    model: Any
    with quiet_libraries():
        model = auto_class(folder).from_pretrained(
            folder, dtype=compute_dtype(folder), local_files_only=True, trust_remote_code=runs_code
        )
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(_resized(model, adapter), adapter)
    try:
        yield model.eval()
    finally:
        del model
        gc.collect()


def _resized(model: Any, adapter: Path) -> Any:
    """Give the base as many embedding rows as the adapter's trained embedding has."""
    from dropforge.export.safetensors_stream import read_header

    for name, entry in read_header(adapter / "adapter_model.safetensors").items():
        if name.endswith(("embed_tokens.weight", "embed_tokens.base_layer.weight")):
            rows = int(entry["shape"][0])
            if rows != model.get_input_embeddings().weight.shape[0]:
                model.resize_token_embeddings(rows, mean_resizing=False)
    return model


@contextmanager
def merged_model(folder: Path) -> Iterator[tuple[Any, dict[str, list[Any]]]]:
    """The merged folder in transformers, and what its loading report lists: missing, unexpected, mismatched keys."""
    if streams(folder):
        with suppress(CannotStream), streamed_model(folder) as model:
            yield model, unexpected(model, folder)
            return
    with _whole_merged_model(folder) as found:
        yield found


def unexpected(model: Any, folder: Path) -> dict[str, list[Any]]:
    """Tensors in the files that a streamed model has no place for; a missing one has been refused before."""
    known = set(model.state_dict())
    files = index_folder(folder)
    loaded = {file: name for name, file in stored_names(folder, files).items()}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    names = [name for name in files if loaded.get(name, name) not in known]
    names = [name for name in names if not any(re.search(pattern, name) for pattern in ignored)]
    return {"unexpected_keys": names} if names else {}


@contextmanager
def _whole_merged_model(folder: Path) -> Iterator[tuple[Any, dict[str, list[Any]]]]:
    loaded: Any
    with quiet_libraries():
        loaded = auto_class(folder).from_pretrained(
            folder,
            dtype=compute_dtype(folder),
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    model, report = loaded
    del loaded
    try:
        yield model.eval(), {key: sorted(map(str, value)) for key, value in report.items() if value}
    finally:
        del model
        gc.collect()


def is_streamed(model: Any) -> bool:
    """True for a model that has weights on disk only."""
    return any(parameter.device.type == "meta" for parameter in model.parameters())


def answers(model: Any, prompts: list[list[int]], *, stop: int | None) -> list[Answer]:
    """Continue each prompt greedily; `stop` ends the answer. Without a cache, so exact."""
    import numpy as np

    steps = STREAMED_ANSWER_TOKENS if is_streamed(model) else ANSWER_TOKENS
    tokens: list[list[int]] = [[] for _ in prompts]
    rows: list[list[Any]] = [[] for _ in prompts]
    margins: list[list[float]] = [[] for _ in prompts]
    for _ in range(steps):
        asked = [[*prompt, *more] for prompt, more in zip(prompts, tokens, strict=True)]
        for place, found in enumerate(logprobs(model, asked, [[len(ids) - 1] for ids in asked])):
            second, first = np.partition(found[0], -2)[-2:]
            tokens[place].append(int(np.argmax(found[0])))
            margins[place].append(float(first - second))
            rows[place].append(found[0])
    return [
        Answer(
            prompt=prompt, tokens=more, end=more.index(stop) + 1 if stop in more else len(more),
            logprobs=np.stack(found), margins=gaps,
        )
        for prompt, more, found, gaps in zip(prompts, tokens, rows, margins, strict=True)
    ]  # fmt: skip


def logprobs(model: Any, rows: list[list[int]], positions: list[list[int]]) -> list[Array]:
    """float32 [P, V] per row: log-probabilities of the token after each of its positions.

    A streamed model gets all rows at once, the short ones filled up at their ends, where no earlier token sees it.
    """
    if not is_streamed(model):
        return [_batch(model, [ids], [places])[0] for ids, places in zip(rows, positions, strict=True)]
    try:
        return _batch(model, rows, positions)
    except (NotImplementedError, RuntimeError) as error:
        raise ExportError(
            "this model cannot be checked piece by piece", code="export-verify-memory", reason=Reason.OOM_HOST,
            why=str(error)[:300], fix="run `dropforge retry` on a machine with more memory, and please report this",
        ) from error  # fmt: skip


def _batch(model: Any, rows: list[list[int]], positions: list[list[int]]) -> list[Array]:
    """One forward pass; the head sees only the asked positions, so that no logits are made that nobody reads."""
    import torch

    ids = torch.zeros((len(rows), max(len(row) for row in rows)), dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
    at_row = torch.tensor([place for place, asked in enumerate(positions) for _ in asked])
    at_token = torch.tensor([token for asked in positions for token in asked])
    found = selected_logprobs(model, at_row, at_token, input_ids=ids)
    ends = [sum(len(asked) for asked in positions[:place]) for place in range(len(positions) + 1)]
    return [found[start:end] for start, end in itertools.pairwise(ends)]


def selected_logprobs(model: Any, at_row: torch.Tensor, at_token: torch.Tensor, **inputs: Any) -> Array:
    """float32 [P, V]: log-probabilities of what follows each of the places (at_row [P], at_token [P]) of the inputs."""
    import torch

    def select(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0][at_row, at_token][None], *inputs[1:])

    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(select)
    try:
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[0]
    finally:
        hook.remove()
    found: Array = torch.log_softmax(logits.float(), dim=-1).numpy()
    return found


def spread_positions(length: int, *, most: int) -> list[int]:
    """At most `most` positions of a row, evenly spaced, the last among them."""
    if length <= most:
        return list(range(length))
    return sorted({round(step * (length - 1) / (most - 1)) for step in range(most)})

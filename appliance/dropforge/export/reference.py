"""The trained model and the merged model in transformers, on the CPU: the truth the exports are compared with.

Shape legend: T positions, V vocabulary.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropforge.errors import ExportError, Reason
from dropforge.export.safetensors_stream import index_folder

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array = np.ndarray[Any, np.dtype[np.float32]]

ANSWER_TOKENS = 8
MEMORY_SHARE = 0.7


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


def compute_dtype(folder: Path, *, copies: int = 1) -> torch.dtype:
    """float32 when the model fits into memory that way, else bfloat16.

    Raises ExportError (export-verify-memory) when neither fits, because an export that was not verified does not count.
    """
    import psutil
    import torch

    numbers = 0
    for info in index_folder(folder).values():
        count = 1
        for extent in info.shape:
            count *= extent
        numbers += count
    available = psutil.virtual_memory().available * MEMORY_SHARE
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        if numbers * size * copies <= available:
            return dtype
    raise ExportError(
        "the verification does not fit into memory", code="export-verify-memory", reason=Reason.OOM_HOST,
        why=f"needs about {numbers * 2 * copies / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free to use",
        fix="run `dropforge retry` on a machine with more memory; the trained weights are safe",
    )  # fmt: skip


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
def trained_model(base: Path, adapter: Path | None, full: Path | None) -> Iterator[Any]:
    """The model as it was trained: the 16-bit base with the adapter attached by PEFT, or the fully trained weights."""
    from transformers import AutoModelForCausalLM

    folder = full or base
    model: Any
    with quiet_libraries():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=compute_dtype(folder), local_files_only=True, trust_remote_code=False
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
    from transformers import AutoModelForCausalLM

    loaded: Any
    with quiet_libraries():
        loaded = AutoModelForCausalLM.from_pretrained(
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


def answers(model: Any, prompts: list[list[int]], *, stop: int | None) -> list[Answer]:
    """Continue each prompt greedily by ANSWER_TOKENS tokens; `stop` ends the answer. Without a cache, so exact."""
    import torch

    result = []
    with torch.no_grad():
        for prompt in prompts:
            tokens: list[int] = []
            rows, margins = [], []
            for _ in range(ANSWER_TOKENS):
                ids = torch.tensor([prompt + tokens])
                row = torch.log_softmax(model(input_ids=ids).logits[0, -1].float(), dim=-1)
                best = torch.topk(row, 2)
                rows.append(row)
                margins.append(float(best.values[0] - best.values[1]))
                tokens.append(int(best.indices[0]))
            end = tokens.index(stop) + 1 if stop in tokens else len(tokens)
            result.append(
                Answer(prompt=prompt, tokens=tokens, end=end, logprobs=torch.stack(rows).numpy(), margins=margins)
            )
    return result


def prompt_logprobs(model: Any, prompts: list[list[int]]) -> list[Array]:
    """float32 [T, V] per prompt: log-probabilities after every token of it."""
    import torch

    with torch.no_grad():
        return [
            torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].float(), dim=-1).numpy() for ids in prompts
        ]

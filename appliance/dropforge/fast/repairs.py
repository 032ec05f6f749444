"""What is wrong with many published checkpoints, looked for when one is loaded: found, mended or named, and reported.

The tokenizer's own repairs (pad, template, end token) are in models/tokenizer.py; here is what needs the weights.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from dropforge.fast.state import ModelState

LOG = logging.getLogger("dropforge")
# Families trained in bf16 whose activations or residual stream pass 65504, the largest fp16 number.
FP16_OVERFLOW = ("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text",
                 "gpt_oss", "glm4_moe", "qwen3_moe", "qwen3_5", "qwen3_5_text", "qwen3_5_moe")  # fmt: skip
_TINY = 1e-16
_SHOWN = 5
_ROWS = 16384


def compute_dtype(asked: torch.dtype, *, model_type: str, bf16: bool) -> tuple[torch.dtype, str | None]:
    """The type to compute in, and a sentence when it is not the one asked for. `bf16`: the GPU computes in it."""
    import torch

    if asked is not torch.float16 or model_type not in FP16_OVERFLOW:
        return asked, None
    safe = torch.bfloat16 if bf16 else torch.float32
    name = str(safe).removeprefix("torch.")
    return safe, f"fp16 -> {name}: activations of {model_type} leave fp16's range, and the loss would become NaN"


def untrained_rows(weight: torch.Tensor) -> torch.Tensor:
    """Indices (n,) int64 of the rows of a (V, H) embedding that were never trained: all zero, or equal to another row.

    Equal rows are found by a random projection in float64 and then compared number by number.
    """
    import torch

    with torch.no_grad():
        parts = weight.split(_ROWS)  # a large vocabulary is looked at piece by piece
        zero = torch.cat([part.abs().amax(dim=1) <= _TINY for part in parts])
        generator = torch.Generator(device=weight.device).manual_seed(0)
        direction = torch.randn(weight.shape[1], generator=generator, device=weight.device, dtype=torch.float64)
        keys = torch.cat([part.double() @ direction for part in parts])
        order = keys.argsort(stable=True)
        near = (keys[order[1:]] == keys[order[:-1]]).nonzero().flatten()
        equal = (weight[order[near]] == weight[order[near + 1]]).all(dim=1)
        twins = torch.cat([order[near[equal]], order[near[equal] + 1]])
        zero[twins] = True
        return zero.nonzero().flatten()


def look_for_untrained(model: Any, state: ModelState) -> None:
    """Note untrained rows of the embedding in the state; a report line names those that the chat template writes."""
    embedding = model.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    if weight is None or not weight.is_floating_point() or weight.is_meta:
        return
    tokenizer = state.tokenizer
    rows = {index for index in untrained_rows(weight).tolist() if index < len(tokenizer)}
    state.untrained = frozenset(rows)
    if not rows:
        return
    template = str(tokenizer.chat_template or "")
    names = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if index in rows}
    used = [text for text in names.values() if text in template]
    shown = ", ".join(repr(tokenizer.convert_ids_to_tokens(index)) for index in sorted(rows)[:_SHOWN])
    line = f"{len(rows)} tokens have untrained embeddings ({shown}{' ...' if len(rows) > _SHOWN else ''})"
    if used:
        line += f"; the chat template writes {', '.join(map(repr, used))}: call dropforge.fix_untrained_tokens(model)"
    else:
        line += ", none of which the chat template writes"
    state.repairs.append(line)


def fix_untrained_tokens(model: Any, tokenizer: Any = None) -> list[int]:
    """Draw every untrained row of the embedding, and of the head, anew. Returns the ids of the tokens.

    They come from the distribution of the trained rows (dropforge.models.drawn_rows), from a fixed seed, so that the
    model can tell the tokens apart and an adapter can learn to write them. Call it before training.
    model: loaded by FastLanguageModel or FastModel. Raises CommandError api-not-loaded.
    """
    import torch

    from dropforge.fast.state import needed_state
    from dropforge.models.drawn_rows import drawn_rows

    state = needed_state(model)
    rows = sorted(state.untrained)
    if not rows:
        return []
    weights = {id(layer.weight): layer.weight for layer in _tables(model)}
    with torch.no_grad():
        for weight in weights.values():
            index = torch.tensor(rows, device=weight.device)
            known = torch.ones(weight.shape[0], dtype=torch.bool, device=weight.device)
            known[index] = False
            known[len(tokenizer or state.tokenizer) :] = False  # rows of padding behind the vocabulary
            weight[index] = drawn_rows(weight[known], len(rows)).to(weight.dtype)
    state.untrained = frozenset()
    line = f"{len(rows)} untrained token embeddings were drawn from the distribution of the others"
    state.repairs.append(line)
    LOG.warning("%s", line)
    return rows


def _tables(model: Any) -> list[Any]:
    """The embedding and the head; of copies that are trained, the copy."""
    found = []
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None:
            copies = getattr(layer, "modules_to_save", None)
            found += list(copies.values()) if copies is not None else [layer]
    return found


def warn_of_untrained(dataset: Any, model: Any, state: ModelState) -> None:
    """A log line when a tokenised data set uses untrained tokens while the embedding is frozen."""
    line = untrained_in(dataset, model, state.tokenizer, known=state.untrained)
    if line:
        LOG.warning("%s: call dropforge.fix_untrained_tokens(model), or train embed_tokens and lm_head too", line)


def untrained_in(
    dataset: Any, model: Any, tokenizer: Any, *, known: frozenset[int] | None = None, rows: int = 2000
) -> str | None:
    """Untrained tokens in the first rows of a tokenised data set, in words; None without any, or when they are trained.

    known: ids of untrained tokens; None looks for them in the embedding.
    """
    columns = getattr(dataset, "column_names", None)
    if not isinstance(columns, list) or "input_ids" not in columns:
        return None
    if any(parameter.requires_grad for layer in _tables(model) for parameter in layer.parameters()):
        return None
    if known is None:
        weight = getattr(model.get_input_embeddings(), "weight", None)
        known = frozenset(untrained_rows(weight).tolist()) if weight is not None else frozenset()
    found: set[int] = set()
    for ids in dataset.select(range(min(rows, len(dataset))))["input_ids"] if known else ():
        found |= known.intersection(ids)
    if not found:
        return None
    tokens = ", ".join(repr(tokenizer.convert_ids_to_tokens(index)) for index in sorted(found)[:_SHOWN])
    return f"the data uses {len(found)} tokens with untrained embeddings ({tokens}), which stay as they are"

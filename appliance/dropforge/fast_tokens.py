"""New tokens for a loaded model: rows of embedding and head that start where the model already knows its way."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from dropforge.errors import CommandError
from dropforge.fast_state import needed_state

LOG = logging.getLogger("dropforge")
METHODS = ("mean", "interpolation")


def add_new_tokens(
    model: Any, tokenizer: Any, new_tokens: Sequence[str] = (), method: str = "mean", interpolation: float = 0.5
) -> list[int]:
    """Add tokens to tokenizer and model, before get_peft_model. Returns their ids.

    method "mean": each new row is the mean of all old rows (Hewitt 2021). "interpolation": (1 - interpolation) times
    that mean plus interpolation times the mean of the rows that the token's text was cut into before. Rows of the head
    likewise. LoRA alone does not train them: name embed_tokens and lm_head among the targets.

    Raises CommandError: api-not-loaded, api-new-tokens (an adapter is attached already, a token is known, the method).
    """
    import torch
    from peft import PeftModel

    needed_state(model)
    if isinstance(model, PeftModel):
        raise _bad("new tokens must be added before get_peft_model", "call add_new_tokens on the loaded model first")
    if method not in METHODS or not 0 <= interpolation <= 1:
        raise _bad(f"method={method!r}, interpolation={interpolation}", f"one of {', '.join(METHODS)}, and 0 to 1")
    known = [token for token in new_tokens if token in tokenizer.get_vocab()]
    if known or not new_tokens:
        raise _bad(f"{known[0]!r} is in the vocabulary already" if known else "no token is named", "leave it out")
    pieces = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in new_tokens]
    before = len(tokenizer)
    tokenizer.add_tokens(list(new_tokens))
    ids: list[int] = tokenizer.convert_tokens_to_ids(list(new_tokens))
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    with torch.no_grad():
        for weight in {id(layer.weight): layer.weight for layer in layers}.values():
            mean = weight[:before].float().mean(dim=0)
            for index, parts in zip(ids, pieces, strict=True):
                row = mean
                if method == "interpolation" and parts:
                    row = (1 - interpolation) * mean + interpolation * weight[parts].float().mean(dim=0)
                weight[index] = row.to(weight.dtype)
    LOG.info("%d tokens added, their embeddings set by %s", len(ids), method)
    return ids


def _bad(what: str, fix: str) -> CommandError:
    return CommandError(f"add_new_tokens: {what}", code="api-new-tokens", where="add_new_tokens", fix=fix)

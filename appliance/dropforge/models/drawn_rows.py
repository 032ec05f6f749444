"""Rows for tokens that a model never learnt: drawn from the distribution of those it did learn.

With W (n, H) the learnt rows and m their mean, a new row is  m + c (W - m) / sqrt(n)  with c (n,) of standard normal
numbers: normally distributed with the rows' own mean and covariance (Hewitt 2021, "Initializing new word embeddings for
pretrained language models"). The mean alone would keep the model's predictions as they are, too, but an adapter beside
a frozen head could never learn to write such a token: its logit is the mean of all logits, whatever the state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

SAMPLED = 8192
"""Of the learnt rows: enough for their covariance, and small beside a vocabulary of 250,000."""


def drawn_rows(learnt: torch.Tensor, count: int, *, seed: int = 0) -> torch.Tensor:
    """(count, H) fp32, on the device of `learnt` (n, H); the same for the same seed."""
    import torch

    with torch.no_grad():
        generator = torch.Generator(device="cpu").manual_seed(seed)
        picked = torch.randperm(learnt.shape[0], generator=generator)[:SAMPLED].to(learnt.device)
        rows = learnt[picked].float()
        mean = rows.mean(dim=0)
        weights = torch.randn(count, rows.shape[0], generator=generator).to(learnt.device)
        return mean + weights @ (rows - mean) / rows.shape[0] ** 0.5


def vocabulary_tables(model: PreTrainedModel) -> list[Any]:
    """Embedding and head as (vocabulary, width) parameters; one when they are tied."""
    found: list[Any] = []
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None and all(module.weight is not other for other in found):
            found.append(module.weight)
    return found


def grow_vocabulary(model: PreTrainedModel, rows: int) -> int:
    """Embedding and head get `rows` rows where they have fewer, the new ones drawn. Returns how many there were.

    Never shrinks: published embeddings are often padded beyond the vocabulary. Tied tables stay one matrix.
    """
    import torch

    embedding: Any = model.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    if weight is None or rows <= weight.shape[0]:
        return rows
    had = int(weight.shape[0])
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for table in vocabulary_tables(model):
            table[had:] = drawn_rows(table[:had], rows - had).to(table.dtype)
    return had

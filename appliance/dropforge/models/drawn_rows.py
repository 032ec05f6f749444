"""Rows for tokens that a model never learnt: drawn from the distribution of those it did learn.

With W (n, H) the learnt rows and m their mean, a new row is  m + c (W - m) / sqrt(n)  with c (n,) of standard normal
numbers: normally distributed with the rows' own mean and covariance (Hewitt 2021, "Initializing new word embeddings for
pretrained language models"). The mean alone would keep the model's predictions as they are, too, but an adapter beside
a frozen head could never learn to write such a token: its logit is the mean of all logits, whatever the state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

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

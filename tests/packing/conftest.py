"""Documents of random tokens."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from dropforge.packing.rows import TokenRows, from_flat

if not torch.cuda.is_available():
    # As in tests/kernels/conftest.py: must be set before the first import of dropforge_kernels.ops in this process.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def rows() -> Callable[..., TokenRows]:
    """rows(count, mean): log-normal lengths, the first third of each document not learnt."""

    def make(count: int = 200, mean: float = 60, longest: int = 400, seed: int = 0) -> TokenRows:
        random = np.random.default_rng(seed)
        lengths = np.clip(np.exp(random.normal(np.log(mean), 0.8, count)).astype(np.int64), 2, longest)
        ids = random.integers(3, 97, int(lengths.sum()))
        labels = ids.copy()
        starts = np.concatenate(([0], np.cumsum(lengths)))
        for start, length in zip(starts, lengths, strict=False):
            labels[start : start + length // 3] = -100
        return from_flat(ids, labels, lengths)

    return make

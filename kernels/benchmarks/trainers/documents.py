"""Documents of random tokens whose lengths are distributed like well-known data."""

from __future__ import annotations

import math
import random

LENGTHS: dict[str, tuple[float, float, int, int]] = {
    "alpaca": (150, 0.75, 24, 2048),
    "chat": (900, 0.9, 64, 8192),
    "fixed": (8192, 0.0, 8192, 8192),
    "tiny": (40, 0.5, 8, 128),
}
"""Name -> median, sigma of the log-normal distribution, shortest and longest."""


def documents(name: str, *, count: int, seed: int = 0) -> list[list[int]]:
    """``count`` rows of token ids in 100..249; every token is learnt."""
    median, sigma, shortest, longest = LENGTHS[name]
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        length = int(math.exp(rng.gauss(math.log(median), sigma))) if sigma else int(median)
        rows.append([rng.randrange(100, 250) for _ in range(max(shortest, min(longest, length)))])
    return rows

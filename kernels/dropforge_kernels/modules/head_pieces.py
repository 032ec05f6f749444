"""How many times cuDNN's attention backward runs for one long row, on some of its heads each. No torch.

Its scratch is as large as all the gradients it makes: dq in fp32, and for grouped heads dk and dv once per query head.
Heads know nothing of each other, so a long row, which fills the GPU with a few heads, loses nothing when they come one
group after the other, and the scratch is that of one piece.
"""

from __future__ import annotations

SPLIT_FROM = 65536
"""Tokens of a row from which heads are split."""
LEAST_HEADS = 8
"""Query heads of a piece: with 512 and more blocks of 128 queries each, 4,096 programs and more."""


def head_pieces(heads: int, groups: int, tokens: int) -> int:
    """Pieces of equally many key-value heads, each with at least LEAST_HEADS query heads. tokens: of one row.

    A divisor of ``groups``; 1 for rows that are not worth it.
    """
    if tokens < SPLIT_FROM:
        return 1
    least = min(heads, LEAST_HEADS)
    return max(count for count in range(1, groups + 1) if groups % count == 0 and heads // count >= least)

"""Numbers that say how close two runs of a model are. Shape legend: T positions, V vocabulary."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How close a candidate's next-token predictions are to the truth's, over all compared positions."""

    positions: int
    relative_error: float
    """RMS of the difference of centred log-probabilities over the RMS of the truth's: 0 equal, about 1.4 unrelated."""
    mean_kl: float
    """Mean Kullback-Leibler divergence of the candidate from the truth, in nats; unlisted tokens count as one token."""
    top1: float
    """Share of positions where both put the same token first."""

    def as_dict(self) -> dict[str, Any]:
        return {key: round(value, 6) if isinstance(value, float) else value for key, value in asdict(self).items()}


def agreement(truth: list[Array], candidate: list[Array]) -> Agreement:
    """Compare [T, V] log-probabilities with the same of another runtime; NaN marks tokens the candidate did not list.

    A candidate that lists nothing usable, or holds NaN for its likeliest token, comes out with relative_error inf.
    """
    import numpy as np

    squares = np.zeros(2)
    divergence, same, positions = 0.0, 0, 0
    for rows, others in zip(truth, candidate, strict=True):
        for p, q in zip(rows, others, strict=True):
            listed = ~np.isnan(q)
            positions += 1
            if listed.sum() < 2 or not np.isfinite(q[listed]).all():
                squares += np.array([np.inf, 1.0])
                continue
            a, b = p[listed].astype(np.float64), q[listed].astype(np.float64)
            centred = a - a.mean()
            squares += np.array([((b - b.mean() - centred) ** 2).sum(), (centred**2).sum()])
            divergence += _kl(a, b, everything=bool(listed.all()))
            same += int(np.argmax(p) == np.nanargmax(q))
    error = float(np.sqrt(squares[0] / squares[1])) if squares[1] > 0 else float("inf")
    return Agreement(
        positions=positions,
        relative_error=error,
        mean_kl=divergence / positions if positions else float("inf"),
        top1=same / positions if positions else 0.0,
    )


def _kl(a: Any, b: Any, *, everything: bool) -> float:
    """KL over listed tokens; the rest of both distributions counts as one more token (a lower bound of the whole)."""
    import numpy as np

    p, q = np.exp(a), np.exp(b)
    total = float((p * (a - b)).sum())
    rest_p, rest_q = max(1.0 - p.sum(), 0.0), max(1.0 - q.sum(), 1e-12)
    if not everything and rest_p > 1e-12:
        total += float(rest_p * np.log(rest_p / rest_q))
    return max(total, 0.0)

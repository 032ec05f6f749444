"""What a session did to a model, in a form that can be logged and saved beside the result."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Swap:
    """One module whose forward was replaced."""

    path: str
    patch: str
    old: str
    """Class whose forward was there."""
    new: str
    """Operation that runs instead."""


@dataclass(frozen=True, kw_only=True)
class Skip:
    """One module, or a whole model (empty path), that keeps its own forward."""

    path: str
    patch: str
    reason: str


@dataclass
class PatchReport:
    """Filled while the session opens; ``wrapped`` when it closes."""

    family: str
    policy: str
    swaps: list[Swap] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    engine: str = ""
    """How the decoder layers run: hand-written, or why they are not."""
    embedding: str = ""
    """Where the embedding lies, when it was moved."""
    declined: dict[str, int] = field(default_factory=dict)
    """Training forwards that the hand-written layers left to the model, by reason; counted as they happen."""
    wrapped: list[str] = field(default_factory=list)
    """Paths whose swapped forward somebody else had wrapped by the end: the wrapper stays, our part is switched off."""

    def counts(self) -> dict[str, int]:
        """Patch name -> number of swapped modules."""
        return dict(Counter(swap.patch for swap in self.swaps))

    def lines(self) -> list[str]:
        """A few sentences for a log: swaps by patch, skips by patch and reason."""
        where_embedded = [f"kernels: {self.embedding}"] if self.embedding else []
        if not self.swaps and not self.skips:
            return [f"kernels: nothing swapped (policy {self.policy})", *where_embedded]
        lines = [f"kernels: {name} in {count} modules" for name, count in self.counts().items()]
        if self.engine:
            lines.append(f"kernels: {self.engine}")
        lines += [f"kernels: {count} forwards took the model's own path: {why}" for why, count in self.declined.items()]
        skipped = Counter((skip.patch, skip.reason) for skip in self.skips)
        for (patch, reason), count in skipped.items():
            where = f"{patch} in {count} modules" if patch else "the whole model"
            lines.append(f"kernels: {where} left as it was: {reason}")
        return lines + where_embedded

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

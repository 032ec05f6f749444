"""What one patch is: the modules it claims, the conditions under which it may, and the forward it gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

Forward = Callable[..., Any]
"""``forward(self, *args, **kwargs)`` with the arguments of the class it stands in for."""

Requirement = Callable[[nn.Module], str | None]
"""None when the module can be swapped, else the reason in words."""


class PatchError(RuntimeError):
    """A patch was asked for that cannot be made: unknown name, conflict, or a skip under policy "required"."""


@dataclass(frozen=True, kw_only=True)
class PatchSpec:
    """One kind of swap in one family."""

    family: str
    """transformers' model type."""
    operation: str
    """What runs instead, by the name of the operation in ``dropforge_kernels.ops``."""
    target: type[nn.Module]
    """Instances of exactly this class are claimed; a subclass may have another forward and is left alone."""
    build: Callable[[Forward], Forward]
    """Makes the new forward from the class's own one, once per session, so that modules may share work through it."""
    requires: tuple[Requirement, ...] = ()
    exclude: tuple[str, ...] = ()
    """Last path components that are left out, because another swap already does their work."""
    exact: bool = True
    """The same formula, other rounding. What is not exact runs only when it is named."""

    @property
    def name(self) -> str:
        return f"{self.family}.{self.operation}"

    def targets(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """(path, module) of every instance in the model."""
        for path, module in model.named_modules():
            if type(module) is self.target and path.rsplit(".", 1)[-1] not in self.exclude:
                yield path, module

    def obstacle(self, module: nn.Module) -> str | None:
        """The first reason why this module cannot be swapped; None when it can."""
        for requirement in self.requires:
            reason = requirement(module)
            if reason is not None:
                return reason
        return None

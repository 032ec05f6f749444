"""A frozen head beside layers of another dtype, cast once instead of at every forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, eq=False)
class HeadCopy:
    """The copy and what it was made of. Costs its own memory: 1 GiB for 128,256 x 4,096 values in 16 bits."""

    weight: nn.Parameter
    version: int
    copy: torch.Tensor

    @classmethod
    def of(cls, head: Any, dtype: torch.dtype) -> HeadCopy | None:
        """None for a head that is trained, has ``dtype`` already or is no plain linear layer."""
        if type(head) is not nn.Linear or head.weight.requires_grad or head.weight.dtype is dtype:
            return None
        return cls(head.weight, head.weight._version, head.weight.detach().to(dtype))

    def is_of(self, weight: torch.Tensor, dtype: torch.dtype) -> bool:
        """Whether the copy still is this weight in this dtype."""
        same = weight is self.weight and weight._version == self.version and not weight.requires_grad
        return same and self.copy.dtype is dtype and self.copy.device == weight.device

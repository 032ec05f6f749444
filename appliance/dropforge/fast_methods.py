"""Methods that a loaded model carries on its own object: the exporters. Classes and other models stay as they are."""

from __future__ import annotations

import types
from typing import Any


def give_methods(model: Any) -> None:
    """save_pretrained_merged, save_pretrained_gguf."""
    from dropforge import fast_saving

    model.save_pretrained_merged = types.MethodType(fast_saving.save_pretrained_merged, model)
    model.save_pretrained_gguf = types.MethodType(fast_saving.save_pretrained_gguf, model)

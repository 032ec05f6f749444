"""Methods that a loaded model carries on its own object: exporters and adapters. Classes stay as they are."""

from __future__ import annotations

import types
from typing import Any


def give_methods(model: Any) -> None:
    """save_pretrained_merged, save_pretrained_gguf, push_to_hub_merged, push_to_hub_gguf; and how adapters are
    saved and loaded.
    """
    from peft import PeftModel

    from dropforge.fast import adapter_loading, adapter_saving, pushing, saving

    if isinstance(model, PeftModel):
        model.save_pretrained = types.MethodType(adapter_saving.save_pretrained, model)  # type: ignore[method-assign]
    model.load_adapter = types.MethodType(adapter_loading.load_adapter, model)
    model.save_pretrained_merged = types.MethodType(saving.save_pretrained_merged, model)
    model.save_pretrained_gguf = types.MethodType(saving.save_pretrained_gguf, model)
    model.push_to_hub_merged = types.MethodType(pushing.push_to_hub_merged, model)
    model.push_to_hub_gguf = types.MethodType(pushing.push_to_hub_gguf, model)

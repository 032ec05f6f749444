"""Methods that a loaded model carries on its own object: exporters and adapters. Classes stay as they are."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NoReturn

from dropforge.errors import CommandError

REFUSED = {
    "load_lora": "call model.load_adapter(folder, adapter_name=...) and model.set_adapter(...)",
    "fast_generate": "call model.generate(...): there is no vLLM behind the model",
    "save_pretrained_torchao": "call model.save_pretrained_merged(folder, tokenizer), and quantise that",
}
"""Methods of other libraries' models whose effect is missing -> what to do instead."""


def give_methods(model: Any) -> None:
    """save_pretrained_merged, save_pretrained_gguf, push_to_hub_merged, push_to_hub_gguf; and how adapters are
    saved and loaded.
    """
    from peft import PeftModel

    from dropforge.fast import adapter_loading, adapter_saving, pushing, saving

    if isinstance(model, PeftModel):
        model.save_pretrained = types.MethodType(adapter_saving.save_pretrained, model)  # type: ignore[method-assign]
    model.load_adapter = types.MethodType(adapter_loading.load_adapter, model)
    model.save_lora = model.save_pretrained
    for name, instead in REFUSED.items():
        setattr(model, name, _refusal(name, instead))
    model.save_pretrained_merged = types.MethodType(saving.save_pretrained_merged, model)
    model.save_pretrained_gguf = types.MethodType(saving.save_pretrained_gguf, model)
    model.push_to_hub_merged = types.MethodType(pushing.push_to_hub_merged, model)
    model.push_to_hub_gguf = types.MethodType(pushing.push_to_hub_gguf, model)


def _refusal(name: str, instead: str) -> Callable[..., NoReturn]:
    def refuse(*arguments: Any, **options: Any) -> NoReturn:
        raise CommandError(
            f"model.{name} is not in this release", code="api-not-built", where=f"model.{name}", fix=instead
        )

    return refuse

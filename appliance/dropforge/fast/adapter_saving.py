"""Saving an adapter: PEFT's way, with grown embeddings whenever they would be lost without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dropforge.fast.state import needed_state


def save_pretrained(
    self: Any,
    save_directory: str | Path,
    safe_serialization: bool = True,
    selected_adapters: list[str] | None = None,
    save_embedding_layers: str | bool = "auto",
    **arguments: Any,
) -> None:
    """As PeftModel.save_pretrained, except for what save_embedding_layers="auto" means.

    PEFT asks the hub for the base's config to find out whether the embedding has grown, and without a network takes it
    that it has not, so that new tokens are lost. Here the model remembers what was stored.
    """
    from peft import PeftModel

    if save_embedding_layers == "auto":
        save_embedding_layers = must_save_embeddings(self)
    PeftModel.save_pretrained(
        self, str(save_directory), safe_serialization, selected_adapters, save_embedding_layers, **arguments
    )


def must_save_embeddings(model: Any) -> bool:
    """The embedding has other rows than the stored model, and is not saved already as a module trained in full."""
    rows = needed_state(model).stored_rows
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if rows is None or weight is None or weight.shape[0] == rows:
        return False
    saved = set(model.peft_config[model.active_adapter].modules_to_save or ())
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    return not ("embed_tokens" in saved and (tied or "lm_head" in saved))

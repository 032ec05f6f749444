"""get_peft_model called for a model that has an adapter: the same one trains on, another one is refused.

Scripts that go on from a saved adapter often keep their call of get_peft_model.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from dropforge.errors import CommandError
from dropforge.fast.adapter import EMBEDDINGS, Switches, Targets, is_on, layer_of

LOG = logging.getLogger("dropforge")
COMPARED = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


def keep_adapter(
    model: Any, *, chosen: Targets, layers: list[int] | None, switches: Switches, fields: Mapping[str, Any]
) -> Any:
    """The model as it is when its adapter is the one asked for.

    chosen: what is asked for, by names in the base model. Raises CommandError api-adapter-twice, naming the argument.
    """
    config = model.peft_config[model.active_adapter]
    pairs = {name: (getattr(config, name), fields[name]) for name in COMPARED}
    pairs["target_modules"] = (_adapted(model), _asked(model, chosen.modules, layers=layers, switches=switches))
    # Tied to the embedding, the head is trained with it without being named.
    saved = sorted(set(config.modules_to_save or ()) - ({EMBEDDINGS[1]} if chosen.tied else set()))
    pairs["modules_to_save"] = (saved, sorted(chosen.saved))
    for name, (have, asked) in pairs.items():
        if have == asked:
            continue
        raise CommandError(
            f"this model has an adapter already, with another {name}", code="api-adapter-twice", where=name,
            why=f"{_shown(have)} in the adapter, {_shown(asked)} asked for",
            fix="leave get_peft_model out to train the adapter on; for another adapter load the base model",
        )  # fmt: skip
    LOG.warning("get_peft_model changes nothing: the model has this adapter already, and it trains on")
    return model


def _adapted(model: Any) -> list[str]:
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model()
    return sorted(path for path, module in base.named_modules() if isinstance(module, LoraLayer))


def _asked(model: Any, names: str | list[str], *, layers: list[int] | None, switches: Switches) -> list[str]:
    """Paths that `names` would adapt in the model without its adapter."""
    from peft.tuners.lora import LoraLayer
    from torch.nn import Linear

    base = model.get_base_model()
    head = base.get_output_embeddings()
    inside = tuple(f"{path}." for path in _adapted(model))
    found = []
    for path, module in base.named_modules():
        if not isinstance(module, (Linear, LoraLayer)) or path.startswith(inside):
            continue
        if names == "all-linear":
            wanted = module is not head and "modules_to_save" not in path
        elif isinstance(names, str):
            wanted = re.fullmatch(names, path) is not None
        else:
            wanted = any(path == name or path.endswith(f".{name}") for name in names)
        if wanted and is_on(path, switches) and (layers is None or layer_of(path) in layers):
            found.append(path)
    return sorted(found)


def _shown(value: Any) -> str:
    if not isinstance(value, list) or len(value) <= 2:
        return repr(value)
    return f"{len(value)} modules ({', '.join(sorted({path.rsplit('.', 1)[-1] for path in value}))})"

"""Models that read pictures beside text: which class loads them, and which part of them learns from text.

Only the language model learns from text. The vision tower and what joins it to the language model never run on it, so
they stay frozen, bit for bit; and matrices of the tower get no adapter although they often have the same names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropforge.errors import ModelError
from dropforge.files import read_json

if TYPE_CHECKING:
    from torch import nn

    from dropforge.fast.adapter import Targets

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Say how a picture becomes numbers; a folder without them reads none."""


def reads_pictures(config: Mapping[str, Any]) -> bool:
    """By config.json: transformers' classes for pictures and text keep the tower's settings in `vision_config`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return "vision_config" in config and config.get("model_type") in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def auto_class(folder: Path) -> Any:
    """transformers' class that loads the whole model in `folder`, tower included."""
    import transformers

    whole = reads_pictures(read_json(folder / "config.json"))
    return transformers.AutoModelForImageTextToText if whole else transformers.AutoModelForCausalLM


def language_part(model: Any) -> str | None:
    """Path of the language model inside a model that reads pictures; None for every other model."""
    if getattr(model.config, "vision_config", None) is None:
        return None
    decoder = model.get_decoder()
    return next((path for path, module in model.named_modules() if module is decoder and path), None)


def language_path(folder: Path) -> str | None:
    """language_part of the model in a folder, without its weights."""
    return language_part(_empty_model(folder)) if reads_pictures(read_json(folder / "config.json")) else None


def _empty_model(folder: Path) -> Any:
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with torch.device("meta"):
        return auto_class(folder).from_config(config, trust_remote_code=False)


def in_language_part(name: str, part: str) -> bool:
    """Whether a module or weight called `name` belongs to the language model at `part`, or is its head."""
    return name.startswith((f"{part}.", "lm_head"))


def within_language(model: nn.Module, chosen: Targets) -> Targets:
    """Names of modules are meant within the language model.

    Raises ModelError (adapter-target-unknown) for names that only the tower has.
    """
    from dropforge.fast.adapter import linear_paths

    part = language_part(model)
    if part is None:
        return chosen
    paths = [path for path in linear_paths(model, chosen.modules) if in_language_part(path, part)]
    asked = [] if isinstance(chosen.modules, str) else chosen.modules
    lost = [name for name in asked if not any(path == name or path.endswith(f".{name}") for path in paths)]
    if lost:
        raise ModelError(
            f"{', '.join(lost)} lies outside the language model", code="adapter-target-unknown",
            where="adapter.target_modules",
            why="this model reads pictures too, and text trains its language model only",
            fix="name layers of the language model, or write all-linear",
        )  # fmt: skip
    return dataclasses.replace(chosen, modules=paths)


def freeze_towers(model: nn.Module) -> None:
    """What text never runs through is not trained when every weight is."""
    part = language_part(model)
    if part is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(in_language_part(name, part))


def stored_names(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Name in the loaded model -> name in the files, for the tensors `names` of the model in `folder`.

    transformers renames weights when it loads a model that reads pictures, and back when it saves it. Empty for models
    that keep their names, which are all that read text only.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    if not reads_pictures(read_json(folder / "config.json")):
        return {}
    model = _empty_model(folder)
    known = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    found = {}
    for name in names:
        renamed, joined = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if joined is None:  # else several tensors of the files are one in memory
            found[renamed] = name
    return found

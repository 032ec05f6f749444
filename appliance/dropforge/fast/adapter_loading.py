"""A further adapter for a loaded model (`model.load_adapter`): PEFT's way, once it is known to be one of this model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dropforge.errors import DropforgeError
from dropforge.fast.adapter_base import RECORD, Candidate, check_adapter, describe_config
from dropforge.fast.source import ADAPTER_CONFIG
from dropforge.fast.state import needed_state
from dropforge.files import read_json


def load_adapter(self: Any, model_id: str | Path | None = None, *arguments: Any, **options: Any) -> Any:
    """As PeftModel.load_adapter, or transformers' load_adapter on a model without an adapter.

    Raises ModelError before weights are read: adapter-wrong-base, adapter-target-unknown, adapter-wrong-size.
    """
    keyword = "peft_model_id" if "peft_model_id" in options else "model_id"
    name = options.pop(keyword, None) if model_id is None else model_id
    if name is None:  # tensors are given instead
        return type(self).load_adapter(self, *arguments, **options)
    folder = _folder(str(name), options)
    if folder is not None:
        config = _told(read_json(folder / ADAPTER_CONFIG), own=needed_state(self).source.id)
        check_adapter(config, folder=folder, base=_candidate(self, config), argument=keyword)
    return type(self).load_adapter(self, str(name), *arguments, **options)


def _folder(name: str, options: Mapping[str, Any]) -> Path | None:
    """Where the adapter's config lies; of one on the hub only that file is fetched. None: left to PEFT to say why."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    subfolder = options.get("subfolder") or ""
    here = Path(name) / subfolder
    if (here / ADAPTER_CONFIG).is_file():
        return here
    passed = {key: options[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in options}
    try:
        return Path(hf_hub_download(name, ADAPTER_CONFIG, subfolder=subfolder or None, **passed)).parent
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
        return None


def _told(config: dict[str, Any], *, own: str) -> dict[str, Any]:
    """The adapter's config; where it does not say what it was trained on, with what the base it names says, if that
    lies on this machine.
    """
    named = config.get("base_model_name_or_path")
    if (config.get("auto_mapping") or {}).get(RECORD) or not named or named == own:
        return config
    from transformers import AutoConfig

    from dropforge.fast.source import find_source

    try:
        source, _ = find_source(named, revision=config.get("revision"), remote_code=False, offline=True, token=None)
        there = AutoConfig.from_pretrained(source.path, local_files_only=True, trust_remote_code=False)
    except (DropforgeError, ValueError, KeyError, OSError):
        return config
    return {**config, "auto_mapping": describe_config(there)}


def _candidate(model: Any, config: Mapping[str, Any]) -> Candidate:
    import torch
    from peft import PeftModel

    state = needed_state(model)
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.device("meta"):
        empty = type(base)(base.config)
    named = config.get("base_model_name_or_path")
    return Candidate(
        empty=empty, name=state.source.id, rows=base.get_input_embeddings().weight.shape[0],
        tokenizer=state.source.path,
        fix="load an adapter of this model" + (f"; this one names {named} as its base" if named else ""),
    )  # fmt: skip

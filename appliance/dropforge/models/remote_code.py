"""Python code that a model brings along: whether the model needs it, and a fingerprint that says which code it is.

transformers runs such code when `auto_map` of config.json names a class and its caller says so. Here that takes the
three signs of code_approval.py; this file only looks, and never imports anything from the folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dropforge.files import sha256_file

WEIGHTS_SUFFIX = ".safetensors"
"""The one kind of file that cannot hold code. Everything else is part of the fingerprint."""
_KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


@dataclass(frozen=True, kw_only=True)
class CodeInside:
    """What a person approves when they approve a model's code."""

    fingerprint: str
    """SHA-256 over names and hashes of all files but the weights, in hex."""
    files: dict[str, str]
    """Relative name to SHA-256."""

    @property
    def modules(self) -> list[str]:
        return [name for name in self.files if name.endswith(".py")]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises ValueError when it is no JSON object."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError("it holds no JSON object")
    return config


def needs_code(config: dict[str, Any]) -> bool:
    """True when the installed transformers has no class of its own for this model and the model names one it brings."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind, named = config.get("model_type"), config.get("auto_map")
    if not named:
        return False
    brings_model = not isinstance(named, dict) or "AutoModelForCausalLM" in named
    return kind not in CONFIG_MAPPING_NAMES or (brings_model and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def foreign_class(config: dict[str, Any]) -> str:
    """The entry of auto_map whose code lies in another repository (`org/name--module.Class`); empty: there is none."""
    return next((reference for reference in _texts(config.get("auto_map")) if "--" in reference), "")


def foreign_kernel(config: dict[str, Any]) -> str:
    """The part of a config that has transformers fetch a kernel from the hub and run it; empty when there is none."""
    for key, value in _items(config):
        if key in _KERNEL_KEYS and any("/" in text for text in _texts(value)):  # a kernel of the hub: org/name
            return f"{key}: {value}"
    return ""


def scan(folder: Path) -> CodeInside:
    """Fingerprint of everything in a model's folder but the weights; links are followed (the hub's cache is links)."""
    files = {
        path.relative_to(folder).as_posix(): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != WEIGHTS_SUFFIX
    }
    listed = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
    return CodeInside(fingerprint=hashlib.sha256(listed.encode()).hexdigest(), files=files)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key, item
            yield from _items(item)
    elif isinstance(value, list):
        for item in value:
            yield from _items(item)

"""What a model that reads pictures needs beside weights and tokenizer, carried from the base, and proof it is whole."""

from __future__ import annotations

from pathlib import Path

from dropforge.errors import ExportError
from dropforge.export.adapter_file import read_adapter
from dropforge.export.safetensors_stream import index_folder, read_tensor
from dropforge.files import read_json, write_json
from dropforge.models.pictures import PROCESSOR_FILES, in_language_part, language_path, reads_pictures, stored_names

_LEFT_OUT = ("auto_map", "chat_template", "_name_or_path", "name_or_path")
"""Code, paths, and the base's chat template: the one the training used lies beside the tokenizer."""


def write_processor(base: Path, target: Path) -> list[str]:
    """Copy the settings of the base's picture processor; returns the names of the files."""
    if not reads_pictures(read_json(base / "config.json")):
        return []
    names = [name for name in PROCESSOR_FILES if (base / name).is_file()]
    for name in names:
        found = read_json(base / name)
        write_json(target / name, {key: value for key, value in found.items() if key not in _LEFT_OUT})
    return names


def compare_towers(folder: Path, *, base: Path, adapter: Path | None) -> int | None:
    """How many tensors outside the language model are the base's, rounded to the folder's type.

    All that the adapter does not change must be; without one every weight may have been trained (a job trains none
    there). None for a model that reads text only. Raises ExportError (export-merge-wrong).
    """
    import torch

    part = language_path(folder)
    if part is None:
        return None
    mine, theirs = index_folder(folder), index_folder(base)
    loaded = {file: name for name, file in stored_names(folder, mine).items()}
    changes = read_adapter(adapter).changes if adapter else {}
    changed = {f"{module}.{part}" for module, change in changes.items() for part in ("weight", *change.replaced)}
    unchanged = 0
    for name in mine:
        path = loaded.get(name, name)
        if in_language_part(path, part) or path in changed:
            continue
        found = read_tensor(mine[name], name)
        if name in theirs and torch.equal(found, read_tensor(theirs[name], name).to(found.dtype)):
            unchanged += 1
        elif adapter is not None:
            raise ExportError(
                f"{name} is not the base model's", code="export-merge-wrong", where="merged",
                why="text does not train what reads pictures, so it must be unchanged",
                fix="this is a fault of Dropforge, not of your data; please report it with provenance.json",
            )  # fmt: skip
    return unchanged

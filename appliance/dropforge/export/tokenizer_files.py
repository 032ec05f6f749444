"""Put the training tokenizer into a model folder so that every reader cuts text as the training did.

Repairs, each for a fault that is silent otherwise (transformers 5 writes neither file):
- `tokenizer.model` for SentencePiece-type vocabularies: without it llama.cpp's converter gives all pieces one score;
- `added_tokens_decoder`: without it the converter turns added markers into unused tokens.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from dropforge.errors import ExportError
from dropforge.files import read_json, write_bytes, write_json

COPIED = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "vocab.json",
    "merges.txt", "added_tokens.json",
)  # fmt: skip
SPACE = "\u2581"
_PATH_KEYS = ("name_or_path", "vocab_file", "tokenizer_file", "merges_file", "auto_map")


def write_tokenizer(source: Path, target: Path, *, base: Path) -> list[str]:
    """Copy the tokenizer of folder `source` into `target` and repair it; returns what was repaired.

    `base` is asked for its tokenizer.model. Raises ExportError (export-tokenizer) when there is no tokenizer.json.
    """
    if not (source / "tokenizer.json").is_file():
        raise ExportError(
            "the tokenizer has no tokenizer.json", code="export-tokenizer", where=source.name,
            why="older and Python-coded tokenizers cannot be carried over exactly",
            fix="use a model with a fast tokenizer",
        )  # fmt: skip
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    definition = read_json(target / "tokenizer.json")
    repairs = _repair_config(target / "tokenizer_config.json", definition)
    if is_sentencepiece(definition):
        own = [folder / "tokenizer.model" for folder in (source, base) if (folder / "tokenizer.model").is_file()]
        if own and _same_pieces(own[0], definition):
            shutil.copyfile(own[0], target / "tokenizer.model")
        else:
            write_bytes(target / "tokenizer.model", _sentencepiece_bytes(target, definition))
            repairs.append("tokenizer.model rebuilt from tokenizer.json")
    return repairs


def is_sentencepiece(definition: dict[str, Any]) -> bool:
    """True for a Llama- or Gemma-type vocabulary: BPE with byte fallback and spaces written as U+2581."""
    model = definition.get("model") or {}
    return model.get("type") == "BPE" and bool(model.get("byte_fallback")) and "<0x0A>" in (model.get("vocab") or {})


def space_prefix(definition: dict[str, Any]) -> str:
    """Where the tokenizer puts a space before text: never, first (start of the text only) or always (each fragment)."""
    section = definition.get("pre_tokenizer") or {}
    for part in section.get("pretokenizers", [section]):
        if part.get("type") == "Metaspace":
            return str(part.get("prepend_scheme", "always"))
    normalizer = definition.get("normalizer") or {}
    kinds = [part.get("type") for part in normalizer.get("normalizers", [normalizer])]
    return "always" if "Prepend" in kinds else "never"


def _repair_config(path: Path, definition: dict[str, Any]) -> list[str]:
    config: dict[str, Any] = read_json(path) if path.exists() else {}
    repairs = []
    for key in _PATH_KEYS:
        if config.pop(key, None) is not None:
            repairs.append(f"tokenizer_config.json: {key} removed")
    added = definition.get("added_tokens") or []
    if added and not config.get("added_tokens_decoder"):
        fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        config["added_tokens_decoder"] = {str(token["id"]): {key: token[key] for key in fields} for token in added}
        repairs.append("tokenizer_config.json: added_tokens_decoder written")
    write_json(path, config)
    return repairs


def _same_pieces(path: Path, definition: dict[str, Any]) -> bool:
    """True when every piece of the SentencePiece file has the id it has in tokenizer.json."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    processor.LoadFromFile(str(path))
    vocab = definition["model"]["vocab"]
    added = {token["id"]: token["content"] for token in definition.get("added_tokens") or []}
    by_id = {index: text for text, index in vocab.items()} | added
    size = processor.GetPieceSize()
    return size >= len(vocab) and all(
        by_id.get(i, processor.IdToPiece(i)) == processor.IdToPiece(i) for i in range(size)
    )


def _sentencepiece_bytes(folder: Path, definition: dict[str, Any]) -> bytes:
    """tokenizer.model from tokenizer.json: the score of a piece is minus the rank of the merge that makes it."""
    from dropforge.models.sentencepiece_file import pieces_from_bpe, sentencepiece_model

    model = definition["model"]
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"])
    merges = [(str(left), str(right)) for left, right in pairs]
    special = [token["content"] for token in definition.get("added_tokens") or [] if token["special"]]
    try:
        pieces = pieces_from_bpe(model["vocab"], merges, special=special, unknown=model.get("unk_token") or "<unk>")
    except ValueError as error:
        raise ExportError(
            "the vocabulary cannot be written as tokenizer.model", code="export-tokenizer", where="tokenizer.json",
            why=str(error),
        ) from error  # fmt: skip
    config = read_json(folder / "tokenizer_config.json")
    ids = {
        name: _token_id(config.get(name), definition) for name in ("bos_token", "eos_token", "pad_token", "unk_token")
    }
    # A token added to the vocabulary is no piece of the file; its readers have it from tokenizer_config.json.
    ids = {name: found if found < len(pieces) else -1 for name, found in ids.items()}
    return sentencepiece_model(
        pieces, bos_id=ids["bos_token"], eos_id=ids["eos_token"], pad_id=ids["pad_token"],
        unk_id=max(ids["unk_token"], 0), add_dummy_prefix=space_prefix(definition) != "never",
    )  # fmt: skip


def _token_id(token: Any, definition: dict[str, Any]) -> int:
    text = token.get("content") if isinstance(token, dict) else token
    for entry in definition.get("added_tokens") or []:
        if entry["content"] == text:
            return int(entry["id"])
    return int(definition["model"]["vocab"].get(text, -1))


def set_eos(config_path: Path, token: str) -> None:
    """Name the end token in a tokenizer_config.json."""
    write_json(config_path, {**read_json(config_path), "eos_token": token})


def end_generation(folder: Path, end: int | None) -> None:
    """Make generate() stop at the turn's end token too; base models often name only their document end."""
    if end is None:
        return
    path = folder / "generation_config.json"
    config = read_json(path) if path.exists() else {}
    known = config.get("eos_token_id")
    ids = known if isinstance(known, list) else [] if known is None else [known]
    if end not in ids:
        config["eos_token_id"] = [end, *ids] if ids else end
    write_json(path, config)

"""Name llama.cpp's pre-tokenizer by definition.

llama.cpp's converter knows a byte-level BPE tokenizer by the hash of its ids for one long text, so any tokenizer with
another vocabulary (trained anew, or with added tokens) is unknown to it even when it splits text in a way llama.cpp
implements. What decides how text is split is the `pre_tokenizer` section of tokenizer.json; this table maps the
definitions that llama.cpp implements to the name it gives them. Token ids are compared afterwards in any case.
"""

from __future__ import annotations

from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# (steps of the pre-tokenizer, merges ignored for whole words) -> llama.cpp's name
_NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    (("byte-level-regex",), False): "gpt-2",
    (("digits", "byte-level-regex"), False): "smollm",
    ((f"split {_LLAMA3}", "byte-level"), True): "llama-bpe",
    ((f"split {_LLAMA3}", "byte-level"), False): "smaug-bpe",
    ((f"split {_QWEN2}", "byte-level"), False): "qwen2",
    ((f"split {_QWEN35}", "byte-level"), False): "qwen35",
}


def recognise(tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name for the pre-tokenizer of a parsed tokenizer.json, or None when it implements no such thing."""
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE":
        return None
    section = tokenizer.get("pre_tokenizer") or {}
    parts = section.get("pretokenizers", [section])
    steps = tuple(_step(part) for part in parts)
    return _NAMES.get((steps, bool(model.get("ignore_merges"))))


def _step(part: dict[str, Any]) -> str:
    kind = part.get("type")
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return "byte-level-regex" if part.get("use_regex", True) else "byte-level"
    if kind == "Digits" and part.get("individual_digits"):
        return "digits"
    if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        return f"split {(part.get('pattern') or {}).get('Regex')}"
    return f"other {kind}"

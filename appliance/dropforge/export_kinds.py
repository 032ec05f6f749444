"""The words a spec may use under `export`, and what their short forms stand for."""

from __future__ import annotations

import difflib
import re
from typing import Any

GGUF_TYPES = (
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_0", "q5_1", "q4_k_m", "q4_k_s", "q4_0", "q4_1",
    "iq4_nl", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k", "q2_k_l", "iq3_m", "iq3_s", "iq3_xs", "iq3_xxs",
    "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s", "tq1_0", "tq2_0",
)  # fmt: skip
# These lose too much without an importance matrix; llama.cpp refuses them.
GGUF_NEEDS_IMATRIX = frozenset({"iq3_xs", "iq3_xxs", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s"})
GGUF_ALIASES = {
    "not_quantized": "f16",
    "fast_quantized": "q8_0",
    "quantized": "q4_k_m",
    "q5_k": "q5_k_m",
    "q4_k": "q4_k_m",
    "q3_k": "q3_k_m",
    "q3_k_xs": "iq3_xs",
}
DETAILS = {"gguf": GGUF_TYPES, "fp8": ("", "block", "static"), "mmproj": ("", "f32", "f16", "bf16", "q8_0")}
"""What may follow the colon of an entry; nothing for kinds not listed."""
EXPORT_KINDS = (
    "adapter", "merged", "merged_4bit", "gguf", "mmproj", "fp8", "ollama", "lora_gguf", "torchao", "executorch",
)  # fmt: skip


def normalise_exports(value: Any) -> Any:
    """`gguf:q4_k_m,q8_0` becomes two entries; aliases become their types; repetitions go."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, (list, tuple)):
        return value
    entries: list[Any] = []
    for item in value:
        if isinstance(item, str) and item.lower().startswith("gguf:"):
            types = [text.strip().lower() for text in item[5:].split(",")]
            parts = [text.partition(":") for text in types]
            entries += [f"gguf:{GGUF_ALIASES.get(name, name)}{colon}{size}" for name, colon, size in parts]
        else:
            entries.append(item)
    return tuple(dict.fromkeys(entries)) if all(isinstance(e, str) for e in entries) else tuple(entries)


def check_export(entry: str) -> str:
    kind, _, detail = entry.partition(":")
    if kind not in EXPORT_KINDS:
        raise ValueError(f"unknown export {entry!r}{_nearest(kind, EXPORT_KINDS)}; known: {', '.join(EXPORT_KINDS)}")
    if kind == "gguf":
        detail, found, size = detail.partition(":")
        if detail not in GGUF_TYPES:
            near = _nearest(detail, (*GGUF_TYPES, *GGUF_ALIASES))
            raise ValueError(f"unknown GGUF type {detail!r}{near}; write gguf:TYPE with one of {', '.join(GGUF_TYPES)}")
        if found and not part_bytes(size):
            raise ValueError(f"{size!r} is no size of a part; write gguf:{detail}:2GB for files of at most 2 GB")
    if kind in DETAILS and detail not in DETAILS[kind]:
        known = ", ".join(f"{kind}:{word}" if word else kind for word in DETAILS[kind])
        raise ValueError(f"unknown kind of {kind}: {detail!r}; write one of {known}")
    if kind not in DETAILS and detail:
        raise ValueError(f"{kind} takes no detail, so write just {kind!r}")
    return entry


def split_detail(detail: str) -> tuple[str, int]:
    """The type and the largest size of a part in bytes (0: one file) of a checked `gguf:` entry's detail."""
    gguf_type, _, size = detail.partition(":")
    return gguf_type, part_bytes(size)


def part_bytes(text: str) -> int:
    """Bytes of a size such as 2GB or 500MB; 0 for anything else."""
    match = re.fullmatch(r"([1-9]\d{0,4})(mb|gb)", text.lower())
    return int(match[1]) * {"mb": 10**6, "gb": 10**9}[match[2]] if match else 0


def _nearest(word: str, known: tuple[str, ...]) -> str:
    found = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {found[0]!r}?" if found else ""

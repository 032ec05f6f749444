"""Columns that hold images or audio, recognised by their values or by the names of the files they point to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff")
AUDIO = (".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a")
_IMAGE_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")
_AUDIO_STARTS = (b"fLaC", b"OggS", b"ID3", b"\xff\xfb")


def media_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Column -> `images` or `audio`, seen from the first values that are there."""
    found: dict[str, str] = {}
    for column in dict.fromkeys(name for row in rows for name in row):
        value = next((row[column] for row in rows if row.get(column) not in (None, "", [])), None)
        kind = media_kind(value)
        if kind:
            found[column] = kind
    return found


def media_kind(value: Any) -> str | None:
    """`images` or `audio` for a value (a path, bytes, {"bytes", "path"}, {"array", "sampling_rate"}, or a list)."""
    if isinstance(value, list) and value:
        return media_kind(value[0])
    if isinstance(value, Mapping):
        if "sampling_rate" in value:
            return "audio"
        if value.keys() <= {"bytes", "path"}:
            return media_kind(value.get("bytes") or value.get("path"))
        return None
    if isinstance(value, bytes):
        if value.startswith(_IMAGE_STARTS) or value[8:12] == b"WEBP":
            return "images"
        return "audio" if value.startswith(_AUDIO_STARTS) or value[8:12] == b"WAVE" else None
    if isinstance(value, str) and len(value) < 1000:
        name = value.lower().partition("?")[0]
        return "images" if name.endswith(IMAGES) else "audio" if name.endswith(AUDIO) else None
    return None

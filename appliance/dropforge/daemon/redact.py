"""Values of secrets taken out of texts that leave the data root, in the forms in which they are usually written."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import quote

from dropforge.paths import DataRoot
from dropforge.settings import secret_variables

MIN_LENGTH = 6
"""Shorter values would hit innocent words."""
_MAX_BYTES = 4096
_SHOWN = "[redacted]"


def secret_values(root: DataRoot) -> list[str]:
    """The content of every readable small file in secrets/."""
    values = []
    for path in sorted(root.secrets.iterdir()) if root.secrets.is_dir() else []:
        if path.is_file() and not path.is_symlink() and path.stat().st_size <= _MAX_BYTES:
            values.append(path.read_text(encoding="utf-8", errors="replace").strip())
    return values


def known_secrets(root: DataRoot) -> list[str]:
    """Those of secrets/, and values of environment variables whose names say that they are secret."""
    return [*secret_values(root), *secret_variables()]


def redact_all(value: Any, secrets: Sequence[str]) -> Any:
    """`redact` on every text inside a JSON value."""
    if isinstance(value, str):
        return redact(value, secrets)
    if isinstance(value, dict):
        return {key: redact_all(item, secrets) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_all(item, secrets) for item in value]
    return value


def redact(text: str, secrets: Iterable[str]) -> str:
    """`text` without any of `secrets`, plain, URL-quoted or in base64."""
    forms = {form for secret in secrets if len(secret) >= MIN_LENGTH for form in _forms(secret)}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, _SHOWN)
    return text


def _forms(secret: str) -> tuple[str, ...]:
    encoded = base64.b64encode(secret.encode()).decode()
    return secret, quote(secret, safe=""), encoded, encoded.rstrip("=")

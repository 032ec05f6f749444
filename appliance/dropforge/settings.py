"""All environment variables Dropforge reads, read once, frozen. No other file touches os.environ for configuration."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Configuration of the process. Every field is documented in docs/reference/environment.md."""

    data_root: Path
    """DROPFORGE_DATA: the folder that holds everything mutable."""
    cache: Path
    """DROPFORGE_CACHE: built tools and builtin models that several data roots share."""
    device: str
    """DROPFORGE_DEVICE: auto, cpu or cuda."""
    llama_cpp: Path | None
    """DROPFORGE_LLAMA_CPP: folder with llama.cpp's tools and converter; default: the cache, then /opt/llama.cpp."""
    poll_seconds: float
    """DROPFORGE_POLL_SECONDS: how often the daemon looks at the inbox."""
    settle_seconds: float
    """DROPFORGE_SETTLE_SECONDS: how long a dropped file must stay unchanged before it is taken."""
    grace_seconds: float
    """DROPFORGE_GRACE_SECONDS: how long a job may take to save its checkpoint when it is stopped."""
    stall_seconds: float
    """DROPFORGE_STALL_SECONDS: training stops after so long without a step, or 20 times its slowest; 0: never."""
    memory_floor_mib: float
    """DROPFORGE_MEMORY_FLOOR_MIB: the largest job is stopped when less memory than this is left; 0: never."""
    metrics_port: int
    """DROPFORGE_METRICS_PORT: the daemon's numbers for Prometheus on http://127.0.0.1:PORT/metrics; 0: off."""
    notify_url: str = field(repr=False)
    """DROPFORGE_NOTIFY_URL: where the daemon tells of ended jobs; default: the content of secrets/NOTIFY_URL."""
    notify_format: str
    """DROPFORGE_NOTIFY_FORMAT: webhook (JSON) or ntfy."""
    allow_remote_code: bool
    """DROPFORGE_ALLOW_REMOTE_CODE: 1 lets code that comes with a model run once it is approved; default: never."""
    ollama_url: str
    """DROPFORGE_OLLAMA_URL: a running Ollama (http://127.0.0.1:11434) that gets every `ollama` export; empty: none."""


def _read() -> Settings:
    env = os.environ
    home = Path(env.get("HOME") or "/tmp")
    container_root = Path("/workspace/work")
    default_root = container_root if container_root.is_dir() else home / "dropforge"
    llama = env.get("DROPFORGE_LLAMA_CPP")
    return Settings(
        data_root=Path(env.get("DROPFORGE_DATA") or default_root).absolute(),
        cache=Path(env.get("DROPFORGE_CACHE") or home / ".cache" / "dropforge").absolute(),
        device=env.get("DROPFORGE_DEVICE") or "auto",
        llama_cpp=Path(llama).absolute() if llama else None,
        poll_seconds=_number("DROPFORGE_POLL_SECONDS", 1.0),
        settle_seconds=_number("DROPFORGE_SETTLE_SECONDS", 5.0),
        grace_seconds=_number("DROPFORGE_GRACE_SECONDS", 120.0),
        stall_seconds=_number("DROPFORGE_STALL_SECONDS", 1800.0),
        memory_floor_mib=_number("DROPFORGE_MEMORY_FLOOR_MIB", 512.0, unit="a number of MiB"),
        metrics_port=int(_number("DROPFORGE_METRICS_PORT", 0, unit="the number of a port")),
        notify_url=env.get("DROPFORGE_NOTIFY_URL") or "",
        notify_format=env.get("DROPFORGE_NOTIFY_FORMAT") or "webhook",
        allow_remote_code=_switch("DROPFORGE_ALLOW_REMOTE_CODE"),
        ollama_url=env.get("DROPFORGE_OLLAMA_URL") or "",
    )


def _number(name: str, default: float, *, unit: str = "a number of seconds") -> float:
    from dropforge.errors import EnvironmentFault

    text = os.environ.get(name)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise EnvironmentFault(
            f"{name} must be {unit}, not {text!r}",
            code="setting-invalid",
            where=f"environment variable {name}",
            fix=f"unset it, or set it to a number such as {default:g}",
        )
    return value


def _switch(name: str) -> bool:
    """Off unless said; a word that is neither stops everything, because one who meant "off" must not get "on"."""
    from dropforge.errors import EnvironmentFault

    text = os.environ.get(name, "")
    if text not in ("", "0", "1"):
        raise EnvironmentFault(
            f"{name} must be 1 (on) or 0 (off), not {text!r}", code="setting-invalid",
            where=f"environment variable {name}", fix="unset it, or set it to 1",
        )  # fmt: skip
    return text == "1"


_SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|API_KEY|ACCESS_KEY|PRIVATE_KEY)(_|$)", re.IGNORECASE)


def secret_variables() -> list[str]:
    """Values of the environment variables whose names say that they are secret, for taking them out of texts."""
    return [value for name, value in os.environ.items() if value and _SECRET_NAME.search(name)]


def secret_variable(name: str) -> str | None:
    """The secret called `name` in the environment (a spec names it, never holds it); None when it is not set."""
    return os.environ.get(name) or None


@cache
def settings() -> Settings:
    """The settings of this process. Tests call `settings.cache_clear()` after changing the environment."""
    return _read()

"""Host memory that may still be taken, inside a container too. No torch."""

from __future__ import annotations

from pathlib import Path

UNLIMITED = 1 << 60


def host_available(root: Path = Path("/")) -> int:
    """Bytes that can be allocated without swapping: the machine's, or what the control group (v2 or v1) leaves.

    File caches count as free, because they give way. root: for tests. 0 where the system does not say.
    """
    return min(
        _machine(root / "proc/meminfo"), _group_v2(root / "sys/fs/cgroup"), _group_v1(root / "sys/fs/cgroup/memory")
    )


def _machine(path: Path) -> int:
    fields = _fields(path)
    return fields.get("MemAvailable:", 0) * 1024


def _group_v2(folder: Path) -> int:
    limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
    if limit is None or used is None:
        return UNLIMITED
    stat = _fields(folder / "memory.stat")
    return max(0, limit - used + stat.get("inactive_file", 0) + stat.get("active_file", 0))


def _group_v1(folder: Path) -> int:
    limit, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
    if limit is None or used is None:
        return UNLIMITED
    stat = _fields(folder / "memory.stat")
    return max(0, limit - used + stat.get("total_inactive_file", 0) + stat.get("total_active_file", 0))


def _number(path: Path) -> int | None:
    """None: no such file, or no limit ("max")."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _fields(path: Path) -> dict[str, int]:
    """Lines of "name number ..."; empty without the file."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines)
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) > 1 and pair[1].isdigit()}

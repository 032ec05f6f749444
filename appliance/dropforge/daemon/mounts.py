"""Which kind of file system a folder lies on, from /proc/self/mountinfo (see proc(5))."""

from __future__ import annotations

from pathlib import Path

_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "virtiofs", "ceph", "glusterfs", "lustre", "afs",
                      "ocfs2", "gfs2", "beegfs", "drvfs"})  # fmt: skip
"""Kinds that several machines (or a host and its virtual machine) may have mounted at once."""


def is_on_network(folder: Path, *, mountinfo: Path = Path("/proc/self/mountinfo")) -> bool:
    """True when other machines may see the same folder. FUSE counts as such, for nobody knows what is behind it."""
    kind = kind_of(folder, mountinfo=mountinfo)
    return kind in _NETWORK or kind.startswith("fuse")


def kind_of(folder: Path, *, mountinfo: Path = Path("/proc/self/mountinfo")) -> str:
    """The file system's name, such as ext4; empty when the kernel does not tell."""
    try:
        lines = mountinfo.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ""
    place = folder.resolve()
    best, kind = -1, ""
    for line in lines:
        before, _, after = line.partition(" - ")
        point = Path(before.split(" ")[4].encode().decode("unicode_escape"))  # spaces are written as \\040
        if (place == point or point in place.parents) and len(point.parts) >= best:  # the later of two wins
            best, kind = len(point.parts), after.split(" ")[0]
    return kind

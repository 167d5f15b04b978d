"""The allowance: how much memory the control group of this process has left.

A container's limit is no property of the machine: shared memory that exceeds it is granted, and the process is killed.
Source: the kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class _Files(NamedTuple):
    """What the files of one version are called. cache: the entry of `memory.stat` that can be given back."""

    limit: str
    usage: str
    cache: str


_SECOND = _Files("memory.max", "memory.current", "inactive_file")
_FIRST = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def left_bytes(root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> int | None:
    """The bytes that can be taken before a limit of this process's group, or of one above it, kills; None without any.

    Memory of files that the kernel can drop counts as left. root, own: where the groups are mounted, and which are ours.
    """
    found: list[int] = []
    for top, group, files in _groups(Path(root), Path(own)):
        # In a container the path may be that of the host, of which nothing but the group itself is mounted, at the top.
        place = top / group if (top / group).is_dir() else top
        for directory in (place, *place.parents):
            if (left := _left(directory, files)) is not None:
                found.append(left)
            if directory == top:
                break
    return min(found, default=None)


def _groups(root: Path, own: Path) -> list[tuple[Path, str, _Files]]:
    """Where memory is counted: the mounted top, the path of our group below it, and the names of its files."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux, or nothing is told
        return []
    found = []
    for line in lines:
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if "memory" in controllers.split(","):
            found.append((root / "memory", path.lstrip("/"), _FIRST))
        elif number == "0" and not controllers:
            found += [(top, path.lstrip("/"), _SECOND) for top in (root, root / "unified")]
    return found


def _left(directory: Path, files: _Files) -> int | None:
    try:
        limit = (directory / files.limit).read_text(encoding="ascii").strip()
        usage = (directory / files.usage).read_text(encoding="ascii").strip()
        table = (directory / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    if not limit.isdecimal() or not usage.isdecimal():  # "max": no limit
        return None
    cache = sum(int(line.split()[1]) for line in table if line.startswith(f"{files.cache} "))
    return max(int(limit) - int(usage) + cache, 0)

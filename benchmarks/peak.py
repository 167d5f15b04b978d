"""The memory a process has taken, at its peak, its children included. Linux tells; elsewhere nothing is said."""

from __future__ import annotations

import gc
from pathlib import Path


class Peak:
    """The peak since `begin`, over what was resident then."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._before: int | None = None

    def begin(self) -> None:
        """Take what is resident now as given, and forget earlier peaks."""
        gc.collect()
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # 5: the high-water mark begins anew
            self._before = _tree("VmRSS")
        except OSError:
            self._before = None

    def grown_bytes(self) -> int | None:
        """The most that was resident at once since `begin`, less what was resident then; None where it cannot be told."""
        return None if self._before is None else max(0, _tree("VmHWM") - self._before)


def _tree(field: str) -> int:
    return sum(_field(pid, field) for pid in ["self", *_children("self")])


def _children(pid: str) -> list[str]:
    found: list[str] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text("ascii").split():
            found += [child, *_children(child)]
    return found


def _field(pid: str, name: str) -> int:
    """A field of the process's status, which is in KiB."""
    for line in Path(f"/proc/{pid}/status").read_text("ascii", errors="replace").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0

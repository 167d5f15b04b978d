"""What a figure was measured on: processor, memory, kernel, file system, versions. No names of hosts or people."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from datetime import UTC, datetime
from pathlib import Path

LIBRARIES = (
    "highcamp", "numpy", "torch", "safetensors", "keras", "jax", "orbax-checkpoint", "msgspec", "xxhash",
)  # fmt: skip


def facts(scratch: Path) -> dict[str, str]:
    """What stands beside the table. scratch: a directory on the disk that is measured."""
    now = datetime.now(UTC)
    memory = _first(Path("/proc/meminfo"), r"MemTotal:\s+(\d+) kB")
    return {
        "date": f"{now:%Y-%m-%d %H:%M} UTC",
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "memory": f"{int(memory) * 1024 / 1e9:.0f} GB" if memory else "unknown",
        "kernel": f"{platform.system()} {platform.release()}",
        "file system": file_system(scratch),
        "Python": platform.python_version(),
        "versions": ", ".join(f"{name} {found}" for name in LIBRARIES if (found := _version(name))),
    }


def file_system(path: Path) -> str:
    """The type of the file system that `path` is on, and whether the disk beneath it spins, is solid or is virtual."""
    device = path.stat().st_dev
    place = f"{os.major(device)}:{os.minor(device)}"
    line = _first(Path("/proc/self/mountinfo"), rf"(?m)^\d+ \d+ {place} .* - (\S+ \S+)")
    kind, _, source = (line or "unknown").partition(" ")
    disk = Path(source).name
    if disk.startswith("vd"):
        return f"{kind} on a virtual disk"
    spins = _first(Path(f"/sys/class/block/{disk}/queue/rotational"), r"(\d)")
    return f"{kind} on {'a spinning disk' if spins == '1' else 'a solid-state disk'}" if spins else kind


def available_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not tell."""
    found = _first(Path("/proc/meminfo"), r"MemAvailable:\s+(\d+) kB")
    return int(found) * 1024 if found else None


def _processor() -> str:
    return _first(Path("/proc/cpuinfo"), r"model name\s*: (.+)") or platform.processor() or platform.machine()


def _first(path: Path, pattern: str) -> str | None:
    try:
        found = re.search(pattern, path.read_text("utf-8", errors="replace"))
    except OSError:
        return None
    return found[1].strip() if found else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

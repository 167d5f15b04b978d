"""The physical limits: copying memory, writing past the page cache, reading. Nothing can save or restore faster."""

from __future__ import annotations

import mmap
import os
import statistics
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PAGE = 4096
WRITE_CHUNK = 32 << 20  # the best of 1, 4, 16 and 32 MiB on every disk tried
READ_CHUNK = 4 << 20
TARGET_BYTES = 1 << 30  # the copy's target is used over and over beyond this: larger than any cache, and saves memory
MAX_DRIFT = 0.2
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def memory(size: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Page-aligned memory of its own, on huge pages where there are any, every page touched."""
    block = mmap.mmap(-1, -(-size // PAGE) * PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(block, np.uint8)
    array[:] = 1
    return array


class Limits:
    """The limits for states of one size, on the disk of one directory."""

    def __init__(self, directory: str, size_bytes: int) -> None:
        """directory: its own. Memory is allocated and touched now, so that what is timed later is warm."""
        self.size_bytes = size_bytes
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._source = memory(size_bytes)
        self._source[:] = np.resize(np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8), len(self._source))
        self._target = memory(min(size_bytes, TARGET_BYTES))
        self._file = self._directory / "limit.bin"
        self._count = 0

    def copy(self) -> dict[str, float]:
        """Copy all bytes into warm memory, by one thread and by two; the faster is the limit."""
        found = {"copy_one": timed(lambda: self._copy(0, self.size_bytes)), "copy_two": self._by_two(self._copy)}
        return found | {"copy": min(found.values())}

    def _by_two(self, action: Callable[[int, int], object]) -> float:
        """Seconds that two threads take, each for one half of the bytes."""
        half = self.size_bytes // 2
        other = threading.Thread(target=action, args=(half, self.size_bytes))

        def both() -> None:
            other.start()
            action(0, half)
            other.join()

        return timed(both)

    def _copy(self, start: int, end: int) -> None:
        for at, offset, count in self._pieces(start, end, TARGET_BYTES):
            np.copyto(self._target[at : at + count], self._source[offset : offset + count])

    def _pieces(self, start: int, end: int, most: int) -> Iterator[tuple[int, int, int]]:
        """Place in the target, place in the bytes, and length, of one piece after the other."""
        room = len(self._target)
        while start < end:
            at = start % room
            count = min(end - start, room - at, most)
            yield at, start, count
            start += count

    def copy_fresh(self) -> dict[str, float]:
        """Copy all bytes into memory that nobody has touched yet: what a saver pays that allocates anew."""
        size = len(self._target)

        def fresh() -> None:
            block = mmap.mmap(-1, size)
            np.copyto(np.frombuffer(block, np.uint8), self._source[:size])

        return {"copy_fresh": timed(fresh) * self.size_bytes / size}

    def write(self) -> dict[str, float]:
        """Write all bytes directly into a new file, and fsync it."""
        self._count += 1
        path = self._directory / f"limit-{self._count}.bin"
        found = {"write": timed(lambda: write_direct(path, self._source, self.size_bytes))}
        path.replace(self._file)
        return found

    def save(self) -> dict[str, float]:
        """What a save cannot do without: one copy in memory, one direct write; and the copy into fresh memory beside."""
        return self.copy() | self.copy_fresh() | self.write()

    def restore(self, *, is_warm: bool) -> dict[str, float]:
        """Read the file written last into warm memory.

        From the page cache by one thread and by two; from the disk, which gives a file only once, by two: they were the
        fastest, direct reads and more threads included, and the steadiest.
        """
        if not is_warm:
            return {"restore_cold": self._by_two(self._read)}
        read_through(self._file)
        return {"restore_warm": min(timed(lambda: self._read(0, self.size_bytes)), self._by_two(self._read))}

    def _read(self, start: int, end: int) -> None:
        descriptor = os.open(self._file, os.O_RDONLY)
        try:
            for at, offset, count in self._pieces(start, end, READ_CHUNK):
                done = 0
                while done < count:
                    place = self._target.data[at + done : at + count]
                    done += os.preadv(descriptor, [place], offset + done)
        finally:
            os.close(descriptor)


def timed(action: Callable[[], object]) -> float:
    """Seconds that `action` takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def write_direct(path: Path, source: np.ndarray[tuple[int], np.dtype[np.uint8]], size: int) -> None:
    """Write past the page cache and fsync: whole pages, and the file is then cut to its size.

    Where there is no direct I/O (tmpfs) it is an ordinary write.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        descriptor = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o600)
    except OSError:
        descriptor = os.open(path, flags, 0o600)
    view = source.data
    try:
        offset = 0
        while offset < len(view):
            offset += os.pwrite(descriptor, view[offset : offset + WRITE_CHUNK], offset)
        os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes) -> None:
    """Do the least that a small durable save needs: an ordinary write and one fsync."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_through(path: Path) -> None:
    """Read a file, or every file below a directory, so that its bytes are in the page cache."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    buffer = bytearray(READ_CHUNK)
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                continue


def drop_caches() -> bool:
    """Empty the page cache; False where that is not permitted, and then nothing may be called cold."""
    os.sync()
    try:
        DROP_CACHES.write_text("3\n", encoding="ascii")
    except OSError:
        return False
    return True


def drift(values: Sequence[float]) -> float:
    """How far the second half of a limit's figures lies from the first, as a share of their median; 0 for too few.

    Halves, because a single slow round is spread, which the table shows; a limit that has moved makes the ratios wrong.
    """
    if len(values) < 4:
        return 0.0
    half = len(values) // 2
    first, second = statistics.median(values[:half]), statistics.median(values[-half:])
    return abs(second - first) / statistics.median(values)

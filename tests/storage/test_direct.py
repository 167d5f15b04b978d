"""Direct I/O: the same bytes, past the page cache where that is possible and plainly where it is not."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
from pathlib import Path

import pytest

from highcamp.storage.direct import ALIGNMENT, LEAST_BYTES
from highcamp.storage.local import LocalStore

SIZES = [LEAST_BYTES, LEAST_BYTES + 1, LEAST_BYTES + ALIGNMENT, LEAST_BYTES + ALIGNMENT - 1, 3 * LEAST_BYTES + 12345]


def _aligned(size: int) -> memoryview:
    block = memoryview(mmap.mmap(-1, size))
    pattern = bytes(range(251)) * (size // 251 + 1)
    block[:] = pattern[:size]
    return block


def _cached_share(path: Path) -> float:
    """How much of a file lies in the page cache, as the kernel tells it."""
    size = path.stat().st_size
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as block,
    ):
        pages = (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE
        residency = (ctypes.c_ubyte * pages)()
        address = ctypes.addressof(ctypes.c_char.from_buffer(block))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), residency) == 0
        return sum(state & 1 for state in residency) / pages


def _has_direct_io(directory: Path) -> bool:
    probe = directory / "probe"
    try:
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    except (OSError, AttributeError):
        return False
    try:
        os.write(descriptor, _aligned(ALIGNMENT))
    except OSError:
        return False
    finally:
        os.close(descriptor)
        probe.unlink()
    return True


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("header", [0, 100, ALIGNMENT, 3 * ALIGNMENT])
def test_the_bytes_are_the_same_whatever_is_aligned(tmp_path: Path, size: int, header: int):
    """A tail or an unaligned beginning must not shift, repeat or lose a byte."""
    store, data, start = LocalStore(tmp_path), _aligned(size), b"h" * header

    store.create("file", [start, data])

    assert (tmp_path / "file").read_bytes() == start + bytes(data)


def test_memory_that_is_not_aligned_is_written_plainly(tmp_path: Path):
    """The caller may hand over any memory; only speed depends on where it lies."""
    data = _aligned(LEAST_BYTES + 64)[64:]

    LocalStore(tmp_path).create("file", [data])

    assert (tmp_path / "file").read_bytes() == bytes(data)


def test_large_aligned_pieces_go_past_the_page_cache(tmp_path: Path):
    """The cache is the data loader's: a checkpoint must not push the training data out of it."""
    if not _has_direct_io(tmp_path):
        pytest.skip("this file system has no direct I/O")
    data = _aligned(4 * LEAST_BYTES)

    LocalStore(tmp_path).create("file", [data])

    assert _cached_share(tmp_path / "file") < 0.05


def test_direct_io_falls_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """torch_checkpointing failed every save on file systems that refuse: here such a piece is written plainly."""
    import errno
    import fcntl

    data, calls, plain = _aligned(2 * LEAST_BYTES), [], fcntl.fcntl

    def refuse(descriptor: int, command: int, *arguments: int) -> int:
        if command == fcntl.F_SETFL and arguments[0] & os.O_DIRECT:
            calls.append(command)
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(descriptor, command, *arguments)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    LocalStore(tmp_path).create("file", [data, data])

    assert (tmp_path / "file").read_bytes() == 2 * bytes(data)
    assert len(calls) == 1  # asked once for a file, not for every piece


def test_a_file_system_in_memory_takes_the_same_calls():
    """A directory in memory is where people try things out."""
    shm = Path("/dev/shm")  # noqa: S108
    if not shm.is_dir() or not os.access(shm, os.W_OK):
        pytest.skip("no /dev/shm here")
    directory = shm / f"highcamp-test-{os.getpid()}"
    try:
        directory.mkdir()
        data = _aligned(LEAST_BYTES + 17)
        LocalStore(directory).create("file", [data])
        assert (directory / "file").read_bytes() == bytes(data)
    finally:
        shutil.rmtree(directory, ignore_errors=True)

"""A slot: one file in shared memory that holds one snapshot, and is still there when the process has been killed.

The file is a header page, the data section, and a table:

    0        magic, format version, size of the identity, digest of these and of the identity
    64       the state: sequence, bytes of data, place and size of the table, size of its JSON, its digest; digest of all this
    256      the identity, JSON: whose the slot is
    16384    the data section: the memory that the snapshot is copied into
    …        the table: JSON (the caller's facts, the files) and the header of each tensor file, as it would be on disk

An odd sequence says that the data is being written, an even one that it is complete. What a killed process has stored
is there in the order in which it was stored, so the odd number goes in before the first byte and the even one after the
last. A power cut takes all of it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import struct
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from highcamp.core import strict
from highcamp.core.digest import Hasher, digest
from highcamp.core.names import check_name
from highcamp.core.tensorfile import ALIGNMENT
from highcamp.errors import InvalidArgument, StorageError, Taken
from highcamp.storage import system

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from highcamp.core.tensorfile import Layout
    from highcamp.training.identity import Identity

FORMAT = 1
"""The format version that this code writes, and the only one it reads: no snapshot in memory outlives an upgrade."""
MAGIC = b"HIGHCAMP"
FIXED = struct.Struct("<8sII")  # magic, format, bytes of the identity; its digest follows
STATE = struct.Struct("<QQQQQ41s")  # sequence, data bytes, table start, table bytes, JSON bytes, digest of the table
DIGEST_BYTES = 41
STATE_START = 64
STATE_BYTES = STATE.size + DIGEST_BYTES
IDENTITY_START = 256
HEADER_BYTES = 16384  # a path of 4096 bytes fits, whatever its bytes are; pages of 4, 16 KiB begin behind it
MAX_IDENTITY_BYTES = HEADER_BYTES - IDENTITY_START
MAX_TABLE_BYTES = 512 << 20  # names, skeletons and table of 1,000,000 tensors fit
MAX_FILES = 10_000  # one or two for each tracked object, and nobody tracks a hundred
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_RESERVE_BYTES = 64 << 20  # allocated in one call: a signal in it undoes all of it, so that a timer could starve it
_HINT = (
    "give the machine or the container more shared memory (docker run --shm-size=…, in Kubernetes an emptyDir with "
    '"medium: Memory" at /dev/shm), or leave memory_every out'
)


@dataclass(frozen=True)
class SlotFile:
    """One tensor file of a snapshot.

    name: of the file. layout: its table of tensors. offset: where its data section begins in the view of the slot.
    digest: of the bytes of its data section, if known already.
    """

    name: str
    layout: Layout
    offset: int
    digest: str | None = None


class Slot:
    """One file of shared memory.

    view: the data section, writable, page-aligned; replaced when the slot grows, the one before shows the same bytes.
    sequence: of the snapshot in it, odd while it is being written, 0 before the first one.
    """

    def __init__(self, path: str, identity: Identity, size: int, count: Iterator[int]) -> None:
        """Make the file at `path`. size: bytes of data. count: gives the odd numbers, one for each snapshot.

        Raises StorageError: Taken if there is something at `path`, or with both sizes if shared memory is too small.
        """
        self.path, self.sequence = path, 0
        self._identity, self._count = identity, count
        text = strict.write(msgspec.to_builtins(identity))
        if len(text) > MAX_IDENTITY_BYTES:
            raise StorageError(f"{path}: the run's path is too long to be noted there", path=path)
        head = FIXED.pack(MAGIC, FORMAT, len(text))
        self._descriptor = _create(path)
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._whole = self.view = self._table = memoryview(b"")
        self._table_start = HEADER_BYTES
        try:
            # Held until the last process that has the file open is gone. It comes first, then the header, and the memory
            # last: whoever finds the file half-made sees that somebody is at it, and soon whom.
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            self._reserve(0, HEADER_BYTES)
            os.pwrite(self._descriptor, text, IDENTITY_START)
            os.pwrite(self._descriptor, head + digest(head + text).encode(), 0)
            self._extend(size)
        except BaseException as error:
            self.remove()
            if isinstance(error, OSError) and not isinstance(error, StorageError):
                raise system.failure(error, "allocation", path) from error
            raise

    @property
    def is_complete(self) -> bool:
        """Whether there is a snapshot in it."""
        return self.sequence > 0 and self.sequence % 2 == 0

    @property
    def size_bytes(self) -> int:
        """The memory that the file takes."""
        return self._table_start + len(self._table)

    def begin(self) -> None:
        """Declare the snapshot in it void, before the first byte of the next one is copied into `view`."""
        self.check_usable()
        self.sequence = next(self._count)
        self._store_state(0, 0, digest(b""))

    def seal(self, facts: Mapping[str, Any], files: Sequence[SlotFile]) -> None:
        """Declare what has been copied into `view` a complete snapshot.

        facts: plain JSON values, with the `step`, an int. files: none overlaps another. Bytes without a digest are hashed
        here. On any error the slot holds no snapshot. Raises InvalidArgument, InvalidState for facts that JSON cannot
        hold, StorageError if there is no memory for the table.
        """
        self.check_usable()
        if self.sequence % 2 == 0:
            raise InvalidArgument("a slot was sealed that nothing was written into", hint="call begin() first")
        step = facts.get("step")
        if type(step) is not int or step < 0:
            raise InvalidArgument(f"the facts of a snapshot have the step {step!r}", hint="pass an int, 0 or more")
        self._check_files(files)
        rows = [
            {
                "name": file.name,
                "offset": file.offset,
                "size": file.layout.size,
                "header": len(file.layout.header),
                "digest": file.digest or digest(self.view[file.offset : file.offset + file.layout.size]),
            }
            for file in files
        ]
        text = strict.write({"facts": dict(facts), "files": rows})
        self._write_table([text, *(file.layout.header for file in files)], len(text))

    def _check_files(self, files: Sequence[SlotFile]) -> None:
        if len(files) > MAX_FILES:
            raise InvalidArgument(f"a snapshot of {len(files)} files, at most {MAX_FILES} are kept in memory")
        position, names = 0, set()
        for file in sorted(files, key=lambda file: (file.offset, file.layout.size)):
            check_name(file.name, "file")
            if file.name in names or file.offset < position:
                raise InvalidArgument(f"{file.name} is in the snapshot twice, or overlaps the file before it")
            names.add(file.name)
            position = file.offset + file.layout.size
        if position > len(self.view):
            raise InvalidArgument(f"the snapshot ends at byte {position}, the slot has {len(self.view)}")

    def _write_table(self, pieces: Sequence[bytes], text_size: int) -> None:
        size, position, hasher = sum(map(len, pieces)), 0, Hasher()
        if size > MAX_TABLE_BYTES:
            raise InvalidArgument(f"the table of a snapshot is {size} bytes, at most {MAX_TABLE_BYTES} are kept")
        if size > len(self._table):
            self._extend_table(size)
        for piece in pieces:
            self._table[position : position + len(piece)] = piece
            position += len(piece)
            hasher.update(piece)
        self.sequence += 1
        self._store_state(size, text_size, hasher.text())

    def _store_state(self, table_size: int, text_size: int, table_digest: str) -> None:
        """The digest covers the sequence: whichever part of this a killed process has stored, it is the old or nothing."""
        body = STATE.pack(
            self.sequence, len(self.view), self._table_start, table_size, text_size, table_digest.encode()
        )
        self._whole[STATE_START : STATE_START + STATE_BYTES] = body + digest(body).encode()

    def grow(self, size: int) -> None:
        """Give `view` at least `size` bytes; the snapshot in the slot is void, and the old views stay valid.

        The file is extended, not replaced: old and new memory together might not fit. Raises StorageError, and then has
        the size it had.
        """
        if len(self.view) >= size:
            return
        self.begin()
        before = self._table_start
        self._table = memoryview(b"")
        try:
            self._extend(size)
        except BaseException:
            os.ftruncate(self._descriptor, before)
            self._store_state(0, 0, digest(b""))
            raise

    def _extend(self, size: int) -> None:
        end = HEADER_BYTES + data_bytes(size)
        self._reserve(HEADER_BYTES, end)
        with system.told("mmap", self.path):
            mapped = mmap.mmap(self._descriptor, end)
        with contextlib.suppress(AttributeError, OSError):  # most systems have it switched off for shared memory
            mapped.madvise(mmap.MADV_HUGEPAGE)
        # No MADV_DONTFORK: unlike private memory, shared memory is not copied again after a fork (measured), and a child
        # that inherits the map may let go of it.
        self._whole = memoryview(mapped)
        self.view = self._whole[HEADER_BYTES:end]
        self._table_start, self._table = table_start(size), memoryview(b"")
        self._touch()
        self._store_state(0, 0, digest(b""))

    def _touch(self) -> None:
        """Enter the pages into the page table: one read brings several, a write of the first snapshot one at a time."""
        import numpy as np

        np.frombuffer(self.view, np.uint8)[:: mmap.PAGESIZE].max()

    def _extend_table(self, size: int) -> None:
        room = -(-(size + size // 4) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self._table = memoryview(b"")
        self._reserve(self._table_start, self._table_start + room)
        with system.told("mmap", self.path):
            self._table = memoryview(mmap.mmap(self._descriptor, room, offset=self._table_start))

    def _reserve(self, start: int, end: int) -> None:
        """Allocate pages of the file now: a page that is missing when it is written kills the process (SIGBUS)."""
        for position in range(start, end, _RESERVE_BYTES):
            try:
                os.posix_fallocate(self._descriptor, position, min(_RESERVE_BYTES, end - position))
            except OSError as error:
                if error.errno in {errno.ENOSPC, errno.ENOMEM}:
                    raise too_small(self.path, end - position, system.free_bytes(self.path) or 0) from error
                raise system.failure(error, "allocation", self.path) from error

    def check_usable(self) -> None:
        """Raise StorageError in a forked child, which has the map but not the snapshot, and InvalidArgument when closed."""
        if os.getpid() != self._identity.pid:
            raise StorageError(
                f"{self.path} belongs to process {self._identity.pid}, from which this one was forked",
                path=self.path,
                hint="save in the process that trains",
            )
        if not self._close.alive:
            raise InvalidArgument(f"{self.path} is closed", path=self.path, hint="make a new tier")

    def release(self) -> None:
        """Let go of the file; the snapshot in it can be found by the next process, or by this one."""
        if self._close.alive:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # views that are still in use keep a descriptor of their own
            self._close()
        self._whole = self.view = self._table = memoryview(b"")

    def remove(self) -> None:
        """Remove the file and let go of it."""
        if self._close.alive:
            unlink_if_same(self.path, os.fstat(self._descriptor))
        self.release()


def _create(path: str) -> int:
    try:
        with system.told("open", path):
            return os.open(path, _NEW, 0o600)
    except Taken as error:
        raise Taken(
            f"{path} is there already; it was not touched",
            path=path,
            hint="another process trains in a copy of this run, or somebody put it there; remove it if no training uses it",
            errno=error.errno,
        ) from error


def file_name(identity: Identity, index: int) -> str:
    """The name of a slot's file; index: 0 or 1."""
    return f"highcamp-{identity.uid}-{identity.run_id}-{identity.attempt}.{index}"


def data_bytes(size: int) -> int:
    """The bytes of the data section for `size` bytes of data: whole pages, at least one."""
    return -(-max(size, 1) // ALIGNMENT) * ALIGNMENT


def table_start(size: int) -> int:
    """Where the table begins in a slot for `size` bytes of data: at a place that can be mapped."""
    end = HEADER_BYTES + data_bytes(size)
    return -(-end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY


def too_small(where: str, needed: int, free: int) -> StorageError:
    """The error of shared memory that does not hold what is asked for; both in bytes."""
    return StorageError(
        f"{where}: a snapshot in memory needs {needed / 1e6:.1f} MB more, {free / 1e6:.1f} MB are free",
        path=where,
        hint=_HINT,
        errno=errno.ENOSPC,
    )


def unlink_if_same(path: str, known: os.stat_result) -> bool:
    """Remove `path` if it still is the file that was looked at; whether it was."""
    with system.told("remove", path):
        found = system.lstat(path)
        if found is None or not os.path.samestat(found, known):
            return False
        Path(path).unlink()
    return True

"""A snapshot that a dead process has left in shared memory: everything about it is checked before it is believed."""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from highcamp.core import strict, tensorfile
from highcamp.core.digest import digest
from highcamp.core.manifest import Count  # noqa: TC001  (msgspec reads it when the program runs)
from highcamp.core.names import is_file_name
from highcamp.errors import Damaged, Unreadable
from highcamp.storage import system
from highcamp.training import slot
from highcamp.training.identity import Identity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from highcamp.core.tensorfile import Layout


class _Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    offset: Count
    size: Count
    header: Count
    digest: str


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    facts: dict[str, Any]
    files: list[_Row]


@dataclass(frozen=True, eq=False)
class FoundFile:
    """One tensor file of a snapshot.

    name: of the file. layout: its table of tensors. data: the bytes of its data section, read-only. digest: what they must
    have, compared by `Found.verify`.
    """

    name: str
    layout: Layout = field(repr=False)
    data: memoryview = field(repr=False)
    digest: str


@dataclass(frozen=True, eq=False)
class Found:
    """A complete snapshot in shared memory whose process is gone.

    identity: whose it was. step: of the training state. sequence: grows with every snapshot of its process. facts: as
    they were given to `Slot.seal`. size_bytes: the memory its file takes. The data is valid as long as it is referred to,
    also after `remove`.
    """

    path: str
    identity: Identity
    step: int
    sequence: int
    facts: dict[str, Any] = field(repr=False)
    files: tuple[FoundFile, ...] = field(repr=False)
    size_bytes: int
    _known: os.stat_result = field(repr=False)
    _header: bytes = field(repr=False)
    _map: mmap.mmap = field(repr=False)

    @property
    def order(self) -> tuple[int, int, int]:
        """What snapshots are ordered by: (step, attempt, sequence)."""
        return (self.step, self.identity.attempt, self.sequence)

    def verify(self) -> None:
        """Compare the bytes of every file with their digest. Raises Damaged naming the file; to be called before use."""
        for file in self.files:
            if digest(file.data) != file.digest:
                raise Damaged(
                    f"{self.path}: the bytes of {file.name} differ from their digest",
                    path=self.path,
                    hint="this snapshot is not used; the newest checkpoint on disk is",
                )
        if self._map[: slot.HEADER_BYTES] != self._header:
            raise Damaged(f"{self.path} was written to while it was read", path=self.path)

    def remove(self) -> None:
        """Remove the file; twice is once. Raises StorageError."""
        slot.unlink_if_same(self.path, self._known)


@contextlib.contextmanager
def opened(path: str) -> Iterator[int]:
    """A descriptor of a file that this user has made, for reading. Raises NotThere, or Damaged for anything else."""
    with system.told("lstat", path):
        known = os.lstat(path)
    _check_owner(known, path)  # before it is opened: a device may notice
    with system.told("open", path):
        descriptor = os.open(path, system.READ)
    try:
        _check_owner(os.fstat(descriptor), path)
        yield descriptor
    finally:
        os.close(descriptor)


def _check_owner(found: os.stat_result, path: str) -> None:
    system.require_regular(found, path)
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise Damaged(
            f"{path} belongs to user {found.st_uid} with mode {stat.S_IMODE(found.st_mode):04o}, expected user "
            f"{os.geteuid()} with mode 0600",
            path=path,
            hint="somebody else may have written it, so it is not read",
        )


def read_identity(descriptor: int, path: str) -> Identity | None:
    """Whose an open slot is; None if it is only being made, or its process was killed at that.

    Raises Unreadable for another format version, Damaged for what is no slot.
    """
    if os.fstat(descriptor).st_size == 0:
        return None
    header = _read(descriptor, slot.HEADER_BYTES, 0, path)
    return _identity(header, path) if any(header[: slot.STATE_START]) else None


def read(descriptor: int, path: str) -> Found | None:
    """The snapshot in an open slot whose process is gone; None if that was killed before it was complete.

    Its table is whole, the bytes are yet to be verified. Raises Damaged, or Unreadable for another format version.
    """
    header = _read(descriptor, slot.HEADER_BYTES, 0, path)
    identity = _identity(header, path)
    state = header[slot.STATE_START : slot.STATE_START + slot.STATE_BYTES]
    if not any(state):
        return None  # killed before it had its memory
    body, own_digest = state[: slot.STATE.size], state[slot.STATE.size :]
    if digest(body).encode() != own_digest:
        raise _damaged(path, "its header differs from its digest")
    sequence, data_size, table_start, table_size, text_size, table_digest = slot.STATE.unpack(body)
    if sequence % 2 or sequence == 0:
        return None
    known = os.fstat(descriptor)
    if not (
        0 < data_size <= table_start - slot.HEADER_BYTES
        and text_size <= table_size <= slot.MAX_TABLE_BYTES
        and table_start + table_size <= known.st_size
    ):
        raise _damaged(path, f"it is {known.st_size} bytes, or its header has sizes that do not fit together")
    table = _read(descriptor, table_size, table_start, path)
    if digest(table).encode() != table_digest:
        raise _damaged(path, "its table differs from its digest")
    with system.told("mmap", path):
        mapped = mmap.mmap(descriptor, slot.HEADER_BYTES + data_size, prot=mmap.PROT_READ)
    facts, files = _files(table, text_size, memoryview(mapped)[slot.HEADER_BYTES :], path)
    step = facts.get("step")
    if type(step) is not int or step < 0:
        raise _damaged(path, "its facts have no step")
    return Found(path, identity, step, sequence, facts, files, known.st_size, known, header, mapped)


def _identity(header: bytes, path: str) -> Identity:
    magic, version, size = slot.FIXED.unpack(header[: slot.FIXED.size])
    if magic != slot.MAGIC:
        raise _damaged(path, "it does not begin like one")
    if version != slot.FORMAT:
        raise Unreadable(
            f"{path} has format version {version}, this highcamp reads {slot.FORMAT}",
            path=path,
            hint="start again with the version that wrote it, or go on from the checkpoints on disk",
        )
    text = header[slot.IDENTITY_START : slot.IDENTITY_START + size]
    if digest(header[: slot.FIXED.size] + text).encode() != _own_digest(header):
        raise _damaged(path, "its identity differs from its digest")
    value = strict.read(text, where=path, limit=slot.MAX_IDENTITY_BYTES)
    try:
        identity = msgspec.convert(value, Identity)
    except msgspec.ValidationError as error:
        raise _damaged(path, f"its identity is malformed: {error}") from error
    if Path(path).name not in {slot.file_name(identity, index) for index in (0, 1)}:
        raise _damaged(path, f"it is that of attempt {identity.attempt} of the run {identity.run_id[:100]!r}")
    return identity


def _own_digest(header: bytes) -> bytes:
    return header[slot.FIXED.size : slot.FIXED.size + slot.DIGEST_BYTES]


def _files(table: bytes, text_size: int, data: memoryview, path: str) -> tuple[dict[str, Any], tuple[FoundFile, ...]]:
    value = strict.read(table[:text_size], where=path, limit=slot.MAX_TABLE_BYTES)
    try:
        parsed = msgspec.convert(value, _Table)
    except msgspec.ValidationError as error:
        raise _damaged(path, f"its table is malformed: {error}") from error
    if len(parsed.files) > slot.MAX_FILES:
        raise _damaged(path, f"its table has {len(parsed.files)} files, at most {slot.MAX_FILES} are read")
    files: list[FoundFile] = []
    position, names = text_size, set()
    for row in parsed.files:
        if not is_file_name(row.name) or row.name in names:
            raise _damaged(path, f"its table has the name {row.name[:100]!r} twice, or it cannot be a file name")
        if row.offset + row.size > len(data):
            raise _damaged(path, f"{row.name} ends at byte {row.offset + row.size} of {len(data)}")
        if position + row.header > len(table):
            raise _damaged(path, f"the header of {row.name} ends outside of the table")
        names.add(row.name)
        header = table[position : position + row.header]
        position += row.header
        layout = tensorfile.parse(header, row.header + row.size, f"{path}, {row.name}")
        files.append(FoundFile(row.name, layout, data[row.offset : row.offset + row.size], row.digest))
    if position != len(table):
        raise _damaged(path, f"its table is {len(table)} bytes, {position} are accounted for")
    return parsed.facts, tuple(files)


def _read(descriptor: int, size: int, offset: int, path: str) -> bytes:
    pieces: list[bytes] = []
    missing = size
    with system.told("read", path):
        while missing:
            piece = os.pread(descriptor, missing, offset + size - missing)
            if not piece:
                raise Damaged(f"{path} ends at byte {offset + size - missing}, expected {offset + size}", path=path)
            pieces.append(piece)
            missing -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _damaged(path: str, reason: str) -> Damaged:
    return Damaged(f"{path} is no whole snapshot: {reason}", path=path, hint="the checkpoints on disk are untouched")

"""The contents of local files: small ones as fast as a file system gives them, large ones piece by piece.

Listing a run of 10,000 checkpoints reads 10,000 manifests. So there is no look before the open: the flags of READ follow no
link and wait for nobody, and what was opened is looked at before a byte of it is believed.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
from typing import TYPE_CHECKING, Self

from highcamp.errors import Damaged, InvalidArgument
from highcamp.storage.store import NotThere, flat, is_plain, parts
from highcamp.storage.system import ABSENT, READ, failure, require_regular, told

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping
    from types import TracebackType


def read_whole(
    where: str, limit: int, *, path: str | None = None, directory: int | None = None, known: bytes | None = None
) -> bytes:
    """The bytes of the file at `where`. NotThere; Damaged above `limit` or if it is no regular file.

    path, directory: the same place below an open directory. known: bytes that it may hold; if it does, they themselves.
    """
    try:
        descriptor = os.open(path or where, READ, dir_fd=directory)
    except OSError as error:
        if error.errno in ABSENT:
            raise NotThere(f"{where} does not exist", path=where, errno=errno.ENOENT) from error
        with contextlib.suppress(OSError):  # the error under way is the one to tell
            require_regular(os.lstat(where), where)  # a link, or a socket: they refuse to be opened
        raise failure(error, "open", where) from error
    try:
        try:
            if known is not None and _holds(descriptor, known):
                return known
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                require_regular(found, where)
            size = found.st_size
            if size > limit:
                raise Damaged(f"{where} is {size} bytes, expected at most {limit}", path=where)
            data = os.pread(descriptor, size, 0)
            while len(data) < size:  # the kernel may give less than was asked for
                more = os.pread(descriptor, size - len(data), len(data))
                if not more:
                    missing = size - len(data)
                    raise Damaged(f"{where} ends at byte {len(data)}, expected {missing} bytes more", path=where)
                data += more
        finally:
            os.close(descriptor)
    except OSError as error:
        raise failure(error, "read", where) from error
    return data


def _holds(descriptor: int, known: bytes) -> bool:
    """Whether these very bytes are there and no more; what sort of file they come from then makes no difference."""
    try:
        return os.pread(descriptor, len(known) + 1, 0) == known
    except OSError:  # a directory, a FIFO or a bad disk: whoever reads it in earnest tells which
        return False


def read_each(
    where: str, names: Iterable[str], file: str, limit: int, known: Mapping[str, bytes]
) -> Iterator[tuple[str, bytes | Damaged | None]]:
    """What `Store.read_each` gives, `where` being the directory; it is looked up once, which saves a tenth of the time."""
    try:
        with told("open", where):
            directory = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except NotThere:
        yield from ((name, None) for name in names)
        return
    try:
        for name in names:
            path = f"{name}/{file}"
            if not is_plain(path):
                parts(path)
            found: bytes | Damaged | None
            try:
                found = read_whole(f"{where}/{path}", limit, path=path, directory=directory, known=known.get(name))
            except NotThere:
                found = None
            except Damaged as error:
                found = error
            yield name, found
    finally:
        with told("close", where):
            os.close(directory)


class LocalReader:
    """An open file of a LocalStore; see `Reader`."""

    def __init__(self, descriptor: int, size: int, where: str, identity: Hashable) -> None:
        """where: the absolute path, for messages. size, identity: when it was opened."""
        self._descriptor = descriptor
        self._size = size
        self._identity = identity
        self.where = where

    @property
    def size(self) -> int:
        """Bytes in the file when it was opened."""
        return self._size

    @property
    def identity(self) -> Hashable:
        """See `Reader.identity`."""
        return self._identity

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `Reader.read_into`."""
        rest = flat(buffer)
        if offset < 0:
            raise InvalidArgument(f"{self.where}: read at offset {offset}", path=self.where)
        while rest:
            with told("read", self.where):
                count = os.preadv(self._descriptor, [rest], offset)
            if count == 0:
                raise Damaged(
                    f"{self.where} ends at byte {offset}, expected {len(rest)} bytes more",
                    path=self.where,
                    hint="it was truncated, or its manifest belongs to another file",
                )
            offset += count
            rest = rest[count:]

    def map(self) -> memoryview:
        """See `Reader.map`."""
        if self._size == 0:  # mmap refuses a length of 0
            return memoryview(b"")
        try:
            with told("mmap", self.where):
                return memoryview(mmap.mmap(self._descriptor, self._size, access=mmap.ACCESS_READ))
        except ValueError as error:  # mmap compares the length with the file as it is now
            raise Damaged(f"{self.where} is shorter than the {self._size} bytes it had", path=self.where) from error

    def close(self) -> None:
        """See `Reader.close`."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            with told("close", self.where):
                os.close(descriptor)

    def __enter__(self) -> Self:
        """Return the reader itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

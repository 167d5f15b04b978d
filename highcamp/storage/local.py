"""The store on a local or mounted file system.

What survives a power cut is what was fsynced: a file's bytes by its own fsync, its name by the fsync of the directory
it stands in. Each step below says which crash it answers. In power cuts of ext4 and xfs, leaving any
of them out has lost checkpoints that had been acknowledged; `tests/faults/test_power_cut.py` cuts the power of an ext4.
"""

# Absolute strings throughout, for the reason in system.py.
# ruff: noqa: PTH100, PTH102, PTH105, PTH108, PTH112, PTH116, PTH118, PTH119, PTH120, PTH208

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
import warnings
from typing import TYPE_CHECKING

from highcamp.errors import Damaged, InvalidArgument, StorageError, Taken
from highcamp.storage.contents import LocalReader, read_each, read_whole
from highcamp.storage.direct import DirectWriter
from highcamp.storage.store import NotThere, flat, is_plain, join, parent, parts
from highcamp.storage.system import (
    APPEND,
    FILE_MODE,
    IN_USE,
    NEW,
    NOT_ALLOWED,
    READ,
    code_name,
    failure,
    file_size,
    free_bytes,
    kind,
    lstat,
    rename_to_unused,
    require_regular,
    sync_directory,
    sync_file,
    told,
    write,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from highcamp.storage.store import Buffer

PENDING = ".pending-"

_SMALL = 64 << 10  # bytes; below it a write costs more in the call than in the copy, so small chunks are gathered
_GATHERED = 1 << 20  # bytes gathered before they are written; the cost per call has vanished at this size


class DurabilityWarning(UserWarning):
    """The file system cannot make directories durable: a power cut may lose what was acknowledged."""


class LocalStore:
    """A directory on a file system this machine has mounted. The directory itself is made by the first write."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        """root: made absolute here, so that a later chdir changes nothing."""
        text = os.fspath(root)
        if not text or "\0" in text:
            raise InvalidArgument(f"{root!r} is not a path", hint='for example "runs/digits"')
        self._root = os.path.abspath(text)
        self._inside = os.path.join(self._root, "")
        self._durable: set[str] = set()  # directories whose own name is known to survive a power cut
        self._warned = False

    @property
    def url(self) -> str:
        """The absolute path of the directory."""
        return self._root

    def local_path(self, path: str) -> Path:
        """Where a path in the store lies on this machine."""
        from pathlib import Path

        return Path(self._absolute(path, root=True))

    def list(self, directory: str) -> list[str]:
        """See `Store.list`."""
        where = self._absolute(directory, root=True)
        try:
            with told("listing", where):
                return sorted(os.listdir(where))
        except NotThere:
            return []

    def size(self, path: str) -> int | None:
        """See `Store.size`."""
        return file_size(self._absolute(path))

    def read(self, path: str, limit: int) -> bytes:
        """See `Store.read`."""
        return read_whole(self._absolute(path), limit)

    def read_each(
        self, directory: str, names: Iterable[str], file: str, limit: int, known: Mapping[str, bytes]
    ) -> Iterator[tuple[str, bytes | Damaged | None]]:
        """See `Store.read_each`."""
        return read_each(self._absolute(directory), names, file, limit, known)

    def open(self, path: str) -> LocalReader:
        """See `Store.open`."""
        where = self._absolute(path)
        with told("open", where):
            found = lstat(where)
        if found is None:
            raise NotThere(f"{where} does not exist", path=where, errno=errno.ENOENT)
        # Looked at before it is opened, as opening a device can have effects, and after, as it may have been swapped.
        require_regular(found, where)
        with told("open", where):
            descriptor = os.open(where, READ)
        try:
            found = os.fstat(descriptor)
            require_regular(found, where)
        except BaseException:
            os.close(descriptor)
            raise
        identity = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        return LocalReader(descriptor, found.st_size, where, identity)

    def create(self, path: str, chunks: Iterable[Buffer]) -> None:
        """See `Store.create`."""
        where = self._absolute(path)
        with told("create", where):
            descriptor = os.open(where, NEW, FILE_MODE)
        complete = False
        try:
            self._fill(descriptor, where, chunks)
            if not any(part.startswith(PENDING) for part in parts(parent(path), root=True)):
                # Crash answered: a power cut keeps the file and loses its name. In a draft `publish` does this, once.
                self._sync_directory(os.path.dirname(where))
            complete = True
        finally:
            if not complete:
                # Only tidying, and the error under way is the one to tell. The file is not read, written or synced
                # again: after a failed fsync the next one succeeds, and a read shows bytes that are not on the disk.
                with contextlib.suppress(OSError):
                    os.unlink(where)

    def link(self, source: str, path: str) -> None:
        """See `Store.link`: a hard link, whose name becomes durable with `publish`."""
        origin, where = self._absolute(source), self._absolute(path)
        with told("link", origin):
            require_regular(os.lstat(origin), origin)
            os.link(origin, where, follow_symlinks=False)
        complete = False
        try:
            with told("fsync", where):
                descriptor = os.open(where, READ)
                try:
                    # Crash answered: the run was copied here by hand a moment ago, and is still in the page cache alone.
                    sync_file(descriptor)
                finally:
                    os.close(descriptor)
            complete = True
        finally:
            if not complete:
                with contextlib.suppress(OSError):  # tidying, as in `create`
                    os.unlink(where)

    def draft(self, target: str) -> str:
        """See `Store.draft`: `.pending-<name>-<unique>` beside the target: a rename cannot leave a file system."""
        directory, name = parent(target), parts(target)[-1]
        self._make_durable(self._absolute(directory, root=True))
        while True:
            draft = join(directory, f"{PENDING}{name}-{os.urandom(8).hex()}")
            where = self._absolute(draft)
            # Leftovers of earlier crashes are never reused, so they are never in the way.
            with contextlib.suppress(Taken), told("mkdir", where):
                os.mkdir(where)
                return draft

    def publish(self, draft: str, target: str) -> None:
        """See `Store.publish`."""
        source = self._absolute(draft)
        with told("stat", source):
            found = os.lstat(source)
        if not stat.S_ISDIR(found.st_mode):
            raise Damaged(f"{source} is {kind(found)}, expected a directory", path=source)
        # Crash answered: a directory that survives under its final name and has lost files. From the bottom up.
        for directory, _, _ in os.walk(source, topdown=False, onerror=_unlistable):
            self._sync_directory(directory)
        self._move(source, self._absolute(target))

    def withdraw(self, path: str, to: str) -> None:
        """See `Store.withdraw`."""
        self._move(self._absolute(path), self._absolute(to))

    def remove(self, path: str) -> None:
        """See `Store.remove`."""
        where = self._absolute(path)
        with told("stat", where):
            found = lstat(where)
        if found is None:
            return
        if stat.S_ISDIR(found.st_mode):
            import shutil

            # Walks by descriptors, so a directory swapped for a link in the middle leads nowhere.
            if sys.version_info >= (3, 12):
                shutil.rmtree(where, onexc=lambda _, at, error: _unremovable(at, error))
            else:
                shutil.rmtree(where, onerror=lambda _, at, info: _unremovable(at, info[1]))
        else:
            with contextlib.suppress(NotThere), told("unlink", where):
                os.unlink(where)
        # Crash answered: what was removed comes back after a power cut, after a pruner had told that it is gone.
        with contextlib.suppress(NotThere):  # the directory it stood in is gone too
            self._sync_directory(os.path.dirname(where))

    def replace(self, path: str, data: bytes) -> None:
        """See `Store.replace`."""
        where = self._absolute(path)
        directory = self._absolute(parent(path), root=True)
        self._make_durable(directory)
        pending = os.path.join(directory, f"{PENDING}{os.path.basename(where)}-{os.urandom(8).hex()}")
        with told("create", pending):
            descriptor = os.open(pending, NEW, FILE_MODE)
        replaced = False
        try:
            # Crash answered: without the fsync before the rename, xfs has lost the old content and shows 0 bytes.
            self._fill(descriptor, pending, [data])
            with told("rename", where):
                os.replace(pending, where)
            replaced = True
        finally:
            if not replaced:
                with contextlib.suppress(OSError):  # tidying, as in `create`
                    os.unlink(pending)
        self._sync_directory(directory)

    def append(self, path: str, data: bytes, *, durable: bool) -> None:
        """See `Store.append`."""
        where = self._absolute(path)
        descriptor = self._open_to_append(path, where)
        try:
            found = os.fstat(descriptor)
            require_regular(found, where)
            written = 0
            try:
                while written < len(data):
                    with told("write", where, needed=len(data) - written):
                        written += write(descriptor, memoryview(data)[written:])
            finally:
                if 0 < written < len(data):
                    # A full disk takes half a row, and the next one would be glued to it: both would be unreadable.
                    with contextlib.suppress(OSError):
                        os.ftruncate(descriptor, found.st_size)
            if durable:
                with told("fsync", where):
                    sync_file(descriptor)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                os.close(descriptor)
            raise
        with told("close", where):
            os.close(descriptor)

    def free_bytes(self) -> int | None:
        """See `Store.free_bytes`: what the file system gives to this user."""
        return free_bytes(self._root)

    # ------------------------------------------------------------------------------------------------------- writing

    def _fill(self, descriptor: int, where: str, chunks: Iterable[Buffer]) -> None:
        """Write, fsync and close a new file; any of the three failing means that the file has failed."""
        try:
            self._write_all(descriptor, where, chunks)
            with told("fsync", where):
                # Crash answered: a name with 0 bytes behind it, which is what most power cuts leave without this.
                sync_file(descriptor)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                os.close(descriptor)
            raise
        # NFS and quotas report here what they could not write. Never closed twice: the number may be another file's.
        with told("close", where):
            os.close(descriptor)

    def _write_all(self, descriptor: int, where: str, chunks: Iterable[Buffer]) -> None:
        total = sum(memoryview(chunk).nbytes for chunk in chunks) if isinstance(chunks, (list, tuple)) else None
        written = 0
        writer = DirectWriter(descriptor)

        def write_out(data: memoryview) -> None:
            nonlocal written
            while data:  # the kernel may take less than given: at most 2 GiB at once, or what is left of the disk
                with told("write", where, needed=len(data) if total is None else total - written):
                    count = writer.write(data)
                written += count
                data = data[count:]

        gathered = bytearray()
        for chunk in chunks:
            data = flat(chunk)
            if len(data) < _SMALL:
                gathered += data
            if gathered and (len(data) >= _SMALL or len(gathered) >= _GATHERED):
                write_out(memoryview(gathered))
                gathered = bytearray()
            if len(data) >= _SMALL:
                write_out(data)
        write_out(memoryview(gathered))

    def _open_to_append(self, path: str, where: str) -> int:
        with contextlib.suppress(NotThere), told("open", where):
            return os.open(where, APPEND)
        self._make_durable(self._absolute(parent(path), root=True))
        with told("create", where):
            descriptor = os.open(where, NEW, FILE_MODE)
        try:
            # Before the first row: a later append finds the file and could not know that its name is not durable yet.
            self._sync_directory(os.path.dirname(where))
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            with contextlib.suppress(OSError):
                os.unlink(where)
            raise
        return descriptor

    # --------------------------------------------------------------------------------------------------- directories

    def _make_durable(self, directory: str) -> None:
        """Make a directory and its parents, each name fsynced: else the whole run can vanish with its directory."""
        if directory in self._durable and os.path.isdir(directory):
            return
        above = os.path.dirname(directory)
        if not os.path.isdir(directory):
            if above != directory:
                self._make_durable(above)
            # Two processes may both be first; network file systems say EEXIST for what isdir did not see yet.
            with contextlib.suppress(Taken), told("mkdir", directory):
                os.mkdir(directory)
            with told("stat", directory):
                if not stat.S_ISDIR(os.stat(directory).st_mode):
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), directory)
            self._sync_directory(above)
        elif directory == self._root or directory.startswith(self._root + os.sep):
            # Found, not made: by a process that may have been killed between its mkdir and its fsync.
            if directory != self._root:
                self._make_durable(above)
            try:
                self._sync_directory(above)
            except StorageError as error:
                # A directory we may not even open is not one in which a process of ours has made the root.
                if directory != self._root or error.errno not in NOT_ALLOWED:
                    raise
        self._durable.add(directory)

    def _sync_directory(self, where: str) -> None:
        error = sync_directory(where)
        if error is not None and not self._warned:
            self._warned = True
            warnings.warn(
                f"{where}: durability is not guaranteed on this file system, it cannot fsync a directory "
                f"({code_name(error)}); a power cut may lose the newest checkpoints",
                DurabilityWarning,
                stacklevel=2,
            )

    def _move(self, source: str, target: str) -> None:
        """Rename a directory, or the link that stands for one, to a name not in use, durably."""
        with told("stat", source):
            before = os.lstat(source)
        try:
            # At once: after a crash there is the old name or the new one, never both and never half of it.
            rename_to_unused(source, target)
        except OSError as error:
            if error.errno in IN_USE:
                message = f"rename of {source}: {target} is in use already"
                raise Taken(message, path=target, hint="take another name", errno=error.errno) from error
            # NFS: the reply was lost, the repeated call did not find the source. The target tells whether it is ours.
            after = lstat(target) if error.errno == errno.ENOENT and lstat(source) is None else None
            if after is None or (after.st_dev, after.st_ino) != (before.st_dev, before.st_ino):
                raise failure(error, "rename", source, to=target) from error
        # Crash answered: the new name is lost after it was acknowledged. Only after this may the caller say "saved".
        self._sync_directory(os.path.dirname(target))
        if os.path.dirname(source) != os.path.dirname(target):
            self._sync_directory(os.path.dirname(source))

    def _absolute(self, path: str, *, root: bool = False) -> str:
        return self._inside + path if is_plain(path) else os.path.join(self._root, *parts(path, root=root))


def _unlistable(error: OSError) -> None:
    raise failure(error, "listing", str(error.filename)) from error


def _unremovable(where: str, error: BaseException) -> None:
    """Two pruners may remove the same tree: what is gone already is no error."""
    if not isinstance(error, OSError):
        raise error
    if error.errno != errno.ENOENT:
        raise failure(error, "remove", where) from error

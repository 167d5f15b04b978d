"""System calls the way durability needs them, and the errors they tell.

Paths are absolute strings here: resolving or normalizing one would name another file than the one that was asked for.
"""

# ruff: noqa: PTH104, PTH110, PTH116, PTH120

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import stat
from typing import TYPE_CHECKING, Any

from highcamp.errors import Damaged, StorageError, Taken
from highcamp.storage.store import NotThere

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# No planted link is followed, and nothing is overwritten.
NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: opening a FIFO that lies under our name must not wait for a writer; on regular files it has no effect.
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
APPEND = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
FILE_MODE = 0o666  # the umask, not we, decides who may read

IN_USE = frozenset({errno.EEXIST, errno.ENOTEMPTY})  # a full directory is ENOTEMPTY on ext4 and tmpfs, EEXIST on xfs
NOT_ALLOWED = frozenset({errno.EACCES, errno.EPERM})
ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR})
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP})
_HINTS = {
    errno.ENOSPC: "free some space; what was committed before is untouched",
    errno.EDQUOT: "free some of the quota; what was committed before is untouched",
    errno.EROFS: "the file system is mounted read-only, or has become so after an error: see the kernel's log",
    errno.EIO: "the disk failed, the kernel's log says more; what was committed before is untouched",
    errno.EFBIG: 'the limit on file sizes is too small: see "ulimit -f"',
    errno.EMFILE: 'too many files are open in this process: see "ulimit -n"',
}


def write(descriptor: int, data: memoryview) -> int:
    """One write, repeated by Python on EINTR; bytes taken, at least 1."""
    count = os.write(descriptor, data)
    if count == 0:  # no file system should; without this check the caller would go round for ever
        raise OSError(errno.EIO, "write took 0 bytes")
    return count


def sync_file(descriptor: int) -> None:
    """Make a file's bytes durable. Called once for a file: after a failed fsync the next one succeeds, and lies."""
    full_sync: int | None = getattr(fcntl, "F_FULLFSYNC", None)
    if full_sync is not None:  # macOS: fsync only reaches the drive's cache
        try:
            fcntl.fcntl(descriptor, full_sync)
        except OSError as error:
            if error.errno not in _UNSUPPORTED | {errno.ENOTTY}:
                raise
        else:
            return
    os.fsync(descriptor)


def sync_directory(where: str) -> OSError | None:
    """Make the names in a directory durable; the error if this file system cannot (some FUSE and CIFS mounts)."""
    with told("open", where):
        descriptor = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with told("fsync", where):
            try:
                os.fsync(descriptor)
            except OSError as error:
                if error.errno in _UNSUPPORTED:
                    return error
                raise
    finally:
        with told("close", where):
            os.close(descriptor)
    return None


def rename_to_unused(source: str, target: str) -> None:
    """Rename that never replaces: rename(2) alone silently replaces an empty directory, on every file system."""
    rename = _renameat2()
    code = errno.ENOSYS if rename is None else rename(os.fsencode(source), os.fsencode(target))
    if code in {errno.EINVAL, errno.ENOSYS}:  # every FUSE tried, macOS, old kernels: look first, then plain rename
        if lstat(target) is not None:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
        os.rename(source, target)
    elif code:
        raise OSError(code, os.strerror(code), source)


@functools.cache
def _renameat2() -> Callable[[bytes, bytes], int] | None:
    """The C library's renameat2, which Python does not offer; None on macOS and old libraries."""
    import ctypes  # who only reads never needs it

    try:
        found: Any = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return None
    found.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    found.restype = ctypes.c_int

    def rename(source: bytes, target: bytes) -> int:
        """0, or the errno."""
        at_fdcwd, no_replace = -100, 1  # AT_FDCWD, RENAME_NOREPLACE: linux/fcntl.h, linux/fs.h
        return 0 if found(at_fdcwd, source, at_fdcwd, target, no_replace) == 0 else ctypes.get_errno()

    return rename


def lstat(where: str) -> os.stat_result | None:
    """What lies at `where`, links not followed; None if nothing does."""
    try:
        return os.lstat(where)
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise


def file_size(where: str) -> int | None:
    """Bytes of the regular file at `where`; None if there is none."""
    try:
        found = os.lstat(where)
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise failure(error, "stat", where) from error
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def require_regular(found: os.stat_result, where: str) -> None:
    """Damaged unless it is a regular file: nothing is followed, nothing blocks."""
    if not stat.S_ISREG(found.st_mode):
        raise Damaged(
            f"{where} is {kind(found)}, expected a regular file",
            path=where,
            hint="highcamp makes no such thing and did not read it; look who put it there",
        )


def kind(found: os.stat_result) -> str:
    """In words, what sort of file it is."""
    kinds = {
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFREG: "a regular file",
    }
    return kinds.get(stat.S_IFMT(found.st_mode), "a device")


def code_name(error: OSError) -> str:
    """The name of its errno, such as "ENOSPC"."""
    return errno.errorcode.get(error.errno or 0, f"errno {error.errno}")


@contextlib.contextmanager
def told(call: str, where: str, *, needed: int | None = None) -> Iterator[None]:
    """Turn an OSError into a StorageError that says what failed, where and why; needed: bytes still to write."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise failure(error, call, where, needed=needed) from error


def failure(error: OSError, call: str, where: str, *, needed: int | None = None, to: str | None = None) -> StorageError:
    """The StorageError that tells an OSError: NotThere, Taken or the plain one."""
    message = f"{call} of {where}{f' to {to}' if to else ''} failed: {error.strerror} ({code_name(error)})"
    if error.errno in _NO_SPACE:
        if needed is not None:
            message += f", {needed} bytes still to write"
        if (free := free_bytes(where)) is not None:
            message += f", {free} free on the file system"
    elif error.errno in NOT_ALLOWED:
        message += _ownership(where)
    cls = StorageError
    if error.errno == errno.ENOENT:
        cls = NotThere
    elif error.errno == errno.EEXIST:
        cls = Taken
    return cls(message, path=where, hint=_HINTS.get(error.errno or 0), errno=error.errno)


def free_bytes(where: str) -> int | None:
    """Bytes this user can still write at `where`, which need not exist yet; None if the file system does not tell."""
    while not os.path.exists(where) and where != os.path.dirname(where):
        where = os.path.dirname(where)
    try:
        found = os.statvfs(where)
    except OSError:  # an estimate; some network mounts do not answer
        return None
    return found.f_bavail * found.f_frsize


def _ownership(where: str) -> str:
    """Who owns `where`, or the nearest directory above it that can be seen, and who we are."""
    while True:
        with contextlib.suppress(OSError):
            found = os.stat(where)
            mode = stat.S_IMODE(found.st_mode)
            return f", {where} belongs to user {found.st_uid} with mode {mode:04o}, this process is user {os.geteuid()}"
        if where == os.path.dirname(where):
            return ""
        where = os.path.dirname(where)

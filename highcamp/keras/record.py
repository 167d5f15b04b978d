"""Files written whole: durable before they appear, and saying of themselves how good they are.

The record of a file (metric, mode, value) lies inside it, as the comment of the `.keras` archive or as an attribute of the
HDF5 file. Keras reads both as before. So it appears with the file at once, moves with it, and is gone when it is gone:
there is nothing beside the file that could say something else.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import socket
import time
import zipfile
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import h5py

from highcamp.core import strict
from highcamp.errors import Damaged, HighcampError, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable

SUFFIXES = (".weights.h5", ".keras", ".h5")

MAX_RECORD_BYTES = 60_000  # a zip archive's comment holds 65,535; an HDF5 attribute 64 KiB
GRACE_SECONDS = 24 * 3600.0  # a pending file of another machine may be a save under way for at most this long

_ATTRIBUTE = "highcamp"
_PENDING = re.compile(r"\.highcamp-pending-([0-9a-f]{8})-(\d+)-[0-9a-f]{8}(\.weights\.h5|\.keras|\.h5)\Z")
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP})


@dataclass(frozen=True)
class Record:
    """What a saved file says of itself. value: of `monitor`, None if it was not measured. epoch: from 1."""

    monitor: str
    mode: str
    value: float | None
    epoch: int
    template: str


def write_file(target: str, write: Callable[[str], None], record: Record | None) -> None:
    """Let `write` make a file, and put it at `target` in one step, durable; what was there stays until then.

    write: called with a path in the same directory and with the same suffix. Raises StorageError; then `target` is
    untouched, and the unfinished file is gone.
    """
    directory = os.path.dirname(target) or "."  # noqa: PTH120  (paths are users' strings here, as in Keras)
    suffix = next(suffix for suffix in SUFFIXES if target.endswith(suffix))
    try:
        _make_directories(directory)
        pending = os.path.join(  # noqa: PTH118
            directory, f".highcamp-pending-{_HOST}-{os.getpid()}-{secrets.token_hex(4)}{suffix}"
        )
        try:
            write(pending)
            if record is not None:
                _embed(pending, record)
            _sync(pending)
            os.replace(pending, target)  # noqa: PTH105
            _sync(directory)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(pending)  # noqa: PTH108
    except HighcampError:
        raise
    except (OSError, RuntimeError) as error:  # h5py reports a full disk as RuntimeError from its clean-up
        number = getattr(error, "errno", None)
        raise StorageError(
            f"{target} could not be written: {error}",
            path=target,
            hint="the file that was there before is untouched",
            errno=number if isinstance(number, int) else None,
        ) from error


def check_room(target: str, needed: int) -> None:
    """Raise StorageError if the disk has less than `needed` bytes free: HDF5 brings a process down that it cannot write in."""
    place = os.path.abspath(os.path.dirname(target) or ".")  # noqa: PTH100, PTH120
    while not os.path.isdir(place):  # noqa: PTH112
        place = os.path.dirname(place)  # noqa: PTH120
    free = shutil.disk_usage(place).free
    if free < needed:
        raise StorageError(
            f"{target} could not be written: it needs {needed} bytes, {free} are free",
            path=target,
            hint="free some space; the file that was there before is untouched",
            errno=errno.ENOSPC,
        )


def read_record(path: str) -> Record | None:
    """What the file says of itself; None if it says nothing: it was written by Keras alone. Raises Damaged."""
    try:
        if path.endswith(".keras"):
            with zipfile.ZipFile(path) as archive:
                text = archive.comment
        else:
            with h5py.File(path, "r") as file:
                found = file.attrs.get(_ATTRIBUTE)
                text = b"" if found is None else str(found).encode()
    except (OSError, zipfile.BadZipFile, EOFError, KeyError, RuntimeError) as error:
        raise Damaged(
            f"{path} cannot be read: {error}", path=path, hint="it was cut short, or is no model file"
        ) from error
    if not text.startswith(b"{"):
        return None
    value = strict.read(text, where=path, limit=MAX_RECORD_BYTES)
    return _parse(value)


def sweep(directory: str) -> None:
    """Remove what killed saves left in `directory`: files of our own pattern whose process is gone, or of long ago."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for entry in list(os.scandir(directory)):
            found = _PENDING.match(entry.name)
            if found is None:
                continue
            with contextlib.suppress(FileNotFoundError):
                is_old = time.time() - entry.stat(follow_symlinks=False).st_mtime > GRACE_SECONDS
                if is_old or (found[1] == _HOST and not _is_running(int(found[2]))):
                    os.unlink(entry.path)  # noqa: PTH108


def _embed(path: str, record: Record) -> None:
    text = strict.write({"highcamp": 1, **asdict(record)})
    if len(text) > MAX_RECORD_BYTES:
        return
    if path.endswith(".keras"):
        # The comment, not a member: Keras unpacks the whole archive into a temporary directory when it has a fourth one.
        with zipfile.ZipFile(path, "a") as archive:
            archive.comment = text
    else:
        with h5py.File(path, "r+") as file:
            file.attrs[_ATTRIBUTE] = text.decode()


def _parse(value: Any) -> Record | None:
    """A record of version 1; anything else, newer versions too, says nothing we could rely on."""
    if not isinstance(value, dict) or value.get("highcamp") != 1:
        return None
    number, epoch = value.get("value"), value.get("epoch")
    texts = [value.get(key) for key in ("monitor", "mode", "template")]
    if not all(isinstance(text, str) for text in texts) or isinstance(number, bool) or not isinstance(epoch, int):
        return None
    if number is not None and not isinstance(number, int | float):
        return None
    return Record(str(texts[0]), str(texts[1]), None if number is None else float(number), epoch, str(texts[2]))


def _make_directories(directory: str) -> None:
    """Make missing directories, each durable in its parent: else a power cut takes the file with its directory."""
    missing = []
    path = os.path.abspath(directory)  # noqa: PTH100
    while not os.path.isdir(path):  # noqa: PTH112
        missing.append(path)
        path = os.path.dirname(path)  # noqa: PTH120
    for made in reversed(missing):
        with contextlib.suppress(FileExistsError):
            os.mkdir(made)  # noqa: PTH102
        _sync(os.path.dirname(made))  # noqa: PTH120


def _sync(path: str) -> None:
    """Fsync a file or directory; a file system that cannot sync directories is no reason not to save."""
    is_directory = os.path.isdir(path)  # noqa: PTH112
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        full = getattr(fcntl, "F_FULLFSYNC", None)  # macOS: fsync alone stops at the drive's cache
        if full is not None:
            with contextlib.suppress(OSError):
                fcntl.fcntl(descriptor, full)
                return
        os.fsync(descriptor)
    except OSError as error:
        if not is_directory or error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

"""DurableIO: Lightning's own `.ckpt` files, made atomic, durable and verified.

A `.ckpt` is a zip archive. Its comment, which every reader of zip archives passes over, holds the digest of all that is
before it: "highcamp " and the text of `highcamp.core.digest`, after an end record that gives the comment's length.
"""

# Text throughout, for the reason in storage/system.py.
# ruff: noqa: PTH102, PTH105, PTH108, PTH112, PTH113, PTH114, PTH118, PTH119, PTH120, PTH123, PTH208

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import threading
import warnings
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from highcamp.core.digest import Hasher
from highcamp.errors import Damaged, Refused
from highcamp.storage import system
from highcamp.storage.local import DurabilityWarning

if TYPE_CHECKING:
    from collections.abc import Iterator

_MARK = b"highcamp "
_COMMENT_BYTES = len(_MARK) + len(Hasher().text())
_END = b"PK\x05\x06"  # the end record of a zip archive; its last two bytes are the length of the comment
_END_BYTES = 22
_PIECE_BYTES = 1 << 20  # gathered before they are written, and read at once: fits into the cache while it is hashed
_PENDING = re.compile(r"^\..+\.pending-[0-9a-f]{16}$")


class DurableIO(TorchCheckpointIO):
    """A CheckpointIO for Trainers whose checkpoints are saved by Lightning: `Trainer(plugins=[DurableIO()])`.

    A file appears whole or not at all, and once it is saved it survives a power cut: it is written beside its target, its
    bytes and its name are fsynced. Its digest travels in it and is verified when it is loaded; files without one still load.
    A file is never removed while it is the only whole one of its directory: its removal waits for the next save.

    Files stay what `torch.load` and Lightning read, so loading one is `torch.load`: unless it is told `weights_only=True`,
    it runs what the file says. Load only files you trust; highcamp's own checkpoints need no such trust.
    """

    def __init__(self) -> None:
        """Nothing is written yet."""
        super().__init__()
        self._lock = threading.Lock()  # AsyncCheckpointIO saves in a thread, and removes in another
        self._postponed: list[str] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save, and return when the file is durable. Raises StorageError, and Refused for a path that is not local."""
        if storage_options is not None:
            raise TypeError("DurableIO takes no storage_options: it writes local files")
        where = _local(path)
        directory, name = os.path.split(where)
        _make(directory)
        _sweep(directory)
        pending = os.path.join(directory, f".{name}.pending-{os.urandom(8).hex()}")
        with system.told("create", pending):
            descriptor = os.open(pending, system.NEW, system.FILE_MODE)
        try:
            try:
                with contextlib.suppress(OSError):  # a file system without locks: nothing is swept there
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _fill(descriptor, pending, checkpoint)
                with system.told("rename", where):
                    os.replace(pending, where)
            except BaseException:
                with contextlib.suppress(OSError):  # tidying; the error under way is the one to tell
                    os.unlink(pending)
                raise
        finally:
            with contextlib.suppress(OSError):  # what could fail here has been told by fsync
                os.close(descriptor)
        _sync_directory(directory)
        with self._lock:
            waiting = [each for each in self._postponed if each != where]
            self._postponed = [each for each in waiting if not _remove_if_spare(each)]

    def load_checkpoint(self, path: Any, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        """Verify, then load as `TorchCheckpointIO` does. Raises Damaged for a file that was altered or cut short."""
        where = _local_or_none(path)
        if where is not None and os.path.isfile(where):
            _verify(where)
        found: dict[str, Any] = super().load_checkpoint(path, *arguments, **keywords)
        return found

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file, durably; if it is the only whole one of its directory, when the next one is durable."""
        where = _local_or_none(path)
        if where is None or os.path.isdir(where):
            super().remove_checkpoint(path)
            return
        if os.path.basename(where).startswith("."):  # Lightning's tuners save these for the moment
            _remove(where)
            return
        with self._lock:
            if not _remove_if_spare(where):
                self._postponed.append(where)


class _Sealed:
    """The file that torch.save writes to: hashes what passes, and at the end puts the digest into the comment.

    error: what went wrong, for torch tells of it in words of its own.
    """

    def __init__(self, descriptor: int, where: str) -> None:
        self._descriptor, self._where = descriptor, where
        self._hasher = Hasher()
        self._held = bytearray()
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        """Take the next bytes; the end is held back."""
        view = memoryview(data).cast("B")
        try:
            if len(view) < _PIECE_BYTES:
                self._held += view
                if len(self._held) > _PIECE_BYTES + _END_BYTES:
                    self._out(memoryview(bytes(self._held[:-_END_BYTES])))
                    del self._held[:-_END_BYTES]
            else:
                self._out(memoryview(bytes(self._held)))
                self._out(view[:-_END_BYTES])
                self._held = bytearray(view[-_END_BYTES:])
        except BaseException as error:
            self.error = self.error or error
            raise
        return len(view)

    def flush(self) -> None:
        """Part of what torch expects of a file; the fsync comes later."""

    def finish(self) -> None:
        """Write what was held back, and the digest. A file of torch's older format, which is no archive, stays without."""
        is_archive = _is_end(bytes(self._held[-_END_BYTES:]), 0)
        if is_archive:
            self._held[-2:] = _COMMENT_BYTES.to_bytes(2, "little")
        self._out(memoryview(bytes(self._held)))
        if is_archive:
            self._write(memoryview(_MARK + self._hasher.text().encode()))

    def _out(self, view: memoryview) -> None:
        self._hasher.update(view)
        self._write(view)

    def _write(self, view: memoryview) -> None:
        while view:
            with system.told("write", self._where, needed=len(view)):
                view = view[system.write(self._descriptor, view) :]


def _fill(descriptor: int, where: str, checkpoint: dict[str, Any]) -> None:
    sealed = _Sealed(descriptor, where)
    try:
        torch.save(checkpoint, sealed)  # type: ignore[arg-type]  # it needs `write` and `flush`, its stubs say more
    except Exception:
        if sealed.error is not None:
            raise sealed.error from None
        raise
    sealed.finish()
    with system.told("fsync", where):
        system.sync_file(descriptor)


def _verify(where: str) -> None:
    """Raise Damaged unless the bytes of a file fit its digest. An archive without one must at least have its end."""
    with system.told("read", where), open(where, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < _END_BYTES:
            raise _damaged(where, f"it has {size} bytes")
        saved = _digest_in(file, size)
        if saved is None:
            file.seek(0)
            is_archive = file.read(2) == b"PK"
            file.seek(size - _END_BYTES)
            if is_archive and not _is_end(file.read(), 0):
                raise _damaged(where, "it is the beginning of an archive without its end")
            return
        hasher = Hasher()
        for piece in _pieces(file, size - _COMMENT_BYTES):
            hasher.update(piece)
    if hasher.text() != saved:
        raise _damaged(where, f"its digest is {hasher.text()}, expected {saved}")


def _digest_in(file: Any, size: int) -> str | None:
    """The digest that a file carries; None if it has none."""
    file.seek(max(0, size - _COMMENT_BYTES - _END_BYTES))
    end, comment = file.read(_END_BYTES), file.read()
    if not _is_end(end, _COMMENT_BYTES) or not comment.startswith(_MARK):
        return None
    text: str = comment[len(_MARK) :].decode("ascii", "replace")
    return text


def _is_end(data: bytes, comment: int) -> bool:
    """Whether this is the end record of an archive with a comment of so many bytes; torch writes none."""
    return data.startswith(_END) and data.endswith(comment.to_bytes(2, "little"))


def _pieces(file: Any, count: int) -> Iterator[bytes]:
    file.seek(0)
    while count:
        piece = file.read(min(_PIECE_BYTES, count))
        if not piece:
            return
        count -= len(piece)
        yield piece


def _damaged(where: str, reason: str) -> Damaged:
    return Damaged(
        f"{where} was altered after it was saved, or is cut short: {reason}",
        path=where,
        hint="load another checkpoint; ModelCheckpoint(save_top_k=…) keeps several",
    )


def _remove_if_spare(where: str) -> bool:
    """Remove a file if another whole one lies beside it; whether it is gone."""
    directory, name = os.path.split(where)
    if system.lstat(where) is None:
        return True
    with system.told("listing", directory):
        others = [each for each in os.listdir(directory) if each != name and not each.startswith(".")]
    if not any(_is_sealed(os.path.join(directory, each)) for each in others):
        return False
    _remove(where)
    return True


def _is_sealed(where: str) -> bool:
    """Whether a file was saved as a whole: it got its name only when its last bytes were durable."""
    if not os.path.isfile(where) or os.path.islink(where):
        return False
    with system.told("read", where), open(where, "rb") as file:
        return _digest_in(file, os.fstat(file.fileno()).st_size) is not None


def _remove(where: str) -> None:
    if system.lstat(where) is None:
        return
    with system.told("remove", where):
        os.unlink(where)
    _sync_directory(os.path.dirname(where))


def _sweep(directory: str) -> None:
    """Remove what killed processes have left; a file that is being written is locked by its writer."""
    with system.told("listing", directory):
        leftovers = [name for name in os.listdir(directory) if _PENDING.match(name)]
    for name in leftovers:
        where = os.path.join(directory, name)
        with contextlib.suppress(OSError):  # another writer's, or gone already: nothing that a save should fail for
            descriptor = os.open(where, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(where)
            finally:
                os.close(descriptor)


def _make(directory: str) -> None:
    """Make a directory and those above it, each of their names durable."""
    if os.path.isdir(directory):
        return
    _make(os.path.dirname(directory))
    with contextlib.suppress(FileExistsError), system.told("mkdir", directory):
        os.mkdir(directory)
    _sync_directory(os.path.dirname(directory))


def _sync_directory(directory: str) -> None:
    error = system.sync_directory(directory)
    if error is not None:
        warnings.warn(
            f"{directory}: durability is not guaranteed on this file system, it cannot fsync a directory "
            f"({system.code_name(error)}); a power cut may lose the newest checkpoints",
            DurabilityWarning,
            stacklevel=2,
        )


def _local(path: Any) -> str:
    where = _local_or_none(path)
    if where is None:
        raise Refused(
            f"{path} is no local path, and only local files can be made durable by DurableIO",
            path=str(path),
            hint="save to a local directory, or leave DurableIO out",
        )
    return where


def _local_or_none(path: Any) -> str | None:
    """The absolute path; None for the address of a remote file system."""
    text = os.fspath(path)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    return None if "://" in text or "::" in text else os.path.abspath(text)  # noqa: PTH100

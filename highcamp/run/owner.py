"""The owner: at most one live process writes to a run, and a dead one is taken over.

`owner.json` says who: host, process, and when that process started, so that a number used again is no mistake. It is the
truth; no lock is held while training runs, because locks are inherited by data-loader workers and unknown to some
network file systems. A short lock only keeps two starting processes from deciding at the same moment.

A process on this machine is looked up. One elsewhere (another host, container or boot) cannot be: its record counts up
while it lives, so we watch it for a while and take over if it stands still.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from highcamp.errors import Damaged, HighcampError, RunLocked, StorageError
from highcamp.run.history import format_time

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from highcamp.storage.store import Store

OWNER = "owner.json"
MAX_OWNER_BYTES = 1 << 16  # names and numbers of one process
BEAT_SECONDS = 5.0  # two small fsyncs now and then
WATCH_SECONDS = 6 * BEAT_SECONDS  # a beat is fsynced, and may wait for a long flush of the checkpoint before it


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """Who writes to a run. boot, namespace: where its process number means something. beat: counts up while it lives.

    number: how often the run has changed hands.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started: str
    since: str
    number: int = 1
    beat: int = 0

    def describe(self) -> str:
        """The words for an error."""
        return f"process {self.pid} on {self.host}, since {self.since}"


class Ownership:
    """This process's hold on a run, kept alive by a small thread until `release`."""

    def __init__(self, store: Store, owner: Owner) -> None:
        """Begin to keep the record of `owner` alive."""
        self._store = store
        self._owner = owner
        self._stop = threading.Event()
        _held.add(self)
        self._thread = threading.Thread(target=self._keep_alive, name="highcamp-owner", daemon=True)
        self._thread.start()

    @property
    def number(self) -> int:
        """How often the run has changed hands."""
        return self._owner.number

    def release(self) -> None:
        """Give the run back; the next process need not wait. Twice is once."""
        if self._stop.is_set() or self._owner.pid != os.getpid():
            return  # a forked child has a copy of us, and holds nothing
        self._stop.set()
        self._thread.join()
        _held.discard(self)
        with contextlib.suppress(StorageError):  # a record left behind names what this process no longer holds
            found = _read(self._store)
            if found is not None and self.describes(found):  # not a successor's, who took over while we stood still
                self._store.remove(OWNER)

    def check(self) -> None:
        """Whether this very process still holds the run. Raises RunLocked naming who does."""
        found = _read(self._store)
        if self._owner.pid == os.getpid() and (found is None or self.describes(found)):
            return
        if self._owner.pid != os.getpid():
            who = f"process {self._owner.pid}, from which this one was forked"
        else:
            who = found.describe() if found else "another process"
        raise RunLocked(
            f"{self._store.url} is being written by {who}; nothing was written",
            path=self._store.url,
            hint="let one process write to a run; what was committed is untouched",
        )

    def describes(self, owner: Owner) -> bool:
        """Whether `owner` is the record of this hold."""
        return _same(owner, self._owner)

    def _keep_alive(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            with contextlib.suppress(StorageError):  # a full disk must not end the beat for ever
                found = _read(self._store)
                if found is None or self.describes(found):  # never over the record of a successor
                    self._owner = msgspec.structs.replace(self._owner, beat=self._owner.beat + 1)
                    _write(self._store, self._owner)


_held: weakref.WeakSet[Ownership] = weakref.WeakSet()  # by this process, of any run


def take(
    store: Store, lock_directory: Path | None, now: datetime, watch: Callable[[float], None] = time.sleep
) -> Ownership:
    """Become the owner of the run in `store`.

    lock_directory: the run's directory where it is local. watch: how to wait. Raises RunLocked naming the owner.
    """
    with _deciding(lock_directory):
        found = _read(store)
        if found is not None and _is_alive(found, store, watch):
            raise RunLocked(
                f"{store.url} is being written by {found.describe()}",
                path=store.url,
                hint="wait for it, stop it, or use another directory",
            )
        owner = Owner(
            host=socket.gethostname(),
            boot=_boot(),
            namespace=_namespace(),
            pid=os.getpid(),
            started=_started(os.getpid()) or "",
            since=format_time(now),
            number=found.number + 1 if found else 1,
        )
        _write(store, owner)
    return Ownership(store, owner)


def current(store: Store) -> Owner | None:
    """The live owner of a run as far as can be told without waiting; None if there is none."""
    found = _read(store)
    if found is None or (_is_here(found) and _started(found.pid) != found.started):
        return None
    return found


@contextlib.contextmanager
def _deciding(lock_directory: Path | None):  # type: ignore[no-untyped-def]  # noqa: ANN202
    if lock_directory is None:
        yield
        return
    import filelock

    try:
        lock_directory.mkdir(parents=True, exist_ok=True)  # made durable by the first write of the store
        with filelock.FileLock(lock_directory / ".owner.lock", timeout=2 * WATCH_SECONDS):
            yield
    except filelock.Timeout as error:
        raise RunLocked(
            f"{lock_directory} is being taken by another starting process", path=str(lock_directory), hint="try again"
        ) from error
    except OSError as error:
        if isinstance(error, HighcampError):
            raise
        raise StorageError(
            f"{lock_directory} cannot be written to: {error.strerror}",
            path=str(lock_directory),
            hint="name a directory that you may write to, on a disk that is not full",
            errno=error.errno,
        ) from error


def _is_alive(owner: Owner, store: Store, watch: Callable[[float], None]) -> bool:
    if _is_here(owner):
        if owner.pid == os.getpid():  # its record may have outlived its hold: the disk failed when it was given back
            return any(held.describes(owner) for held in list(_held))
        return _started(owner.pid) == owner.started
    watch(WATCH_SECONDS)
    later = _read(store)
    return later is not None and (not _same(later, owner) or later.beat != owner.beat)


def _is_here(owner: Owner) -> bool:
    """Whether its process number means something in this process."""
    return (owner.host, owner.boot, owner.namespace) == (socket.gethostname(), _boot(), _namespace())


def _same(one: Owner, other: Owner) -> bool:
    return msgspec.structs.replace(one, beat=0) == msgspec.structs.replace(other, beat=0)


def _read(store: Store) -> Owner | None:
    try:
        return msgspec.json.decode(store.read(OWNER, MAX_OWNER_BYTES), type=Owner)
    except (FileNotFoundError, Damaged, msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None  # no record, or one torn by a crash: nobody holds the run


def _write(store: Store, owner: Owner) -> None:
    store.replace(OWNER, msgspec.json.encode(owner) + b"\n")


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When the process began, as the kernel tells it; "" where it does not, None if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            return ""
        return ""
    if fields[0] in "ZX":  # dead, waiting for its parent to notice
        return None
    return fields[19]

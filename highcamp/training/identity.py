"""The identity of a slot: which run and which process it belongs to, and whether that process is still there.

A lock on the file would be enough if data-loader workers did not inherit it: a free one proves that nobody is left, a
held one only that somebody has the file open. Then the process is looked up by its number and the time it started.
Sources: proc_pid_stat(5), flock(2), pid_namespaces(7).
"""

from __future__ import annotations

import errno
import fcntl
import os
import urllib.parse
from pathlib import Path

import msgspec

from highcamp.core.manifest import Count  # noqa: TC001  (msgspec reads it when the program runs)
from highcamp.errors import StorageError

_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR})


class Identity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whose a slot is.

    place: the run's directory in URL quoting (a path may hold bytes that are no text), "" if it is not on a local disk.
    uid: the user. boot, namespace: where the process number means something. started: clock ticks after the boot.
    """

    run_id: str
    attempt: Count
    place: str
    uid: Count
    boot: str
    namespace: Count
    pid: Count
    started: Count

    def is_of_place(self, place: str | os.PathLike[str] | None) -> bool:
        """Whether it belongs to the run at `place`; True if either is unknown, or if the recorded place is gone.

        A run that was moved is the same run. One that was copied has the same id, and another directory beside it.
        """
        if not self.place or place is None:
            return True
        try:
            return self.is_gone or os.path.samefile(self._directory, place)  # noqa: PTH121  (bytes)
        except OSError:  # an unreachable directory proves nothing: the snapshot stays where it is
            return False

    @property
    def is_gone(self) -> bool:
        """Whether the run was on a local disk and is not there any more."""
        if not self.place:
            return False
        try:
            os.lstat(self._directory)
        except OSError as error:
            return error.errno in _ABSENT
        return False

    @property
    def _directory(self) -> bytes:
        return urllib.parse.unquote_to_bytes(self.place)


def current(run_id: str, attempt: int, place: str | os.PathLike[str] | None) -> Identity:
    """The identity of what this process makes. Raises StorageError where the system does not tell it (not on Linux)."""
    own = os.getpid()
    since, boot_id = started(own), boot()
    if since is None or not boot_id:
        raise StorageError(
            "a snapshot in memory cannot be told from that of another process: /proc does not say who runs since when",
            path="/proc",
            hint="memory_every needs Linux; leave it out",
            errno=errno.ENOTSUP,
        )
    return Identity(
        run_id=run_id,
        attempt=attempt,
        place="" if place is None else urllib.parse.quote_from_bytes(os.fsencode(os.path.realpath(place))),
        uid=os.geteuid(),
        boot=boot_id,
        namespace=namespace(),
        pid=own,
        started=since,
    )


def is_held(descriptor: int, identity: Identity | None) -> bool:
    """Whether the process that made an open file may still write to it.

    identity: as the file tells it, None if it does not. Whoever cannot be looked up, in another container for example,
    counts as alive as long as somebody has the file open.
    """
    if not _is_locked(descriptor):
        return False
    if identity is None or (identity.boot, identity.namespace) != (boot(), namespace()):
        return True
    return started(identity.pid) == identity.started


def _is_locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False


def boot() -> str:
    """The id of this boot; "" where the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def namespace() -> int:
    """The number of the namespace in which process numbers mean something; 0 where there are none."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


def started(pid: int) -> int | None:
    """When a process began, in clock ticks after the boot; None if there is no such process, or only its exit code."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    state, threads, ticks = fields[0], int(fields[17]), int(fields[19])
    if state in "ZX" and threads <= 1:  # a first thread can end before the others do, and they may still write
        return None
    return ticks

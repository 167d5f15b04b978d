"""The tier of snapshots in shared memory: a killed process loses nothing since the last complete one.

Two slots take turns, so that the newest complete snapshot stays where it is while the next one is copied. The files
outlive the process; they do not outlive the machine, or the container whose memory they count against. They are beside
the checkpoints on disk, not instead of them.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from highcamp.core.names import check_name
from highcamp.errors import Damaged, HighcampError, InvalidArgument, StorageError, Unreadable
from highcamp.storage import system
from highcamp.storage.store import NotThere
from highcamp.training import allowance, found, identity, slot
from highcamp.training.identity import is_held
from highcamp.training.slot import Slot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from highcamp.training.found import Found
    from highcamp.training.identity import Identity

    Place = str | os.PathLike[str] | None

SHM = "/dev/shm"  # noqa: S108  (where every Linux has it; files are made there without following or replacing anything)
_NAME = r"highcamp-{uid}-(?P<run>.+)-(?P<attempt>\d{{1,16}})\.[01]\Z"


class Tier:
    """Two slots of one attempt."""

    def __init__(self, run_id: str, attempt: int, *, place: Place = None, directory: str = SHM) -> None:
        """No memory is taken yet. place: the run's directory, if it is on a local disk.

        Raises StorageError where there is no shared memory of this kind: on macOS, in some containers.
        """
        check_name(run_id, "run id")
        if not Path(directory).is_dir() or not hasattr(os, "posix_fallocate"):
            raise StorageError(
                f"there is no shared memory at {directory}, so no snapshot can be kept in it",
                path=directory,
                hint="memory_every needs Linux and /dev/shm; leave it out",
                errno=errno.ENOTSUP,
            )
        self._identity = identity.current(run_id, attempt, place)
        self._directory = directory
        self._slots: dict[int, Slot] = {}
        self._count = itertools.count(1, 2)
        self._is_closed = False

    @property
    def newest(self) -> Slot | None:
        """The slot that holds the newest complete snapshot; None before the first."""
        complete = [entry for entry in self._slots.values() if entry.is_complete]
        return max(complete, key=lambda entry: entry.sequence, default=None)

    @property
    def size_bytes(self) -> int:
        """The memory that both files take."""
        return sum(entry.size_bytes for entry in self._slots.values())

    def slot(self, size: int) -> Slot:
        """The slot for the next snapshot, of `size` bytes: the one that does not hold the newest complete one.

        It is made or extended if need be, which takes as long as the first copy into fresh memory. Raises StorageError
        with both sizes if shared memory is too small for two; what is there stays as it is.
        """
        for entry in self._slots.values():
            entry.check_usable()
        newest = self.newest
        index = 1 if newest is not None and newest is self._slots.get(0) else 0
        return self._of_size(index, size)

    def prepare(self, size: int) -> None:
        """Make both slots ahead, in a thread for example, so that no snapshot has to wait for fresh memory.

        Nothing else may be called meanwhile. Raises what `slot` raises.
        """
        if not self._slots:
            for index in (0, 1):
                self._of_size(index, size)

    def _of_size(self, index: int, size: int) -> Slot:
        if self._is_closed or os.getpid() != self._identity.pid:
            raise InvalidArgument(
                "this tier is closed, or was made by the process from which this one was forked", hint="make a new one"
            )
        chosen = self._slots.get(index)
        if chosen is None or len(chosen.view) < size:
            self._check_room(size)
        if chosen is None:
            path = str(Path(self._directory) / slot.file_name(self._identity, index))
            chosen = self._slots[index] = Slot(path, self._identity, size, self._count)
        else:
            chosen.grow(size)
        return chosen

    def _check_room(self, size: int) -> None:
        """Refuse before memory is taken: for one slot alone it would be taken in vain, and a full machine kills processes."""
        wanted = slot.table_start(size)
        present = [self._slots[index].size_bytes if index in self._slots else 0 for index in (0, 1)]
        missing = sum(max(wanted - size_bytes, 0) for size_bytes in present)
        free = _free_bytes(self._directory)
        if free is not None and free < missing:
            raise slot.too_small(self._directory, missing, free)

    def close(self, *, keep: bool = False) -> None:
        """Remove both files; with `keep` the newest complete snapshot stays, for the next attempt to find. Twice is once."""
        self._is_closed = True
        if os.getpid() != self._identity.pid:
            return  # a forked child has a copy of us, and its files are the parent's
        newest = self.newest if keep else None
        while self._slots:
            _, entry = self._slots.popitem()
            if entry is newest:
                entry.release()
            else:
                entry.remove()


def _free_bytes(directory: str) -> int | None:
    """What can be taken: the rest of the file system, of the machine's memory or of the container's; None if untold."""
    known: list[int] = []
    with system.told("statvfs", directory):
        disk = os.statvfs(directory)
    if disk.f_blocks:  # 0: without a limit
        known.append(disk.f_bavail * disk.f_frsize)
    with contextlib.suppress(OSError):  # an estimate
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        known += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    if (left := allowance.left_bytes()) is not None:
        known.append(left)
    return min(known, default=None)


def find(
    run_id: str,
    *,
    place: Place = None,
    directory: str = SHM,
    tell: Callable[[HighcampError], object] = lambda _: None,
) -> list[Found]:
    """The complete snapshots that dead processes of this run have left in this boot, newest first.

    For whoever holds the run. place: the run's directory; the snapshots of a copy of it are not its own. tell: is called
    for each file under our name that is no snapshot, and says why. The bytes are yet to be verified.
    """
    snapshots: list[Found] = []
    for path, _ in _paths(directory, check_name(run_id, "run id")):
        try:
            with found.opened(path) as descriptor:
                owner = found.read_identity(descriptor, path)
                if owner is None or owner.boot != identity.boot() or not owner.is_of_place(place):
                    continue
                if not is_held(descriptor, owner) and (snapshot := found.read(descriptor, path)) is not None:
                    snapshots.append(snapshot)
        except NotThere:
            continue
        except HighcampError as error:
            tell(error)
    return sorted(snapshots, key=lambda snapshot: snapshot.order, reverse=True)


def sweep(run_id: str, *, place: Place = None, directory: str = SHM) -> list[str]:
    """Remove what dead processes of this user have left in shared memory, and return the paths.

    Of this run everything, its snapshots included: for whoever holds the run and has taken from it what is of use. Of
    other runs what nobody can use any more: of another boot, damaged, or of a run whose directory is gone. Raises
    StorageError.
    """
    check_name(run_id, "run id")
    removed: list[str] = []
    for path, its_run in _paths(directory):
        try:
            with found.opened(path) as descriptor:
                if _is_useless(descriptor, path, place, is_own_run=its_run == run_id) and slot.unlink_if_same(
                    path, os.fstat(descriptor)
                ):
                    removed.append(path)
        except (NotThere, Damaged):  # gone meanwhile, or not made by this user
            continue
    return removed


def _is_useless(descriptor: int, path: str, place: Place, *, is_own_run: bool) -> bool:
    owner: Identity | None = None
    is_foreign_format = False
    try:
        owner = found.read_identity(descriptor, path)
    except Unreadable:
        is_foreign_format = True
    except Damaged:
        owner = None
    if is_held(descriptor, owner):
        return False
    if is_own_run:
        return owner is None or owner.is_of_place(place)
    if owner is None:
        # Another version's is for that version to judge; an empty file may be in the making this very moment.
        return not is_foreign_format and os.fstat(descriptor).st_size > 0
    return owner.boot != identity.boot() or owner.is_gone


def _paths(directory: str, run_id: str | None = None) -> Iterator[tuple[str, str]]:
    """The files under names of this user: path and run id."""
    pattern = re.compile(_NAME.format(uid=os.geteuid()))
    try:
        with system.told("listing", directory):
            names = sorted(entry.name for entry in Path(directory).iterdir())
    except NotThere:
        return
    for name in names:
        match = pattern.match(name)
        if match and run_id in {None, match["run"]}:
            yield str(Path(directory) / name), match["run"]

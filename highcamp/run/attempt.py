"""The attempt under way: the writing side of a run. One process owns it, logs, commits and prunes."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import weakref
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from highcamp.core.manifest import Manifest, split_metrics
from highcamp.errors import Damaged, Refused, StorageError, Unreadable
from highcamp.run import commit, owner, weights
from highcamp.run.checkpoint import Checkpoint
from highcamp.run.history import Event, append_events, attempt_numbers, format_time, log_event, save_event
from highcamp.run.run import Run
from highcamp.run.settings import PaceFacts, Settings, keep_facts, monitor_facts, read_settings, write_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from highcamp.policy.cadence import Every
    from highcamp.policy.monitor import Monitor
    from highcamp.policy.retention import Keep
    from highcamp.run.commit import Part
    from highcamp.run.history import SaveCost
    from highcamp.storage.store import Store


MAX_UNDURABLE_ROWS = 10_000  # kept in memory, a few MB, until they are known to be durable
MAX_REASON = 1000  # characters of why a save has failed


class OngoingAttempt:
    """One process's stretch of a run, while it lasts.

    number: its place among the attempts. run: the run as a reader sees it.
    """

    def __init__(self, store: Store, *, monitor: Monitor | None, keep: Keep, every: Every) -> None:
        """Become the owner of the run in `store`, which begins to exist with it, and clear what dead saves left behind.

        Raises RunLocked naming a live owner, StorageError if the place cannot be written to.
        """
        self._pid = os.getpid()
        self._store = store
        self._monitor = monitor
        self._keep = keep
        directory = local_directory(store)
        check_place(store)
        self._ownership = owner.take(store, directory, datetime.now(UTC))
        try:
            self.run = Run(store)
            self._settings = self._open_settings(str(every))
            self.swept = commit.sweep(store)
            self.number = max(attempt_numbers(store), default=0) + 1
            self._sequence = max((entry.sequence for entry in self.run.checkpoints), default=0)
        except BaseException:
            self._ownership.release()
            raise
        weakref.finalize(self, self._ownership.release)  # also if it is forgotten rather than ended
        self._damaged: set[str] = set()
        self._lock = threading.Lock()  # the history is written by the loop and by the writer
        self._parent: str | None = None
        self._has_told_indivisible = False
        self._rows, self._part = 0, 1
        self._unwritten: list[Event] = []  # not in the current history file
        self._undurable: list[Event] = []  # not known to survive a power cut

    def _open_settings(self, every: str) -> Settings:
        try:
            known = read_settings(self._store)
        except Unreadable:
            raise
        except Damaged:
            known = None  # its facts are in the manifests too, or are about to be written again
        self._written = known
        if known is None:
            manifests = [entry.manifest for entry in self.run.checkpoints]
            run_id = manifests[-1].run_id if manifests else secrets.token_hex(8)
            known = Settings(run_id=run_id, created_at=format_time(datetime.now(UTC)))
        return msgspec.structs.replace(
            known, monitor=monitor_facts(self._monitor), keep=keep_facts(self._keep), every=every, pace=None
        )

    @property
    def run_id(self) -> str:
        """Tells this run from every other one, also before anything is written."""
        return self._settings.run_id

    def note(
        self,
        *,
        tracked: Sequence[str] | None = None,
        epochs_planned: int | None = None,
        pace: Mapping[str, Any] | None = None,
    ) -> None:
        """Write into `run.json` what is known now.

        tracked: the names of the objects that checkpoints will hold. pace: what `Every.auto` has chosen, see `PaceFacts`.
        """
        with self._alone():
            changed = self._settings
            if tracked is not None:
                changed = msgspec.structs.replace(changed, tracked=tuple(tracked))
            if epochs_planned is not None:
                changed = msgspec.structs.replace(changed, epochs_planned=epochs_planned)
            if pace:
                changed = msgspec.structs.replace(changed, pace=PaceFacts(**pace))
            self._settings = changed
            if self._written != changed:
                write_settings(self._store, changed)
                self._written = changed

    def check_tracked(self, checkpoint: Checkpoint, names: Sequence[str]) -> None:
        """Whether a checkpoint holds the objects called `names`, no more and no fewer. Raises Refused listing both."""
        saved, live = set(checkpoint.objects), set(names)
        if saved != live:
            only_saved, only_live = sorted(saved - live), sorted(live - saved)
            parts = [f"saved but not tracked: {', '.join(only_saved)}"] if only_saved else []
            parts += [f"tracked but not saved: {', '.join(only_live)}"] if only_live else []
            raise Refused(
                f"{checkpoint.path} holds other objects than are tracked ({'; '.join(parts)})",
                path=checkpoint.path,
                hint="track the same objects under the same names; for another experiment use another directory",
            )

    def start(self, resumed_from: Checkpoint | None) -> None:
        """Write down, durably, where this attempt begins."""
        self._parent = resumed_from.name if resumed_from else None
        self._append(
            Event(
                event="start",
                at=format_time(datetime.now(UTC)),
                resumed_from=self._parent,
                step=resumed_from.step if resumed_from else 0,
                epoch=resumed_from.epoch if resumed_from else 0,
                batch=resumed_from.batch if resumed_from else 0,
                host=socket.gethostname(),
                pid=os.getpid(),
            ),
            durable=True,
        )

    def log(self, step: int, epoch: int, metrics: Mapping[str, float], *, batch: int = 0) -> None:
        """Append a row of metrics; it is durable before the next commit is. batch: 0 between epochs."""
        self._append(log_event(step, epoch, metrics, datetime.now(UTC), batch=batch), durable=False)

    def note_save(self, checkpoint: Checkpoint, cost: SaveCost) -> None:
        """Append what a save has cost; it is durable before the next commit is."""
        event = save_event(checkpoint.name, checkpoint.step, checkpoint.epoch, cost, datetime.now(UTC))
        self._append(event, durable=False)

    def note_failure(self, step: int, epoch: int, reason: str) -> None:
        """Append that a save has failed, as far as the disk allows; otherwise it is written with what comes next."""
        at = format_time(datetime.now(UTC))
        with contextlib.suppress(StorageError):  # it is the failure that is being noted
            self._append(Event(event="failed", at=at, step=step, epoch=epoch, how=reason[:MAX_REASON]), durable=False)

    def end(self, how: str, step: int, epoch: int) -> None:
        """Write down, durably, how this attempt ended, and give the run back."""
        try:
            event = Event(event="end", at=format_time(datetime.now(UTC)), how=how, step=step, epoch=epoch)
            self._append(event, durable=True)
        finally:
            self.release()

    def release(self) -> None:
        """Give the run back without a word."""
        self._ownership.release()

    def rewound_to(self, checkpoint: Checkpoint) -> None:
        """The loop went back to a checkpoint: what is saved next grows out of it."""
        self._parent = checkpoint.name

    def note_damaged(self, name: str) -> None:
        """Remember a checkpoint that was found damaged: it fills no quota, and nothing removes it."""
        self._damaged.add(name)

    def manifest(
        self, *, step: int, epoch: int, batch: int, metrics: Mapping[str, float], versions: dict[str, str]
    ) -> Manifest:
        """The facts of the next checkpoint; each call takes the next sequence number."""
        finite, nonfinite = split_metrics(metrics)
        return Manifest(
            run_id=self._settings.run_id, step=step, epoch=epoch, batch=batch, sequence=self._next_sequence(),
            attempt=self.number, owner=self._ownership.number, parent=self._parent, created_at=format_time(datetime.now(UTC)),
            metrics=finite, nonfinite=nonfinite, versions=versions,
        )  # fmt: skip

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep the other threads of this process out. Raises RunLocked in a forked child.

        It must not write to its parent's run, and a lock that was held when it was forked is never given back there.
        """
        if os.getpid() != self._pid:
            self._ownership.check()
        with self._lock:
            yield

    def _next_sequence(self) -> int:
        with self._alone():
            self._sequence += 1
            return self._sequence

    def commit(
        self, manifest: Manifest, parts: Sequence[Part], *, confirm: Callable[[], None] | None = None
    ) -> tuple[Checkpoint, dict[str, list[str]]]:
        """Make a checkpoint exist; when this returns it is durable, and so is every row logged before it.

        confirm: see `commit.commit`. Returns the digests of the tensors of each file too, in file order.
        """
        self._ownership.check()
        self._check_space(sum(each.new_bytes for part in parts for each in part.files))
        self.sync()  # a row lost in a power cut would turn the best into an unranked checkpoint
        name, manifest, digests = commit.commit(self._store, manifest, parts, confirm=confirm)
        self._parent = name
        return Checkpoint(name, manifest, manifest.values, store=self._store), digests

    def prune(self, tell: Callable[[str, int], object] = lambda *_: None) -> list[str]:
        """Remove what the retention does not keep, and return the names; what was committed last always stays.

        A best of which only the weights are kept goes when they have been taken from it. Nothing goes before what would be
        left is seen to be whole, and all rows that rank it are durable. tell: is called with a line on what became of a
        best, and its level: 0 for a warning, 2 for a detail.
        """
        plan = self.run.doomed(self._keep, monitor=self._monitor, damaged=self._damaged)
        doomed = [name for name in plan.remove if name != self._parent]
        strip = [name for name in plan.strip if name != self._parent]
        self._tell_indivisible(plan.indivisible, tell)
        if not doomed and not strip:
            return []
        self._ownership.check()
        self.sync()
        self.run.check_survivors([*doomed, *strip], damaged=self._damaged)
        for entry in [entry for entry in self.run.checkpoints if entry.name in strip]:
            try:
                taken = weights.take(entry, self._next_sequence())
            except Damaged as error:  # what is left of it stays, and the next best, which may be among the doomed, too
                self.note_damaged(entry.name)
                tell(str(error), 0)
                return self.prune(tell)
            except StorageError:
                for name in doomed:  # if the disk is full, this is what makes room
                    self._remove(name)
                raise
            tell(f"{entry.name} gave back its resume state; its weights are {taken.name}", 2)
        return [name for name in [*doomed, *strip] if self._remove(name)]

    def _remove(self, name: str) -> bool:
        """Remove a checkpoint for good, unless it is pinned or gone already; whether it was removed."""
        trash = self.run.withdraw_unpinned(name, doomed=True)
        if trash is not None:
            self._store.remove(commit.checkpoint_path(trash))
        return trash is not None

    def _tell_indivisible(self, names: Sequence[str], tell: Callable[[str, int], object]) -> None:
        """Say once why a best keeps its resume state, though only its weights are wanted."""
        if not names or self._has_told_indivisible:
            return
        self._has_told_indivisible = True
        tell(
            f"{', '.join(names)}: keeps its resume state, because its manifest does not tell weights from the rest; known "
            "are models, and parts of a passed state with names such as params",
            2,
        )

    def sync(self) -> None:
        """Make every row logged so far durable."""
        with self._alone():
            if self._undurable:
                self._write_rows(durable=True)

    def _append(self, event: Event, *, durable: bool) -> None:
        with self._alone():
            self._rows += 1
            event = msgspec.structs.replace(event, row=self._rows)
            self._unwritten.append(event)
            self._undurable.append(event)
            self._write_rows(durable=durable or len(self._undurable) > MAX_UNDURABLE_ROWS)

    def _write_rows(self, *, durable: bool) -> None:
        try:
            append_events(self._store, self.number, self._part, self._unwritten, durable=durable)
        except BaseException:
            # After a failed fsync the next one succeeds and proves nothing: that file is done with, and whatever is not
            # known to be durable goes into a new one.
            self._part += 1
            self._unwritten = list(self._undurable)
            raise
        self._unwritten = []
        if durable:
            self._undurable = []

    def _check_space(self, needed: int) -> None:
        """Fail before writing rather than in the middle; nothing good is ever removed to make room."""
        free = self._store.free_bytes()
        if free is not None and free < needed:
            raise StorageError(
                f"{self._store.url}: a checkpoint needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free",
                path=self._store.url,
                hint="free some space, or keep fewer checkpoints (Keep); training can go on meanwhile with on_error='warn'",
            )


def check_place(store: Store) -> None:
    """Whether a run can be there. Raises Refused for a file, or for a directory that may not be written to."""
    directory = local_directory(store)
    if directory is None:
        return
    # os.path rather than Path, whose methods raise PermissionError
    parent = next(parent for parent in (directory, *directory.parents) if os.path.exists(parent))  # noqa: PTH110
    if not os.path.isdir(parent):  # noqa: PTH112
        raise Refused(f"{parent} is a file, not a directory", path=str(directory), hint="name another directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise Refused(
            f"{parent} may not be written to by this user",
            path=str(parent),
            hint="name a directory that you may write to",
        )


def local_directory(store: Store) -> Path | None:
    """The directory of a run on a local disk; None for another store."""
    return None if "://" in store.url else Path(store.url)

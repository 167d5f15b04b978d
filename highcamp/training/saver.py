"""The saver: one attempt's saves. It says when one is due, copies the state, and commits it in the background."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Literal

from highcamp.errors import HighcampError, InvalidArgument, Refused, StorageError
from highcamp.run import live
from highcamp.run.attempt import OngoingAttempt, check_place
from highcamp.run.run import Run
from highcamp.training import messages
from highcamp.training.costs import Costs
from highcamp.training.progress import PROGRESS
from highcamp.training.recovery import facts, recover
from highcamp.training.resume import newest_whole
from highcamp.training.rhythm import failure_seconds
from highcamp.training.versions import versions
from highcamp.training.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from highcamp.core.tree import Flat
    from highcamp.policy.cadence import Every
    from highcamp.policy.monitor import Monitor
    from highcamp.policy.retention import Keep
    from highcamp.run.checkpoint import Checkpoint
    from highcamp.run.live import Flatten
    from highcamp.storage.store import Store
    from highcamp.training.best import BestSoFar
    from highcamp.training.costs import Saving
    from highcamp.training.memory import Memory
    from highcamp.training.messages import Voice
    from highcamp.training.progress import Progress
    from highcamp.training.slot import Slot
    from highcamp.training.snapshot import Shot
    from highcamp.training.source import Source
    from highcamp.training.writer import Pending

    Capture = Callable[[Flatten], dict[str, Flat]]
    """Gives the flattened state; its arrays may be live."""
    Where = Literal["disk", "memory"]


class Saver:
    """Saves for one attempt, one at a time.

    run: as a reader sees it. resumed_from: where the attempt began. count: of the saves so far. costs: theirs.
    """

    def __init__(
        self,
        store: Store,
        *,
        monitor: Monitor | None,
        every: Every,
        keep: Keep,
        on_error: Literal["raise", "warn"],
        voice: Voice,
        source: Source,
        memory: Memory,
    ) -> None:
        """Nothing is written yet. Raises Refused for a place that cannot be a run."""
        check_place(store)
        self.run = Run(store)
        self.resumed_from: Checkpoint | None = None
        self.count = 0
        self.costs = Costs(every, time.monotonic())
        self.is_closed = False
        self._store, self._monitor, self._every, self._keep = store, monitor, every, keep
        self._on_error, self._voice = on_error, voice
        self._attempt: OngoingAttempt | None = None
        self._source, self._memory, self._writer = source, memory, Writer()
        self._read: Slot | None = None  # by the writer, while it is busy
        self._is_sealed = threading.Event()  # the snapshot in that slot is complete, or never will be
        self._saved = (0, 0, 0)
        self._saved_at, self._counted = time.monotonic(), 0
        self._before = (self._saved, self._saved_at)
        self._prune_error: HighcampError | None = None
        self._failures: list[str] = []  # of saves, while training went on
        self._has_told_unhealthy = False

    @property
    def is_open(self) -> bool:
        """Whether the attempt has begun."""
        return self._attempt is not None

    @property
    def attempt(self) -> OngoingAttempt:
        """The attempt under way. Raises InvalidArgument after `close`."""
        if self._attempt is None or self.is_closed:
            raise InvalidArgument("this Checkpointer is closed", hint="make a new one")
        return self._attempt

    def open(self, progress: Progress, tracked: Mapping[str, object], load: Callable[[Checkpoint], object]) -> None:
        """Begin the attempt: take the run over, and `load` the newest checkpoint that is whole, and healthy if one is.

        tracked: the objects that checkpoints hold, none if the state is passed.
        """
        if self.is_closed:
            raise InvalidArgument("this Checkpointer is closed", hint="make a new one")
        for name, obj in tracked.items():
            live.capture(name, obj)  # what cannot be saved is said now, not at the end of the first epoch
        attempt = OngoingAttempt(self._store, monitor=self._monitor, keep=self._keep, every=self._every)

        def load_checked(checkpoint: Checkpoint) -> None:
            if tracked:
                attempt.check_tracked(checkpoint, [*tracked, PROGRESS])
            load(checkpoint)

        try:
            recover(attempt, self._voice)
            self.resumed_from = newest_whole(attempt, self._voice, load_checked)
            attempt.note(tracked=sorted(tracked) or None)
            attempt.start(self.resumed_from)
        except BaseException:
            attempt.release()
            raise
        self._attempt, self.run = attempt, attempt.run
        failures = failure_seconds(self.run.history.attempts, before=attempt.number)
        self.costs = Costs(self._every, time.monotonic(), failure_seconds=failures)
        self._memory.open(attempt, progress, time.monotonic())
        # Memory of the source's own is needed only where there is no shared memory: the two together are too much.
        flats = {} if self._memory.is_on else {name: live.capture(name, obj) for name, obj in tracked.items()}
        self._source.open(tracked, flats, self.resumed_from)
        self._saved, self._saved_at, self._counted = progress.key, time.monotonic(), progress.step

    def say_resumed(self, to_go: int | None) -> None:
        """Say where the run goes on. to_go: epochs that are left, None where epochs are not counted."""
        found = self.resumed_from
        if found is not None:
            self._voice.say(messages.resumed(found.name, found.epoch, found.batch, self.attempt.number, to_go))

    def rewind(self, progress: Progress, load: Callable[[Checkpoint], object]) -> Checkpoint | None:
        """Go back to the checkpoint that a restart would go on from, in the middle of an attempt; None if there is none."""
        found = newest_whole(self.attempt, self._voice, load)
        if found is not None:
            self.attempt.rewound_to(found)
            self._source.go_on_from(found)
            self._saved, self._saved_at, self._counted = progress.key, time.monotonic(), progress.step
            self._memory.rewind(progress, self._saved_at)
        return found

    def open_empty(self, progress: Progress) -> None:
        """Begin an attempt without restoring anything. Raises Refused if there is something to restore."""

        def refuse(newest: Checkpoint) -> None:
            raise Refused(
                f"{self.run.path} has checkpoints up to {newest.name}, which were not restored",
                path=self.run.path,
                hint="call restore() before saving or logging, or use another directory",
            )

        for newest in self.run.checkpoints[-1:]:
            refuse(newest)
        self.open(progress, {}, refuse)  # there may be one in shared memory

    def rest(self) -> None:
        """What has passed since the last step was no part of training."""
        self.costs.rest(time.monotonic())

    def is_due(self, progress: Progress) -> bool:
        """Whether a checkpoint is due at this place."""
        epoch, _, step = self._saved
        now = time.monotonic()
        done, self._counted = progress.step - self._counted, progress.step
        self.costs.step(now, done)
        seconds = now - self._saved_at
        steps = progress.step - step
        allowed = self.costs.is_due(steps, seconds)
        return self._every.is_due(epochs=progress.epoch - epoch, steps=steps, seconds=seconds, allowed=allowed)

    def due(self, progress: Progress) -> Where | None:
        """Where a snapshot of this place belongs: on the disk, in shared memory for the next attempt, or nowhere."""
        if self.is_due(progress):
            return "disk"
        return "memory" if self._memory.is_due(progress, time.monotonic()) else None

    def is_saved(self, progress: Progress) -> bool:
        """Whether this very place was saved, or resumed from."""
        return self._saved == progress.key

    def save(self, capture: Capture, progress: Progress, metrics: Mapping[str, float]) -> Pending:
        """Copy the state and commit it in the background; waits for the save before, and raises its error.

        capture: gives the flattened objects; their arrays may be live, for they are copied before this returns, or, if
        snapshots overlap, before a tracked optimizer steps.
        """
        saving = self.costs.began(time.monotonic())
        self.raise_failed(wait=True)
        saving.waited(time.monotonic())
        shot, slot, confirm = self._shoot(capture, progress)
        try:
            pending = self._write(shot, slot, confirm, saving, progress, metrics)
        except BaseException:
            shot.close()  # somebody may be waiting for it
            raise
        if shot.stream.is_ring:
            shot.fill()  # through memory that the writer makes free
        self._saved, self._saved_at = progress.key, time.monotonic()
        saving.returned(self._saved_at)
        self._memory.note(progress, self._saved_at)
        self.count += 1
        self._voice.say(f"saving {pending.name}: pause {1e3 * saving.pause_seconds:.1f} ms", level=2)
        dear = self.costs.warning(self._saved_at, overlaps=self._source.overlaps)
        if dear:
            self._voice.say(dear, level=0)
        return pending

    def _write(
        self,
        shot: Shot,
        slot: Slot | None,
        confirm: Callable[[], None] | None,
        saving: Saving,
        progress: Progress,
        metrics: Mapping[str, float],
    ) -> Pending:
        """Begin to write a shot in the background."""
        attempt = self.attempt
        found = facts(progress, metrics, shot) if slot is not None else {}
        tracked = sorted(part.name for part in shot.parts if part.name != PROGRESS)
        manifest = attempt.manifest(
            step=progress.step, epoch=progress.epoch, batch=progress.batch, metrics=metrics, versions=versions()
        )

        def commit(acknowledge: Callable[[Checkpoint], None]) -> None:
            begun = time.monotonic()
            try:
                try:
                    if slot is not None and not is_sealed:
                        self._memory.seal(slot, shot, found, confirm)
                finally:
                    self._is_sealed.set()
                attempt.note(tracked=tracked, pace=self.costs.news())
                checkpoint, digests = attempt.commit(manifest, shot.parts, confirm=confirm)
                self._memory.outlive(checkpoint.step)
                now = time.monotonic()
                cost = saving.committed(
                    now, new_bytes=shot.new_bytes, linked_bytes=shot.linked_bytes,
                    barrier_seconds=self._source.take_waited(), write_seconds=now - begun,
                )  # fmt: skip
            except BaseException as error:
                saving.failed(time.monotonic())
                shot.stream.abort(error)  # the loop may be waiting for room
                raise
            finally:
                shot.close()
            acknowledge(checkpoint)
            self._voice.say(messages.saved(checkpoint.name, cost), level=2)
            if checkpoint.is_healthy is False and not self._has_told_unhealthy:
                self._has_told_unhealthy = True
                self._voice.say(messages.unhealthy(checkpoint), level=0)
            self._source.learn(checkpoint, shot, digests)
            try:
                attempt.note_save(checkpoint, cost)
                for name in attempt.prune(lambda line, level: self._voice.say(line, level=level)):
                    self._voice.say(f"removed {name}", level=2)
            except HighcampError as error:
                self._prune_error = error  # the save has worked all the same

        is_sealed = slot is not None and self._memory.seal_quickly(slot, shot, found, confirm)
        self._read = slot
        self._is_sealed.clear()
        self._before = (self._saved, self._saved_at)
        return self._writer.start(f"step-{progress.step:08d}", commit)

    def keep(self, capture: Capture, progress: Progress, metrics: Mapping[str, float]) -> None:
        """Copy the state into shared memory, where the next attempt finds it if this process is killed."""
        began = time.monotonic()
        self.raise_failed()
        shot, slot, confirm = self._shoot(capture, progress)
        if slot is None:
            shot.close()  # shared memory has come to its end, which has been said
            return
        try:
            self._memory.keep(slot, shot, facts(progress, metrics, shot), confirm)
        except BaseException:
            shot.close()
            raise
        now = time.monotonic()
        self._memory.note(progress, now, now - began)

    def _shoot(self, capture: Capture, progress: Progress) -> tuple[Shot, Slot | None, Callable[[], None] | None]:
        """Copy the state. Returns the shot, the slot it lies in, and what raises Torn."""
        if self._writer.is_busy:
            self._is_sealed.wait()  # then it is certain which slot holds the newest snapshot
        error = self._memory.drain()
        if error is not None:
            self.tell(error)
        shot = self._source.shoot(
            lambda flat: {**capture(flat), PROGRESS: progress.capture()},
            block=self._block if self._memory.is_on else None,
        )
        slot = self._memory.take_slot()
        try:
            return shot, slot, self._source.expose(shot)
        except BaseException:
            shot.close()
            raise

    def _block(self, needed: int) -> memoryview | None:
        """Shared memory for a shot; without it, the source's own is used, which the writer may still be reading."""
        block = self._memory.block(needed, self._wait_for)
        if block is None:
            self.raise_failed(wait=True)
        return block

    def _wait_for(self, slot: Slot) -> None:
        """Wait until the slot has been written to the disk, if the writer reads it."""
        if slot is self._read:
            self.raise_failed(wait=True)
            self._read = None

    def raise_failed(self, *, wait: bool = False) -> None:
        """Raise the error of a save that failed in the background; without `wait` only if it has ended."""
        if not wait and self._writer.is_busy:
            return
        error = self._writer.drain()
        late, self._prune_error = self._prune_error, None
        if error is None and late is not None:
            self.tell(late)
        if error is not None:
            # Nothing was saved, so the next one is due as if it had not been.
            (epoch, _, step), (self._saved, self._saved_at) = self._saved, self._before
            self.tell(error)
            self._failures.append(str(error))
            self.attempt.note_failure(step, epoch, str(error))

    def hold(self, error: BaseException) -> None:
        """Keep an error that cannot be raised where it happens; the next call, or the end of the program, tells it."""
        self._writer.hold(error)

    def tell(self, error: BaseException) -> None:
        """Raise an error of saving or logging, or say it, as `on_error` has it."""
        if self._on_error == "warn" and isinstance(error, HighcampError):
            self._voice.say(f"a save failed and training goes on without it: {error}", level=0)
            return
        raise error

    def close(self, how: str, progress: Progress) -> bool:
        """Wait for the save under way, prune, end the attempt; raises a failed save's error.

        how: see `history.Attempt.ended`. Returns whether there was an attempt to end.
        """
        if self.is_closed or self._attempt is None or not self._writer.is_of_this_process:
            self.is_closed = True
            return False
        attempt = self._attempt
        try:
            self.raise_failed(wait=True)
            if (error := self._memory.drain()) is not None:
                self.tell(error)
            self.costs.settle()
            if self.count:
                try:
                    attempt.note(pace=self.costs.news())
                    # A metric may have been logged after the last commit.
                    attempt.prune(lambda line, level: self._voice.say(line, level=level))
                except HighcampError as error:
                    self.tell(error)
        except BaseException:
            how = "error"
            raise
        finally:
            self.is_closed = True
            # After Ctrl-C in the wait a save is still being written: the run stays ours until the process ends.
            if not self._writer.is_busy:
                self._source.close()
                self._memory.close(keep=how not in ("complete", "closed"))
                try:
                    attempt.end(how, progress.step, progress.epoch)
                except StorageError as error:
                    self.tell(error)
        return True

    def summarize(self, seen: BestSoFar | None, *, has_logged: bool) -> None:
        """Say which checkpoint is the best, what saving has cost, and what somebody would look for in vain."""
        if self._failures:
            self._voice.say(messages.failed_saves(len(self._failures), self._failures[-1]), level=0)
        if not self.count:
            if has_logged and self.resumed_from is None:
                self._voice.say(messages.nothing_saved(self.run.path), level=0)
            return
        try:
            best = self.run.best
        except StorageError as error:  # gone with the last save: what is known of it has been told
            self.tell(error)
            return
        fact = None
        if best is not None and self._monitor is not None:
            place = f"epoch {best.epoch}" if best.epoch else f"step {best.step}"
            fact = (place, best.metrics[self._monitor.metric], self._monitor.metric, best.path)
        share = self.costs.share(time.monotonic())
        if self._memory.count:
            self._voice.say(
                messages.kept_in_memory(self._memory.count, self._memory.pause_seconds / self._memory.count)
            )
        self._voice.say(
            messages.summary(
                fact, self.costs.count, share, self.run.path,
                pause_seconds=self.costs.pause_seconds / max(self.costs.count, 1),
                bytes_per_second=self.costs.new_bytes / self.costs.write_seconds if self.costs.write_seconds else None,
            )
        )  # fmt: skip
        line = seen.not_saved(fact[1] if fact else None) if seen is not None else ""
        if line:
            self._voice.say(line, level=0)

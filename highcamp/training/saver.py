"""The saver: one attempt's saves. It says when one is due, copies the state, and commits it in the background."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

from highcamp.errors import HighcampError, InvalidArgument, Refused, StorageError
from highcamp.run import live
from highcamp.run.attempt import OngoingAttempt, check_place
from highcamp.run.run import Run
from highcamp.training import messages
from highcamp.training.progress import PROGRESS
from highcamp.training.resume import newest_whole
from highcamp.training.snapshot import Snapshot
from highcamp.training.versions import versions
from highcamp.training.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from highcamp.core.tree import Flat
    from highcamp.policy.cadence import Every
    from highcamp.policy.monitor import Monitor
    from highcamp.policy.retention import Keep
    from highcamp.run.checkpoint import Checkpoint
    from highcamp.storage.store import Store
    from highcamp.training.best import BestSoFar
    from highcamp.training.messages import Voice
    from highcamp.training.progress import Progress
    from highcamp.training.writer import Pending


class Saver:
    """Saves for one attempt, one at a time.

    run: as a reader sees it. resumed_from: where the attempt began. count, pause_seconds: of the saves so far.
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
    ) -> None:
        """Nothing is written yet. Raises Refused for a place that cannot be a run."""
        check_place(store)
        self.run = Run(store)
        self.resumed_from: Checkpoint | None = None
        self.count, self.pause_seconds = 0, 0.0
        self.is_closed = False
        self._store, self._monitor, self._every, self._keep = store, monitor, every, keep
        self._on_error, self._voice = on_error, voice
        self._attempt: OngoingAttempt | None = None
        self._snapshot, self._writer = Snapshot(), Writer()
        self._saved = (0, 0, 0)
        self._saved_at = self._began_at = time.monotonic()
        self._before = (self._saved, self._saved_at)
        self._prune_error: HighcampError | None = None

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
        """Begin the attempt: take the run over, and `load` the newest checkpoint that is not damaged.

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
            self.resumed_from = newest_whole(attempt, self._voice, load_checked)
            attempt.note(tracked=sorted(tracked) or None)
            attempt.start(self.resumed_from)
        except BaseException:
            attempt.release()
            raise
        self._attempt, self.run = attempt, attempt.run
        self._snapshot.prepare({name: live.capture(name, obj) for name, obj in tracked.items()})
        self._saved, self._saved_at = progress.key, time.monotonic()

    def rewind(self, progress: Progress, load: Callable[[Checkpoint], object]) -> Checkpoint | None:
        """Go back to the newest whole checkpoint in the middle of an attempt; None if there is none."""
        found = newest_whole(self.attempt, self._voice, load)
        if found is not None:
            self.attempt.rewound_to(found)
            self._saved, self._saved_at = progress.key, time.monotonic()
        return found

    def open_empty(self, progress: Progress) -> None:
        """Begin an attempt without restoring anything. Raises Refused if there is something to restore."""
        checkpoints = self.run.checkpoints
        if checkpoints:
            raise Refused(
                f"{self.run.path} has checkpoints up to {checkpoints[-1].name}, which were not restored",
                path=self.run.path,
                hint="call restore() before saving or logging, or use another directory",
            )
        self.open(progress, {}, lambda _: None)

    def is_due(self, progress: Progress) -> bool:
        """Whether a checkpoint is due at this place."""
        epoch, _, step = self._saved
        seconds = time.monotonic() - self._saved_at
        return self._every.is_due(epochs=progress.epoch - epoch, steps=progress.step - step, seconds=seconds)

    def is_saved(self, progress: Progress) -> bool:
        """Whether this very place was saved, or resumed from."""
        return self._saved == progress.key

    def save(self, capture: Callable[[], dict[str, Flat]], progress: Progress, metrics: Mapping[str, float]) -> Pending:
        """Copy the state and commit it in the background; waits for the save before, and raises its error.

        capture: gives the flattened objects; their arrays may be live, for they are copied before this returns.
        """
        began = time.monotonic()
        self.raise_failed(wait=True)
        attempt = self.attempt
        flats = capture()
        parts = self._snapshot.take({**flats, PROGRESS: progress.capture()})
        tracked = sorted(flats)
        manifest = attempt.manifest(
            step=progress.step, epoch=progress.epoch, batch=progress.batch, metrics=metrics, versions=versions()
        )

        def commit() -> Checkpoint:
            attempt.note(tracked=tracked)
            checkpoint = attempt.commit(manifest, parts)
            try:
                for name in attempt.prune():
                    self._voice.say(f"removed {name}", level=2)
            except HighcampError as error:
                self._prune_error = error  # the save has worked all the same
            return checkpoint

        self._before = (self._saved, self._saved_at)
        pending = self._writer.start(f"step-{progress.step:08d}", commit)
        self._saved, self._saved_at = progress.key, time.monotonic()
        pause = self._saved_at - began
        self.count += 1
        self.pause_seconds += pause
        self._voice.say(f"saving {pending.name}: pause {1e3 * pause:.1f} ms", level=2)
        return pending

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
            self._saved, self._saved_at = self._before
            self.tell(error)

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
            if self.count:
                try:
                    attempt.prune()  # a metric may have been logged after the last commit
                except HighcampError as error:
                    self.tell(error)
        except BaseException:
            how = "error"
            raise
        finally:
            self.is_closed = True
            # After Ctrl-C in the wait a save is still being written: the run stays ours until the process ends.
            if not self._writer.is_busy:
                self._snapshot = Snapshot()  # gives its memory back
                try:
                    attempt.end(how, progress.step, progress.epoch)
                except StorageError as error:
                    self.tell(error)
        return True

    def summarize(self, seen: BestSoFar | None, *, has_logged: bool) -> None:
        """Say which checkpoint is the best, what saving has cost, and what somebody would look for in vain."""
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
        share = self.pause_seconds / max(time.monotonic() - self._began_at, 1e-9)
        self._voice.say(messages.summary(fact, self.count, share, self.run.path))
        line = seen.not_saved(fact[1] if fact else None) if seen is not None else ""
        if line:
            self._voice.say(line, level=0)

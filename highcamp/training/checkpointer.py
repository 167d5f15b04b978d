"""Checkpointer: due? -> snapshot -> commit in the background -> prune."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from highcamp.core.names import check_name
from highcamp.errors import HighcampError, InvalidArgument, Refused
from highcamp.policy.cadence import Every
from highcamp.policy.monitor import Monitor
from highcamp.policy.retention import Keep
from highcamp.run import live
from highcamp.run.attempt import OngoingAttempt, check_place
from highcamp.run.run import Run
from highcamp.storage.store import open_store
from highcamp.training import batches as batching
from highcamp.training import messages
from highcamp.training.arguments import refuse_unknown, to_metrics
from highcamp.training.best import BestSoFar
from highcamp.training.progress import PROGRESS, Progress
from highcamp.training.resume import newest_whole
from highcamp.training.snapshot import Snapshot
from highcamp.training.versions import versions
from highcamp.training.writer import Pending, Writer

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from types import TracebackType

    from highcamp.core.tree import Flat
    from highcamp.run.checkpoint import Checkpoint

T = TypeVar("T")


class Checkpointer:
    """Keeps the best model and loses nothing: saves the training state when it is due, and goes on where it was.

    With tracked objects and `epochs` / `batches` it owns the loop's counters; with `save` / `restore` the state is passed.
    The state is copied inside the call that saves, and written by a thread while training goes on, one save at a time. An
    error of that thread is raised by the next call and by `close`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        monitor: Monitor | str | None = None,
        every: Every = Every(epochs=1),  # noqa: B008  (frozen)
        keep: Keep = Keep(),  # noqa: B008  (frozen)
        on_error: Literal["raise", "warn"] = "raise",
        verbose: int = 1,
        **unknown: object,
    ) -> None:
        """Nothing is written or restored yet.

        directory: the run; made when training begins. monitor: the metric that ranks checkpoints; a name of the usual kind
        is enough ("val_loss"), any other needs `Monitor(name, mode=…)`. every: when a checkpoint is due. keep: which stay.
        on_error: what a failed save does: "raise" at the next call, or "warn" and go on training. verbose: 0 warnings,
        1 a line per epoch, 2 details. Raises InvalidArgument, and Refused for a directory that is a file.
        """
        known = ("directory", "monitor", "every", "keep", "on_error", "verbose")
        refuse_unknown("Checkpointer", unknown, known)
        for value, kind, name in ((every, Every, "every"), (keep, Keep, "keep")):
            if not isinstance(value, kind):
                raise InvalidArgument(
                    f"{name} is {value!r}, not {kind.__name__}(…)",
                    hint=f"for example {kind()!r}" if kind is Keep else "for example Every(epochs=1)",
                )
        if on_error not in ("raise", "warn"):
            raise InvalidArgument(f"on_error is {on_error!r}", hint="use 'raise' or 'warn'")
        self._store = open_store(directory)
        check_place(self._store)
        self._monitor = Monitor.of(monitor)
        self._every, self._keep, self._on_error = every, keep, on_error
        self.voice = messages.Voice(verbose)
        self.run = Run(self._store)
        self._tracked: dict[str, object] = {}
        self._progress = Progress()
        self._snapshot, self._writer = Snapshot(), Writer()
        self._best = BestSoFar(self._monitor) if self._monitor else None
        self._attempt: OngoingAttempt | None = None
        self._resumed_from: Checkpoint | None = None
        self._is_closed = False
        self._is_finished = False
        self._saved = (0, 0, 0)  # (epoch, batch, step) of the last save
        self._saved_at = self._began_at = time.monotonic()
        self._save_count, self._pause_seconds = 0, 0.0
        self._metrics: tuple[int, dict[str, float]] = (-1, {})  # those of one step, and that step

    # What is known

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self._progress.epoch

    @property
    def step(self) -> int:
        """Optimizer steps done; without `batches`, an epoch counts as one."""
        return self._progress.step

    @property
    def best(self) -> Checkpoint | None:
        """The best checkpoint that is committed now."""
        return self.run.best

    @property
    def epochs_since_best(self) -> int:
        """Epochs done since the best value of the monitored metric, restarts included; NaN is no improvement.

        For early stopping: `if checkpointer.epochs_since_best >= 5: break`, first thing in the loop. Raises InvalidArgument
        without a monitor.
        """
        if self._best is None:
            raise InvalidArgument("epochs_since_best needs a monitored metric", hint='pass monitor="val_loss"')
        self.start()
        done = self.epoch + (1 if self._progress.at_boundary else 0)
        return max(0, done - (self._best.epoch or 0))

    # A loop of your own

    def track(self, **objects: object) -> None:
        """Name the objects whose state makes up a checkpoint: `track(model=model, optimizer=optimizer)`.

        Models, optimizers, schedulers, scalers, loaders, random generators, anything with `state_dict` and
        `load_state_dict`, and dicts or lists of NumPy arrays. Each becomes one file. Global random states are always saved.
        Raises InvalidArgument for a name, InvalidState for an object that has no state.
        """
        if self._attempt is not None:
            raise InvalidArgument(
                "track() came after the run was restored", hint="track everything before epochs() or restore()"
            )
        for name, obj in objects.items():
            check_name(name, "tracked object")
            if name.lower() in {PROGRESS, *(other.lower() for other in self._tracked)}:
                raise InvalidArgument(
                    f"an object named {name!r} is tracked already, or the name is highcamp's own",
                    hint="choose another name",
                )
            live.check_trackable(name, obj)
            self._tracked[name] = obj

    def epochs(self, count: int) -> Iterator[int]:
        """Yield the epochs that are still to do, counted from 0, until `count` are done; the first call restores.

        After each epoch a checkpoint is saved if one is due, and after the last one always. A run that is complete yields
        nothing; a larger `count` goes on. Raises Mismatch or Refused if what was saved does not fit what is tracked,
        Damaged if checkpoints are there but none is whole.
        """
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InvalidArgument(f"epochs({count!r}): not a positive number of epochs", hint="for example epochs(50)")
        if not self._tracked:
            raise InvalidArgument(
                "epochs() has nothing to restore or save", hint="call track(model=…, optimizer=…) first"
            )
        return self._epochs(count)

    def _epochs(self, count: int) -> Iterator[int]:
        self.start(epochs_planned=count)
        if self.epoch >= count:
            self.voice.say(messages.complete(self.epoch, count))
        while self.epoch < count:
            self.begin_epoch()
            try:
                yield self.epoch
            except GeneratorExit:  # `break`: an epoch whose metrics are logged is a whole one
                if self._progress.is_logged and not self._is_closed and not sys.is_finalizing():
                    self.end_epoch()
                    self.finish()
                    self._is_finished = False
                raise
            self.end_epoch()
        self.finish()

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """Yield the batches of the epoch under way that are still to do, and count each as a step when it is done.

        A checkpoint may be saved between two batches. After a restart in the middle of an epoch the order is the same and
        the first batches are skipped: at once for torch's loaders and for sequences, by reading them for anything else.
        Call it inside `epochs`, for the training data only.
        """
        if not self._progress.in_epoch:
            raise InvalidArgument(
                "batches() was called outside epochs()",
                hint="for epoch in checkpointer.epochs(n): for batch in checkpointer.batches(loader): …",
            )
        return self._batches(loader)

    def _batches(self, loader: Iterable[T]) -> Iterator[T]:
        progress = self._progress
        where = self._resumed_from.path if self._resumed_from else self.run.path
        iterator, progress.place = progress.iterate(loader, where)
        length = batching.length(loader)
        for batch in iterator:
            progress.is_iterating = True
            yield batch
            progress.batch += 1
            self.end_step(is_last=progress.batch == length)
        progress.is_iterating = False

    def log(
        self,
        metrics: Mapping[str, Any] | None = None,
        /,
        *,
        step: int | None = None,
        epoch: int | None = None,
        **named: Any,
    ) -> None:
        """Log metrics: `log(train_loss=0.1, val_loss=0.3)`, numbers or arrays of one number; NaN is recorded, never ranked.

        step, epoch: where they were measured; now, by default. A metric counts only for checkpoints of its own step, which
        may have been saved before. Raises InvalidMetric.
        """
        values = to_metrics({**(metrics or {}), **named})
        attempt = self._writing()
        self._raise_failed()
        now = self._progress.boundary_step
        step = now if step is None else step
        epoch = self._progress.boundary_epoch if epoch is None else epoch
        attempt.log(step, epoch, values)
        if step == now:
            before = self._metrics[1] if self._metrics[0] == step else {}
            self._metrics = (step, {**before, **values})
            self._progress.is_logged = self._progress.at_boundary

    # The steps of a loop, for framework modules

    def start(self, *, epochs_planned: int | None = None) -> Checkpoint | None:
        """Take the run over and restore what is tracked from its newest whole checkpoint; None on a fresh start.

        Calling it again returns the same. Raises RunLocked, Mismatch, Refused, Damaged.
        """
        if self._attempt is None:
            self._open(lambda checkpoint: self._progress.restore(checkpoint, self._tracked), sorted(self._tracked))
            planned = None if epochs_planned is None else max(0, epochs_planned - self.epoch)
            if self._resumed_from is not None and planned != 0:
                found = self._resumed_from
                self.voice.say(messages.resumed(found.name, found.epoch, found.batch, self._writing().number, planned))
        if epochs_planned is not None:
            self._writing().note(epochs_planned=epochs_planned)
        return self._resumed_from

    def begin_epoch(self) -> None:
        """An epoch begins."""
        self._raise_failed()
        self._progress.begin_epoch()

    def end_step(self, count: int = 1, *, is_last: bool = False) -> None:
        """`count` steps are done; saves if due, unless it is the last step of the epoch, whose end saves anyway."""
        self._progress.step += count
        if not is_last and self._is_due():
            self._save_tracked()

    def end_epoch(self) -> None:
        """An epoch is done and its metrics are logged; saves if due."""
        metrics = self._metrics[1] if self._metrics[0] == self._progress.boundary_step else {}
        self._progress.end_epoch(self.run.path)
        is_due = self._is_due()
        if self._best is not None:
            name = f"step-{self.step:08d}" if is_due else None
            line, is_warning = self._best.see(self.epoch, metrics, name)
            if line:
                self.voice.say(line, level=0 if is_warning else 1)
        if is_due:
            self._save_tracked()

    def finish(self) -> None:
        """Training is done: saves the last state if it is not saved, and waits until it is durable."""
        if self._saved != self._progress.key:
            self._save_tracked()
        self._raise_failed(wait=True)
        self._is_finished = True

    # State that is passed

    def save(
        self,
        state: object = None,
        *,
        step: int | None = None,
        epoch: int | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> Pending:
        """Save now: `state`, or what is tracked. Returns when the state may change again; `wait()` until it is durable.

        state: any tree of arrays and plain values. A dict of parts, such as {"params": …, "optimizer": …}, becomes one
        object for each part; anything else is one object named "state". step, epoch: what has been done; counted on from
        the last save by default. Waits for the save before, and raises its error. Raises InvalidState, InvalidMetric,
        Refused if the run has checkpoints that were not restored.
        """
        values = to_metrics(metrics or {})
        attempt = self._writing()
        self._progress.move(step, epoch)
        if values:
            self.log(values)
        if state is None:
            return self._save_tracked()
        began = time.monotonic()
        flats = live.capture_state(state)
        attempt.note(tracked=sorted(flats))
        return self._save(flats, began)

    def save_if_due(
        self, state: object = None, *, step: int, epoch: int | None = None, metrics: Mapping[str, Any] | None = None
    ) -> Pending | None:
        """Save as `save` does if a checkpoint is due at this step, otherwise log the metrics and return None."""
        if (
            self._every.epochs is not None
            and self._every.steps is None
            and self._every.seconds is None
            and epoch is None
        ):
            raise InvalidArgument(
                f"{self._every} cannot be told from steps", hint="pass epoch=, or every=Every(steps=…)"
            )
        self._writing()
        self._progress.move(step, epoch)
        if self._is_due():
            return self.save(state, metrics=metrics)
        if metrics:
            self.log(metrics)
        return None

    def restore(self, reference: str | None = None, *, like: object = None) -> Any:
        """Go back to a checkpoint.

        Without a reference: the newest whole one, with counters and random states; None on a fresh start. With one, such as
        "best": its objects only; the loop's counters stay, so the best weights can be had at the end of training.
        like: a tree of the structure wanted back; then the restored tree is returned and nothing is changed. Otherwise the
        tracked objects are overwritten and the Checkpoint is returned. Raises CheckpointNotFound, Mismatch listing every
        difference (nothing is changed), Damaged.
        """
        self._raise_failed(wait=True)
        if reference is not None:
            return self._restore_reference(reference, like)
        if like is None:
            if not self._tracked:
                raise InvalidArgument(
                    "restore() has nothing to restore", hint="track(model=…) first, or pass like=state"
                )
            return self.start()
        restored: list[Any] = []
        if self._attempt is None:
            self._open(lambda checkpoint: restored.append(self._progress.restore_like(checkpoint, like)), None)
            found = self._resumed_from
            if found is not None:
                self.voice.say(messages.resumed(found.name, found.epoch, found.batch, self._writing().number, None))
        else:
            newest_whole(
                self._attempt,
                self.voice,
                lambda checkpoint: restored.append(self._progress.restore_like(checkpoint, like)),
            )
        return restored[-1] if restored else None

    def _restore_reference(self, reference: str, like: object) -> Any:
        checkpoint = self.run.checkpoint(reference)
        if like is not None:
            objects = [name for name in checkpoint.objects if name != PROGRESS]
            return live.fill_state(like, checkpoint.saved, objects, where=checkpoint.path)
        if not self._tracked:
            raise InvalidArgument(
                "restore() has nothing to restore into", hint="track(model=…) first, or pass like=state"
            )
        checkpoint.restore(**{name: obj for name, obj in self._tracked.items() if name in checkpoint.objects})
        return checkpoint

    # Ending

    def close(self) -> None:
        """Wait for the save under way, prune, and give the run back; raises a failed save's error. Twice is once."""
        self._close("complete" if self._is_finished else "closed")

    def _close(self, how: str) -> None:
        if self._is_closed or self._attempt is None:
            self._is_closed = True
            return
        self._is_closed = True
        error = self._writer.drain()
        try:
            if error is None and self._save_count:
                self._attempt.prune()
        finally:
            self._attempt.end("error" if error else how, self.step, self.epoch)
        if error is not None:
            raise error
        self._summarize()

    def __enter__(self) -> Self:
        """Use it in a `with` block, so that it is closed however the block ends."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; after an exception of the block, an error of the last save is said rather than put in its place."""
        if error is None:
            self.close()
            return
        try:
            self._close("interrupted" if isinstance(error, KeyboardInterrupt) else "error")
        except HighcampError as failed:
            self.voice.say(f"not saved: {failed}", level=0)

    def _summarize(self) -> None:
        if not self._save_count:
            return
        best, metric = self.run.best, self._monitor.metric if self._monitor else ""
        fact = (metric, best.epoch, best.metrics[metric], best.path) if best else None
        share = self._pause_seconds / max(time.monotonic() - self._began_at, 1e-9)
        self.voice.say(messages.summary(fact, self._save_count, share, self.run.path))

    # Inside

    def _open(self, load: Callable[[Checkpoint], object], tracked: list[str] | None) -> None:
        """Take the run over; `load` restores from the newest checkpoint that it does not find damaged."""
        if self._is_closed:
            raise InvalidArgument("this Checkpointer is closed", hint="make a new one")
        for name, obj in self._tracked.items():
            live.capture(name, obj)  # what cannot be saved is said now, not at the end of the first epoch
        attempt = OngoingAttempt(self._store, monitor=self._monitor, keep=self._keep, every=self._every)
        try:

            def load_checked(checkpoint: Checkpoint) -> None:
                if tracked is not None:
                    attempt.check_tracked(checkpoint, [*tracked, PROGRESS])
                load(checkpoint)

            self._resumed_from = newest_whole(attempt, self.voice, load_checked)
            attempt.note(tracked=tracked)
            attempt.start(self._resumed_from)
        except BaseException:
            attempt.release()
            raise
        self._attempt = attempt
        self.run = attempt.run
        if self._best is not None:
            self._best.replay(self.run.history)
        self._saved = self._progress.key
        self._saved_at = time.monotonic()

    def _writing(self) -> OngoingAttempt:
        """The attempt under way; one that was never restored may begin only in an empty run."""
        if self._attempt is None:
            last = self.run.last
            if last is not None:
                raise Refused(
                    f"{self.run.path} has checkpoints up to {last.name}, which were not restored",
                    path=self.run.path,
                    hint="call restore() before saving or logging, or use another directory",
                )
            self._open(lambda _: None, None)
        if self._attempt is None or self._is_closed:
            raise InvalidArgument("this Checkpointer is closed", hint="make a new one")
        return self._attempt

    def _is_due(self) -> bool:
        epoch, _, step = self._saved
        seconds = time.monotonic() - self._saved_at
        return self._every.is_due(epochs=self.epoch - epoch, steps=self.step - step, seconds=seconds)

    def _save_tracked(self) -> Pending:
        if not self._tracked:
            raise InvalidArgument(
                "save() was given no state and nothing is tracked", hint="save(state, step=…), or track(model=…)"
            )
        self._writing()
        began = time.monotonic()
        return self._save({name: live.capture(name, obj) for name, obj in self._tracked.items()}, began)

    def _save(self, flats: dict[str, Flat], began: float) -> Pending:
        self._raise_failed(wait=True)
        attempt = self._writing()
        parts = self._snapshot.take({**flats, PROGRESS: self._progress.capture()})
        metrics = self._metrics[1] if self._metrics[0] == self.step else {}
        manifest = attempt.manifest(
            step=self.step, epoch=self.epoch, batch=self._progress.batch, metrics=metrics, versions=versions()
        )

        def commit() -> Checkpoint:
            checkpoint = attempt.commit(manifest, parts)
            for name in attempt.prune():
                self.voice.say(f"removed {name}", level=2)
            return checkpoint

        pending = self._writer.start(f"step-{self.step:08d}", commit)
        self._saved, self._saved_at = self._progress.key, time.monotonic()
        self._save_count += 1
        self._pause_seconds += self._saved_at - began
        self.voice.say(f"saving {pending.name}: pause {1e3 * (self._saved_at - began):.1f} ms", level=2)
        return pending

    def _raise_failed(self, *, wait: bool = False) -> None:
        """Raise the error of a save that failed in the background; without `wait` only if it has ended."""
        if not wait and self._writer.is_busy:
            return
        error = self._writer.drain()
        if error is None:
            return
        if self._on_error == "warn" and isinstance(error, HighcampError):
            self.voice.say(f"a save failed and training goes on without it: {error}", level=0)
            return
        raise error

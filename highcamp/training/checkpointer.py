"""Checkpointer: due? -> snapshot -> commit in the background -> prune."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from highcamp.errors import HighcampError, InvalidArgument, InvalidMetric, StorageError
from highcamp.policy.cadence import Every
from highcamp.policy.monitor import Monitor
from highcamp.policy.retention import Keep
from highcamp.run import live, passed
from highcamp.storage.store import open_store
from highcamp.training import batches as batching
from highcamp.training import messages
from highcamp.training.arguments import CHECKPOINTER, check_checkpointer, refuse_unknown, to_metrics
from highcamp.training.best import BestSoFar
from highcamp.training.measured import Measured
from highcamp.training.memory import Memory
from highcamp.training.progress import PROGRESS, Progress
from highcamp.training.saver import Saver
from highcamp.training.source import Source
from highcamp.training.stopping import Stopping
from highcamp.training.tracked import Tracked

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

    from highcamp.run.attempt import OngoingAttempt
    from highcamp.run.checkpoint import Checkpoint
    from highcamp.run.run import Run
    from highcamp.storage.store import Store
    from highcamp.training.saver import Capture, Where
    from highcamp.training.writer import Pending

T = TypeVar("T")


class Checkpointer:
    """Keeps the best model and loses nothing: saves the training state when it is due, and goes on where it was.

    With tracked objects and `epochs` / `batches` it owns the loop's counters; with `save` / `restore` the state is passed.
    The state is copied inside the call that saves, and written by a thread while training goes on, one save at a time. An
    error of that thread is raised by the next call and by `close`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | Store,
        *,
        monitor: Monitor | str | None = None,
        every: Every = Every(epochs=1),  # noqa: B008  (frozen)
        keep: Keep = Keep(),  # noqa: B008  (frozen)
        snapshot: Literal["copy", "overlap"] = "copy",
        memory_every: Every | None = None,
        staging_bytes: int | None = None,
        on_error: Literal["raise", "warn"] = "raise",
        verbose: int = 1,
        **unknown: object,
    ) -> None:
        """Nothing is written or restored yet.

        directory: the run; made when training begins. monitor: the metric that ranks checkpoints; a name of the usual kind
        is enough ("val_loss"), any other needs `Monitor(name, mode=…)`. every: when a checkpoint is due. keep: which stay.
        snapshot: "copy" takes the state within the call that saves; "overlap" during the next forward and backward, for loops
        in which only tracked torch optimizers change weights; JAX's arrays are held, not copied. memory_every: when it is
        also copied to shared memory, for the next attempt if this process is killed. staging_bytes: the most memory for the
        copy. on_error: what a failed save does: "raise" at the next call, or "warn" and go on training. verbose: 0 warnings,
        1 a line per epoch, 2 details. Raises InvalidArgument, and Refused for a directory that is a file.
        """
        refuse_unknown("Checkpointer", unknown, ("directory", *CHECKPOINTER))
        check_checkpointer(
            every=every, keep=keep, snapshot=snapshot, memory_every=memory_every, staging_bytes=staging_bytes, on_error=on_error
        )  # fmt: skip
        self._monitor = Monitor.of(monitor)
        self.voice = messages.Voice(verbose)
        store = open_store(directory)
        tell = partial(self.voice.say, level=0)
        source = Source(store, overlaps=snapshot == "overlap", staging_bytes=staging_bytes, tell=tell)
        self._saver = Saver(
            store, monitor=self._monitor, every=every, keep=keep, on_error=on_error, voice=self.voice, source=source,
            memory=Memory(memory_every, self.voice),
        )  # fmt: skip
        self._every = every
        self._tracked = Tracked()
        self.progress = Progress()
        self._stopping = Stopping(self._saver, self.progress, self.voice)
        self.preemption = self._stopping.preemption
        self._best = BestSoFar(self._monitor) if self._monitor else None
        self._is_finished = False
        self._measured = Measured(self.progress)

    # What is known

    @property
    def run(self) -> Run:
        """The run, as a reader sees it."""
        return self._saver.run

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.progress.epoch

    @property
    def step(self) -> int:
        """Optimizer steps done; without `batches`, an epoch counts as one."""
        return self.progress.step

    @property
    def best(self) -> Checkpoint | None:
        """The best checkpoint that is committed now."""
        return self.run.best

    @property
    def epochs_since_best(self) -> int:
        """Epochs done since the best value of the monitored metric, restarts included; NaN is no improvement.

        For early stopping: `if checkpointer.epochs_since_best >= 5: break`, first thing in the loop or after `log`. Raises
        InvalidArgument without a monitor.
        """
        if self._best is None:
            raise InvalidArgument("epochs_since_best needs a monitored metric", hint='pass monitor="val_loss"')
        self.start()
        return self._best.epochs_since(self.progress, self._measured.at(self.progress.boundary_step))

    # A loop of your own

    def track(self, **objects: object) -> None:
        """Name the objects whose state makes up a checkpoint: `track(model=model, optimizer=optimizer)`.

        Models, optimizers, schedulers, scalers, loaders, random generators, anything with `state_dict` and
        `load_state_dict`, modules of Flax NNX, and dicts or lists of arrays. Each becomes one file. Global random states are
        always saved. Raises InvalidArgument for a name, InvalidState for an object that has no state.
        """
        if self._saver.is_open:
            raise InvalidArgument(
                "track() came after the run was restored", hint="track everything before epochs() or restore()"
            )
        self._tracked.add(objects)

    def epochs(self, count: int) -> Iterator[int]:
        """Yield the epochs that are still to do, counted from 0, until `count` are done; the first call restores.

        After each epoch a checkpoint is saved if one is due, and after the last one always. A run that is complete yields
        nothing; a larger `count` goes on. Raises Mismatch or Refused if what was saved does not fit what is tracked,
        Damaged if checkpoints are there but none is whole.
        """
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InvalidArgument(f"epochs({count!r}): not a positive number of epochs", hint="for example epochs(50)")
        self._tracked.require("epochs()")
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
                if not sys.is_finalizing():
                    try:
                        self._settle()
                    except BaseException as error:  # noqa: BLE001  (Python prints what is raised here, and goes on)
                        self._saver.hold(error)
                    self._stopping.leave()  # training is over, and nobody looks whether to stop
                raise
            if self.progress.in_epoch:  # `restore` may have ended it
                self.end_epoch()
        self.finish()

    def _settle(self) -> None:
        """End and save an epoch that is done but has not ended: the loop was left by `break`, or goes back from here."""
        if self._saver.is_open and not self._saver.is_closed and self.progress.is_logged and self.progress.at_boundary:
            self.end_epoch()
            if not self._saver.is_saved(self.progress):
                self._save_tracked()
            self._saver.raise_failed(wait=True)

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """Yield the batches of the epoch under way that are still to do, and count each as a step when it is done.

        A checkpoint may be saved between two batches. After a restart in the middle of an epoch the order is the same and
        the first batches are skipped: at once for torch's loaders and for sequences, by reading them for anything else.
        Call it inside `epochs`, for the training data only.
        """
        if not self.progress.in_epoch:
            raise InvalidArgument(
                "batches() was called outside epochs()",
                hint="for epoch in checkpointer.epochs(n): for batch in checkpointer.batches(loader): …",
            )
        where = self._saver.resumed_from.path if self._saver.resumed_from else self.run.path
        return batching.count(loader, self.progress, self.end_step, self.stop_if_asked, self.voice.say, where=where)

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

        step, epoch: where they were measured; now, by default, and within `batches` that is the step under way. A metric
        counts only for checkpoints of its own step, which may have been saved before. Raises InvalidMetric.
        """
        if metrics is not None and not isinstance(metrics, Mapping):
            raise InvalidMetric(f"log({metrics!r:.40}): a value without a name", hint="log(val_loss=0.3)")
        values = to_metrics({**(metrics or {}), **named})
        attempt = self._attempt()
        step, epoch, batch = self._measured.place(step, epoch)
        try:
            attempt.log(step, epoch, values, batch=batch)
        except StorageError as error:  # the row is kept, and written with the next one
            self._saver.tell(error)
        is_alone = self._measured.add(step, values) and not self.progress.in_epoch
        if is_alone and self._best is not None and self._best.monitor.metric in values:
            self._best.see(epoch, values, None)  # with state that is passed, nothing else tells an epoch's end
        self._saver.raise_failed()

    # The steps of a loop, for framework modules

    def start(self, *, epochs_planned: int | None = None) -> Checkpoint | None:
        """Take the run over and restore what is tracked from its newest whole checkpoint; None on a fresh start.

        One whose weights are NaN or infinite is passed over for an older, healthy one, and that is said. Calling it again
        returns the same. Raises RunLocked, Mismatch, Refused, Damaged.
        """
        if not self._saver.is_open:
            self._open(self._tracked, lambda checkpoint: self.progress.restore(checkpoint, self._tracked))
            planned = None if epochs_planned is None else max(0, epochs_planned - self.epoch)
            if planned != 0:
                self._saver.say_resumed(planned)
        if epochs_planned is not None:
            self._attempt().note(epochs_planned=epochs_planned)
        return self._saver.resumed_from

    def begin_epoch(self) -> None:
        """An epoch begins."""
        self._saver.raise_failed()
        self._saver.rest()
        self._stopping.listen()
        self.stop_if_asked()
        self.progress.begin_epoch()

    def end_step(self, count: int = 1, *, is_last: bool = False) -> None:
        """`count` steps are done; saves if due, and stops if asked to, but not after the last step of an epoch.

        The end of the epoch does both; resumed before it, many a loop would fail for having no batch left to measure.
        """
        self.progress.step += count
        due = None if is_last else self._saver.due(self.progress)
        if due is not None:
            self._save_due(due)
        if not is_last:
            self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """Between two steps: if this process was asked to stop, save once, wait until it is durable, and end.

        Everything else that counts steps calls it; framework modules do at the batches of an evaluation as well. Raises
        SystemExit with the conventional code, or what an earlier handler of the signal raised, such as KeyboardInterrupt.
        """
        if self._stopping.is_asked:
            self._stopping.stop(self._save_tracked if self._tracked else None)

    def end_epoch(self) -> None:
        """An epoch is done and its metrics are logged; saves if due."""
        metrics = self._measured.at(self.progress.boundary_step)
        self.progress.end_epoch(self.run.path)
        self._measured.end_epoch()
        due = self._saver.due(self.progress)
        if self._best is not None:
            name = f"step-{self.step:08d}" if due == "disk" else None
            line, is_warning = self._best.see(self.epoch, metrics, name)
            if line:
                self.voice.say(line, level=0 if is_warning else 1)
        if due is not None:
            self._save_due(due)
        self.stop_if_asked()

    def finish(self) -> None:
        """Training is done: saves the last state if it is not saved, and waits until it is durable."""
        self._saver.raise_failed(wait=True)
        if not self._saver.is_saved(self.progress):
            self._save_tracked()
        self._saver.raise_failed(wait=True)
        self._is_finished = self._saver.is_saved(self.progress)
        self._stopping.end(is_finished=self._is_finished)

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
        object for each part; anything else is one object named "state". step, epoch: what has been done; by default
        what is known already; within `batches` the batch at hand is taken as done. Waits for the save before, and
        raises its error. Raises InvalidState, InvalidMetric, Refused if the run has checkpoints that were not restored.
        """
        values = to_metrics(metrics or {})
        self._attempt()
        if step is None:
            if state is None and self.progress.is_unknown:
                raise InvalidArgument(
                    "save() cannot tell how much of the epoch is done, because no batch of it was counted",
                    hint="iterate over checkpointer.batches(loader), or leave saving to epochs(): every=Every(epochs=1)",
                )
            self.progress.count_batch()
        self.progress.move(step, epoch)
        if values:
            self.log(values, step=self.step)
        pending = self._save_tracked() if state is None else self._save(partial(live.capture_state, state))
        self.stop_if_asked()
        return pending

    def save_if_due(
        self, state: object = None, *, step: int, epoch: int | None = None, metrics: Mapping[str, Any] | None = None
    ) -> Pending | None:
        """Save as `save` does if a checkpoint is due at this step, otherwise log the metrics and return None."""
        if self._every.counts_only_epochs and epoch is None:
            raise InvalidArgument(
                f"{self._every} cannot be told from steps", hint="pass epoch=, or every=Every(steps=…)"
            )
        self._attempt()
        self._stopping.listen()
        self.progress.move(step, epoch)
        is_new = not self._saver.is_saved(self.progress)
        due = self._saver.due(self.progress)
        if due == "disk" or (self._stopping.is_asked and is_new):
            return self.save(state, step=step, epoch=epoch, metrics=metrics)
        if metrics:
            self.log(metrics, step=self.step)
        if due is not None:
            self._save_due(due, self._tracked.capture if state is None else partial(live.capture_state, state))
        self.stop_if_asked()
        return None

    def restore(self, reference: str | None = None, *, like: object = None) -> Any:
        """Go back to a checkpoint.

        Without a reference: what a restart goes on from (see `start`), with counters and random states; None on a fresh start.
        With one, such as "best": its objects only; the loop's counters stay, so the best weights can be had at the end.
        like: a tree of the structure wanted back; then the restored tree is returned and nothing is changed. Otherwise the
        tracked objects are overwritten and the Checkpoint is returned. Raises CheckpointNotFound, Mismatch listing every
        difference (nothing is changed), Damaged, which says if the tracked objects are undefined now.
        """
        self._saver.raise_failed(wait=True)
        if reference is not None:
            return self._restore_reference(reference, like)
        if like is None:
            self._tracked.require("restore()", "like=state")
            if self._saver.is_open:
                return self._saver.rewind(self.progress, lambda found: self.progress.restore(found, self._tracked))
            return self.start()
        restored: list[Any] = []

        def load(checkpoint: Checkpoint) -> None:
            restored.append(self.progress.restore_like(checkpoint, like))

        if self._saver.is_open:
            self._saver.rewind(self.progress, load)
        else:
            self._open({}, load)
            self._saver.say_resumed(None)
        return restored[-1] if restored else None

    def _restore_reference(self, reference: str, like: object) -> Any:
        if like is None:
            self._settle()  # its metrics are those of the weights as they are now, not of those that are put in their place
        checkpoint = self.run.checkpoint(reference)
        if like is not None:
            objects = [name for name in checkpoint.objects if name != PROGRESS]
            is_stripped = checkpoint.manifest.is_weights_only
            return passed.fill(like, checkpoint.saved, objects, where=checkpoint.path, is_stripped=is_stripped)
        self._tracked.require("restore()", "like=state")
        checkpoint.restore(**{name: obj for name, obj in self._tracked.items() if name in checkpoint.objects})
        return checkpoint

    # Ending

    def close(self) -> None:
        """Wait for the save under way, prune, and give the run back; raises a failed save's error. Twice is once."""
        try:
            self._settle()
        finally:
            is_ended = self._saver.close("complete" if self._is_finished else "closed", self.progress)
        if is_ended:
            self._saver.summarize(self._best, has_logged=not self._measured.is_empty)
        self._stopping.end(is_finished=self._is_finished)

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
            self._saver.close("interrupted" if isinstance(error, KeyboardInterrupt) else "error", self.progress)
        except HighcampError as failed:
            self.voice.say(f"not saved: {failed}", level=0)
        finally:
            self._stopping.leave()

    # Inside

    def _open(self, tracked: dict[str, object], load: Callable[[Checkpoint], object]) -> None:
        self._saver.open(self.progress, tracked, load)
        if self._best is not None:
            self._best.replay(self.run.history, self.voice)

    def _attempt(self) -> OngoingAttempt:
        """The attempt under way; one that was never restored may begin only in an empty run."""
        if not self._saver.is_open:
            self._saver.open_empty(self.progress)
        return self._saver.attempt

    def _save_due(self, due: Where, capture: Capture | None = None) -> None:
        save = self._saver.save if due == "disk" else self._saver.keep
        save(capture or self._tracked.capture, self.progress, self._measured.at(self.step))
        self._stopping.learn()

    def _save_tracked(self) -> Pending:
        self._tracked.require("save()", "a state")
        return self._save(self._tracked.capture)

    def _save(self, capture: Capture) -> Pending:
        self._attempt()
        return self._saver.save(capture, self.progress, self._measured.at(self.step))

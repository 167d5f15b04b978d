"""CheckpointCallback: the whole of highcamp inside `model.fit`."""

from __future__ import annotations

import os
import warnings
import weakref
from typing import TYPE_CHECKING, Any, Literal

import keras
from keras.src.utils import io_utils
from keras.src.utils.rng_utils import get_random_seed

from highcamp.errors import InvalidArgument
from highcamp.keras import state, trained
from highcamp.keras.dataset import EpochDataset
from highcamp.keras.loop import NEVER, Loop, last_execution
from highcamp.keras.midway import Midway
from highcamp.keras.model_checkpoint import compiled_metrics
from highcamp.keras.numbers import as_number
from highcamp.keras.siblings import Siblings
from highcamp.policy.cadence import Every
from highcamp.policy.monitor import Mode, Monitor
from highcamp.policy.retention import Keep
from highcamp.training.arguments import refuse_unknown
from highcamp.training.checkpointer import Checkpointer
from highcamp.training.rng import random_state

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from highcamp.run.checkpoint import Checkpoint
    from highcamp.run.run import Run

_KNOWN = (
    "directory", "monitor", "mode", "every", "keep", "restore_best", "verbose", "callbacks", "data", "snapshot", "memory_every",
    "staging_bytes", "on_error",
)  # fmt: skip

# Runs under way in this process. After an exception `fit` does not tell its callbacks that it has ended, and the cell of a
# notebook that is run again brings a new callback for the same run.
_open_runs: weakref.WeakValueDictionary[str, CheckpointCallback] = weakref.WeakValueDictionary()


class CheckpointCallback(keras.callbacks.Callback):
    """Keeps the best model, and lets `model.fit` go on where it was: run the same script again after a crash.

        model.fit(x, y, epochs=50, callbacks=[EarlyStopping(patience=5), CheckpointCallback("runs/digits")])

    Put it last in the list. Saved and restored are: model, optimizers with all slots, the state of the other callbacks
    (EarlyStopping, ReduceLROnPlateau, ModelCheckpoint, SwapEMAWeights, and any with `state_dict` and `load_state_dict`),
    every SeedGenerator, the random states of Python, NumPy, Keras and PyTorch, counters and history. `fit(epochs=n)` trains
    what is left of n epochs; the History it returns has the earlier ones too. When a run is complete, nothing is trained.

    A resumed run ends bit for bit as one that was never interrupted, with Dropout on every backend and with shuffled arrays
    on PyTorch and JAX. On TensorFlow arrays are shuffled where no state can be read: there, call
    `keras.utils.set_random_seed` first, or use an EpochDataset.

    Asked to stop by SIGTERM, SIGUSR1, SIGUSR2, Ctrl-C or a deadline, it saves when the batch under way is done, or at once
    within an evaluation, and ends the process with the conventional exit code. The rerun goes on at that place.

    With `every=Every(steps=…)` or `seconds=…`, or such a `memory_every`, it saves within epochs as well, and goes on at the
    next batch: the batches before it are read again but not trained on. Pass an EpochDataset as `data` too, and they are
    not even read.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        monitor: Monitor | str | None = "val_loss",
        mode: Mode = "auto",
        every: Every = Every(epochs=1),  # noqa: B008  (frozen)
        keep: Keep = Keep(),  # noqa: B008  (frozen)
        restore_best: bool = False,  # noqa: FBT001, FBT002  (Keras's own callbacks take flags by position)
        verbose: int = 1,
        *,
        callbacks: Iterable[keras.callbacks.Callback] = (),
        data: EpochDataset | None = None,
        snapshot: Literal["copy", "overlap"] = "copy",
        memory_every: Every | None = None,
        staging_bytes: int | None = None,
        on_error: Literal["raise", "warn"] = "raise",
        **unknown: object,
    ) -> None:
        """Nothing is written or restored before training begins.

        directory: the run. monitor, mode: the metric that ranks checkpoints; "auto" knows the usual names and asks for
        others. every: when a checkpoint is due. keep: which stay. restore_best: whether `fit` ends with the best weights
        in the model instead of the last. callbacks: others whose state is to be kept; those in the same list are found
        without it. data: the EpochDataset given to `fit`.
        snapshot: "copy" takes the state within the call that saves; Keras has no place for "overlap".
        memory_every: when the state is also copied to shared memory, for the next attempt if this process is killed.
        staging_bytes: the most memory for the copy.
        on_error: "raise" or "warn", for a save that fails. verbose: 0 warnings, 1 a line per epoch, 2 details.
        Raises InvalidArgument, and TypeError for unknown arguments.
        """
        super().__init__()
        refuse_unknown("CheckpointCallback", unknown, _KNOWN)
        if data is not None and not isinstance(data, EpochDataset):
            raise InvalidArgument(
                f"CheckpointCallback: data is a {type(data).__name__}, not an EpochDataset",
                hint="other data need not be named: leave data= out",
            )
        if snapshot == "overlap":
            raise InvalidArgument(
                'CheckpointCallback: snapshot="overlap" is not possible in Keras, which tells nobody before its optimizers '
                "change the weights",
                hint='leave it out; "copy" takes the state within the call that saves',
            )
        self._monitor = Monitor(monitor, mode) if isinstance(monitor, str) else Monitor.of(monitor)
        self._arguments: dict[str, Any] = {
            "monitor": self._monitor, "every": every, "keep": keep, "snapshot": snapshot, "memory_every": memory_every,
            "staging_bytes": staging_bytes, "on_error": on_error, "verbose": verbose,
        }  # fmt: skip
        self.directory = os.fspath(directory)
        self._checkpointer = Checkpointer(directory, **self._arguments)  # made now, so that it complains now
        self._restore_best = bool(restore_best)
        self._siblings = Siblings(callbacks)
        self._data = data
        self._was_used = False
        self._resume_now = False
        self._initial_epoch_is_ours = False
        self._loop = Loop(self, data, 1, None)
        self._midway: Midway | None = None
        self._attend_from = NEVER
        self._unrecorded: set[str] = set()
        if self._saves_within_epochs():
            # An attribute, not a method: a class with this method would cost every user Keras's asynchronous callbacks.
            self.on_train_batch_end = self._after_batch

    @property
    def run(self) -> Run:
        """The run as a reader sees it, with `run.best`, `run.history` and the rest."""
        return self._checkpointer.run

    @property
    def best(self) -> Checkpoint | None:
        """The best checkpoint that is committed now."""
        return self._checkpointer.best

    # ------------------------------------------------------------------------------------------------- Keras's hooks

    def set_model(self, model: Any) -> None:
        """Keras tells us the model, from within the list of callbacks."""
        super().set_model(model)
        self._siblings.look(self)

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Restore the newest whole checkpoint, and tell `fit` where to begin."""
        del logs
        model = self.model
        self._forget_initial_epoch(model)  # one that an exception has left behind
        self._siblings.refuse_twin()
        self._siblings.warn_of_order()
        checkpointer = self._take_over()
        found = self._restore(model, checkpointer)
        self._siblings.apply()
        done, planned = checkpointer.epoch, self._planned()
        stopped = self._siblings.early_stopping() if found is not None else None
        if stopped is not None and planned <= int(self._loop.restored.get("epochs", 0)):
            self._say(f"Run is complete: EarlyStopping ended it after epoch {done} of {planned}; nothing to train")
            model._initial_epoch = max(planned, 1)  # noqa: SLF001
        elif done >= planned:
            further = f"fit(epochs={done + 10}) would go on"
            self._say(f"Run is complete ({done} of {planned} epochs); nothing to train. {further}")
            model._initial_epoch = done  # noqa: SLF001
        else:
            model._initial_epoch = done or None  # noqa: SLF001
        self._initial_epoch_is_ours = True
        self._resume_now = True
        self._warn_of_what_is_not_exact()

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """An epoch begins; the first one after a restart is set up as it was."""
        del logs
        model, checkpointer = self.model, self._checkpointer
        self._forget_initial_epoch(model)
        if self._resume_now:
            self._resume_now = False
            self._siblings.apply_late()
            trained.fill_history(model, self.run, checkpointer.epoch)
            if epoch != checkpointer.epoch:  # fit(initial_epoch=…) on a fresh run
                checkpointer.progress.move(None, epoch)
        if not checkpointer.progress.in_epoch:  # the first of this attempt; the others begin where the one before ends
            checkpointer.begin_epoch()
        midway = self._midway
        self._loop.begin_epoch(model, midway)
        self._attend_from = NEVER if self._saves_within_epochs() else last_execution(model, self._steps())
        if midway is not None:
            checkpointer.progress.hand_over()  # `Midway` goes on with the epoch, not `batches`
            # Callbacks have begun this epoch a second time: a schedule has been applied to what it made before.
            self._resumed.restore(**trained.objects(model))
            midway.begin(model, self._siblings.apply)
        if self._data is not None:
            self._data.set_epoch(epoch, position=self._loop.batch)

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """If the process is asked to stop, or if it may be the last of the epoch, attend to the end of this batch.

        This hook is called in the thread that trains, always; the one at the end of a batch only if somebody asks for it.
        """
        del logs
        if batch >= self._attend_from or self._checkpointer.preemption.is_asked:
            self._attend()

    def _attend(self) -> None:
        if "on_train_batch_end" not in vars(self) and self._siblings.take_turns(True):  # noqa: FBT003
            self.on_train_batch_end = self._after_attended

    def _after_attended(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        del self.on_train_batch_end
        self._siblings.take_turns(False)  # noqa: FBT003
        self._after_batch(batch, logs)

    def _after_batch(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Steps are done; save if that is due. The model is not touched otherwise: on JAX each touch costs."""
        checkpointer, loop = self._checkpointer, self._loop
        if batch < loop.batch:  # passed over, not trained on
            checkpointer.stop_if_asked()
            return
        count, is_last = loop.count(batch, logs)
        checkpointer.progress.batch = loop.batch
        checkpointer.end_step(count, is_last=is_last)

    def on_test_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """The batches of an epoch are done. What the evaluation changes is set aside: it may be asked to stop."""
        del logs
        if self._loop.is_under_way:
            model = self.model
            self._end_batches(model)
            if self._siblings.leave_evaluation_alone():
                self._loop.rest(model)
                self._checkpointer.progress.rest = random_state()

    def on_test_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Asked to stop within an evaluation, save the state after the last batch; it is evaluated when run again."""
        del batch, logs
        if self._loop.is_resting and self._checkpointer.preemption.is_asked:
            self._checkpointer.stop_if_asked()

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Record the metrics, and save if that is due."""
        model, checkpointer = self.model, self._checkpointer
        self._end_batches(model)
        self._loop.end_epoch()
        checkpointer.progress.batch = 0
        checkpointer.log(self._numbers(logs or {}))
        checkpointer.end_epoch()
        if epoch + 1 >= self._planned() or model.stop_training:
            # Now rather than in on_train_end: in between, `fit` puts averaged weights in the place of the trained ones.
            checkpointer.finish()
        else:
            checkpointer.begin_epoch()  # before other callbacks begin it, which may change what would be saved

    def _end_batches(self, model: Any) -> None:
        """All batches of the epoch are done, those of which nobody has told included."""
        midway, self._midway = self._midway, None
        if midway is not None:
            midway.end()
        count = self._loop.count_rest(model)
        if count:
            self._checkpointer.end_step(count, is_last=True)
        self._checkpointer.progress.batch = self._loop.batch

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Training is done: everything is durable when this returns."""
        del logs
        model, checkpointer = self.model, self._checkpointer
        self._forget_initial_epoch(model)
        if self._resume_now:
            self._resume_now = False
            trained.fill_history(model, self.run, checkpointer.epoch)
        checkpointer.finish()
        if self._siblings.early_stopping() is not None and checkpointer.epoch:
            checkpointer.start(epochs_planned=checkpointer.epoch)  # as many as there will be
        if self._restore_best:
            self._put_best(model)
        self._release()

    # ---------------------------------------------------------------------------------------------------- the restore

    def _take_over(self) -> Checkpointer:
        """A Checkpointer that is not open; whoever of this process held the run before lets go of it."""
        key = self.run.path
        before = _open_runs.get(key)
        if before is not None:
            before._release()  # noqa: SLF001  (one of ours, which an exception or Ctrl-C has left open)
        if self._was_used:
            self._checkpointer = Checkpointer(self.directory, **self._arguments)
        self._was_used = True
        self._checkpointer.voice.write = self._say_line
        _open_runs[key] = self
        return self._checkpointer

    def _release(self) -> None:
        _open_runs.pop(self.run.path, None)
        self._checkpointer.close()

    def _restore(self, model: Any, checkpointer: Checkpointer) -> Checkpoint | None:
        trained.build(model, self._data)
        self._loop, self._midway = Loop(self, self._data, self._planned(), self._steps()), None
        checkpointer.track(keras=self._loop, **trained.objects(model), callbacks=self._siblings)
        found = checkpointer.start(epochs_planned=self._planned())
        if found is None:
            return None
        self._resumed = found
        if self._loop.length_change:
            self._say(f"{self._loop.length_change}: the run goes on, but is another one from here", level=0)
        if found.batch:
            self._midway = Midway(self._loop.restored["midway"], found.batch, random_state(), where=found.path)
        state.set_random_state(self._loop.restored["random"])
        return found

    def _put_best(self, model: Any) -> None:
        best = self._checkpointer.best
        if best is None:
            warnings.warn(
                "restore_best: no checkpoint has a finite value of the monitored metric; the model keeps its last weights",
                stacklevel=2,
            )
            return
        best.restore(model=model)

    # ------------------------------------------------------------------------------------------------- small matters

    def _saves_within_epochs(self) -> bool:
        cadences = (self._arguments["every"], self._arguments["memory_every"])
        return any(every is not None and not every.counts_only_epochs for every in cadences)

    def _steps(self) -> int | None:
        """Batches in an epoch, None where data do not tell."""
        steps = (self.params or {}).get("steps")
        return None if steps is None else int(steps)

    def _planned(self) -> int:
        return int((self.params or {}).get("epochs", 1))

    def _forget_initial_epoch(self, model: Any) -> None:
        """`fit` has read it; left in the model it would shift the next `fit`."""
        if self._initial_epoch_is_ours:
            self._initial_epoch_is_ours = False
            model._initial_epoch = None  # noqa: SLF001

    def _numbers(self, logs: Mapping[str, Any]) -> dict[str, Any]:
        """What of Keras's logs is a number; of the others only the monitored one is an error, the rest is named once."""
        found: dict[str, Any] = {}
        for name, value in logs.items():
            number = as_number(value)
            if number is not None:
                found[name] = number
            elif self._monitor is not None and name == self._monitor.metric:
                found[name] = value  # refused by the Checkpointer, in words
            elif name not in self._unrecorded:
                self._unrecorded.add(name)
                warnings.warn(f"{name} is a {type(value).__name__}, not a number: it is not recorded", stacklevel=2)
        return found

    def _warn_of_what_is_not_exact(self) -> None:
        steps = self._steps()
        if self._data is not None and steps is not None and steps != len(self._data):
            raise InvalidArgument(
                f"CheckpointCallback: fit has {steps} steps per epoch, data= has {len(self._data)} batches",
                hint="pass the same EpochDataset to fit and to data=, without steps_per_epoch",
            )
        metric = self._monitor.metric if self._monitor is not None else None
        if metric == "loss" or metric in [entry.name for entry in compiled_metrics(self.model)]:
            self._say(
                f"{metric} is a mean over the epoch, in which the weights change; the weights saved are those of its end"
            )
        if keras.backend.backend() == "tensorflow" and self._data is None and get_random_seed() is None:
            warnings.warn(
                "on TensorFlow the order of shuffled arrays can be repeated only after keras.utils.set_random_seed(…), which "
                "was not called: a resumed run may see another order. EpochDataset needs no seed",
                stacklevel=2,
            )

    def _say(self, line: str, level: int = 1) -> None:
        self._checkpointer.voice.say(line, level=level)

    def _say_line(self, line: str) -> None:
        """Through Keras's own printing, on a line of its own where a progress bar is under way."""
        has_bar = (self.params or {}).get("verbose") == 1
        io_utils.print_msg(("\n" if has_bar else "") + line)

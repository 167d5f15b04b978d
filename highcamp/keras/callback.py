"""CheckpointCallback: the whole of highcamp inside `model.fit`."""

from __future__ import annotations

import os
import warnings
import weakref
from typing import TYPE_CHECKING, Any, Literal

import keras
from keras.src.utils import io_utils
from keras.src.utils.rng_utils import get_random_seed

from highcamp.core.names import is_file_name
from highcamp.errors import InvalidArgument, InvalidState
from highcamp.keras import state
from highcamp.keras.dataset import EpochDataset
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
        snapshot: "copy", or "overlap" to copy arrays that cannot change while training goes on, as on JAX.
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
        self._midway: Midway | None = None
        self._before: Any = None
        self._logs: Mapping[str, Any] = {}
        self._batches_seen = 0
        self._iterations_seen = 0
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
        self._siblings.warn_of_order()
        checkpointer = self._take_over()
        found = self._restore(model, checkpointer)
        self._siblings.apply()
        done, planned = checkpointer.epoch, self._planned()
        stopped = self._siblings.early_stopping() if found is not None else None
        if stopped is not None and planned <= int(self._loop.get("epochs", 0)):
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
            self._fill_history(model, checkpointer.epoch)
            if epoch != checkpointer.epoch:  # fit(initial_epoch=…) on a fresh run
                checkpointer.progress.move(None, epoch)
        checkpointer.begin_epoch()
        self._iterations_seen = _iterations(model)
        self._batches_seen = 0
        midway, self._midway = self._midway, None
        if midway is not None:
            checkpointer.progress.hand_over()  # `Midway` goes on with the epoch, not `batches`
            self._batches_seen = midway.position
            self._before = midway.before
            # Callbacks have begun this epoch a second time: a schedule has been applied to what it made before.
            self._resumed.restore(**self._objects(model))
            midway.begin(model, self._siblings.apply)
        elif self._saves_within_epochs():
            self._before = random_state()
        if self._data is not None:
            self._data.set_epoch(epoch, position=self._batches_seen)

    def _after_batch(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Steps are done; save if that is due. The model is not touched otherwise: on JAX each touch costs."""
        if batch < self._batches_seen:
            return  # passed over, not trained on
        count = batch + 1 - self._batches_seen
        self._batches_seen = batch + 1
        self._logs = logs or {}
        steps = self.params.get("steps")
        self._checkpointer.progress.batch = self._batches_seen
        self._checkpointer.end_step(count, is_last=steps is not None and self._batches_seen >= steps)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Record the metrics, and save if that is due."""
        model, checkpointer = self.model, self._checkpointer
        if not self._saves_within_epochs():
            checkpointer.end_step(max(0, _iterations(model) - self._iterations_seen), is_last=True)
        self._batches_seen, self._before, self._logs = 0, None, {}
        checkpointer.progress.batch = 0
        checkpointer.log(self._numbers(logs or {}))
        checkpointer.end_epoch()
        if epoch + 1 >= self._planned() or model.stop_training:
            # Now rather than in on_train_end: in between, `fit` puts averaged weights in the place of the trained ones.
            checkpointer.finish()

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Training is done: everything is durable when this returns."""
        del logs
        model, checkpointer = self.model, self._checkpointer
        self._forget_initial_epoch(model)
        if self._resume_now:
            self._resume_now = False
            self._fill_history(model, checkpointer.epoch)
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
        self._build(model)
        self._loop: dict[str, Any] = {}
        objects = self._objects(model)
        checkpointer.track(**objects, callbacks=self._siblings, keras=_Loop(self))
        found = checkpointer.start(epochs_planned=self._planned())
        if found is None:
            return None
        self._resumed = found
        if found.batch:
            checkpointer.progress.hand_over()  # `Midway` goes on with the epoch, not `batches`
            self._midway = Midway(self._loop["midway"], found.batch, random_state(), where=found.path)
        state.set_random_state(self._loop["random"])
        return found

    def _build(self, model: Any) -> None:
        """Variables must exist before they can be restored: TensorFlow would make them with the first batch."""
        if not model.built and self._data is not None:
            model._symbolic_build(data_batch=self._data.batch(0, 0))  # noqa: SLF001
        if not model.built:
            raise InvalidState(
                f"CheckpointCallback: the model {model.name!r} is not built when training begins, so nothing could be "
                "restored into it after a restart",
                hint="start it with keras.Input(shape), or call model.build(input_shape) before fit",
            )
        if model.optimizer is not None and not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)

    def _objects(self, model: Any) -> dict[str, Any]:
        """The model and its optimizers, those that a model of several has under names of its own included."""
        objects = {"model": model}
        for attribute, value in [("optimizer", model.optimizer), *sorted(vars(model).items())]:
            name = attribute.lstrip("_")
            is_optimizer = isinstance(value, keras.optimizers.Optimizer) and is_file_name(name)
            if is_optimizer and not any(value is known for known in objects.values()):
                objects[name] = value
        return objects

    def _fill_history(self, model: Any, done: int) -> None:
        """Put the epochs of earlier attempts before those of this one in Keras's own History."""
        history = getattr(model, "history", None)
        if not isinstance(history, keras.callbacks.History) or not done:
            return
        rows = [row for row in self.run.history.epochs() if 0 < row.epoch <= done]
        history.epoch[:] = [row.epoch - 1 for row in rows]
        history.history.clear()
        for row in rows:
            for name, value in row.metrics.items():
                history.history.setdefault(name, []).append(value)

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
        steps = self.params.get("steps")
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


class _Loop:
    """What belongs to the loop rather than to an object: Keras's random state, data order, the middle of an epoch."""

    def __init__(self, callback: CheckpointCallback) -> None:
        self._callback = callback

    def state_dict(self) -> dict[str, Any]:
        callback = self._callback
        midway = None
        if callback._batches_seen:  # noqa: SLF001
            midway = Midway.capture(callback.model, callback._before, callback._logs)  # noqa: SLF001
        return {
            "backend": keras.backend.backend(),
            "epochs": callback._planned(),  # noqa: SLF001
            "random": state.random_state(),
            "data": None if callback._data is None else callback._data.state_dict(),  # noqa: SLF001
            "midway": midway,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        callback = self._callback
        if callback._data is not None and saved["data"] is not None:  # noqa: SLF001
            callback._data.load_state_dict(saved["data"])  # noqa: SLF001
        callback._loop = saved  # noqa: SLF001


def _iterations(model: Any) -> int:
    """Batches the optimizer has seen: steps, or parts of them while gradients are accumulated. 0 without an optimizer."""
    optimizer = model.optimizer
    counter = getattr(optimizer, "_iterations", None)
    if counter is None or optimizer is None:
        return 0
    return int(keras.ops.convert_to_numpy(getattr(optimizer, "inner_optimizer", optimizer)._iterations))  # noqa: SLF001

"""CheckpointCallback: the whole of highcamp inside `trainer.fit`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tqdm import tqdm

from highcamp.errors import Mismatch, Refused
from highcamp.lightning import loop, metrics
from highcamp.lightning.loader import TrackedSource
from highcamp.lightning.reading import RunIO
from highcamp.lightning.scores import ScoredCheckpoint
from highcamp.lightning.state import LOOP, TrainerState, model_differences, training_differences
from highcamp.lightning.supported import check_trainer
from highcamp.policy.cadence import Every
from highcamp.policy.monitor import Monitor
from highcamp.policy.retention import Keep
from highcamp.run import live
from highcamp.training.arguments import CHECKPOINTER, refuse_unknown
from highcamp.training.checkpointer import Checkpointer
from highcamp.training.rng import random_state, set_random_state

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from highcamp.lightning.loader import TrackedLoader
    from highcamp.storage.store import Store

_KNOWN = ("directory", *CHECKPOINTER)


class CheckpointCallback(ScoredCheckpoint):
    """Keeps the best model, and lets `trainer.fit` go on where it was: run the same script again after a crash.

        trainer = Trainer(max_epochs=50, callbacks=[CheckpointCallback("runs/digits", monitor="val_loss")])
        trainer.fit(model, loader, val_loader)
        trainer.test(model, test_loader, ckpt_path="best")

    Saved and restored are: model, optimizers, schedulers, the precision plugin's scaler, loops, callbacks, the data module,
    what `on_save_checkpoint` hooks add (tensors and plain values), the metrics of an epoch under way, every global random
    state and the place in the data. A resumed run ends bit for bit as one that was never interrupted. Exact between epochs
    only: loaders whose workers draw random numbers, and loaders without a length whose data do.

    A checkpoint is taken when all that belongs to a batch or an epoch is done, validation, hooks and schedulers included:
    when the next batch is asked for, or the next epoch begins. With `every=Every(steps=…)` that is between batches, never
    while gradients are being accumulated. In an epoch resumed midway `on_train_epoch_start` is not called again.

    `fit` needs no `ckpt_path`: it goes on from the newest whole checkpoint of the run, and refuses any other. Elsewhere
    `ckpt_path="best"`, `callback.last_model_path` or the path of any checkpoint can be given, as long as this callback is in
    the Trainer: Lightning reads it as if it were a `.ckpt`. Without a Trainer, use `callback.restore("best", model)`.
    `ckpt_path="last"` is not for us: Lightning looks for it among its own files only, and says so.

    Between two steps the process listens to SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C, and saves before it ends.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | Store,
        monitor: Monitor | str | None = None,
        *,
        every: Every = Every(epochs=1),  # noqa: B008  (frozen)
        keep: Keep = Keep(),  # noqa: B008  (frozen)
        snapshot: Literal["copy", "overlap"] = "copy",
        memory_every: Every | None = None,
        staging_bytes: int | None = None,
        on_error: Literal["raise", "warn"] = "raise",
        verbose: int = 1,
        **unknown: object,
    ) -> None:
        """Nothing is written or restored before training begins.

        directory: the run. monitor: the metric that ranks checkpoints, as it is logged; a name of the usual kind is enough
        ("val_loss"), any other needs `Monitor(name, mode=…)`. every: when a checkpoint is due. keep: which stay.
        snapshot: "copy" takes the state within the save; "overlap" during the next forward and backward, for modules in which
        only the optimizers change the weights. memory_every: when the state is also copied to shared memory, for the next
        attempt if this process is killed. staging_bytes: the most memory for the copy. on_error: "raise" or "warn", for a
        save that fails. verbose: 0 warnings, 1 a line per epoch, 2 details. Raises InvalidArgument, Refused for a directory
        that is a file, and TypeError for unknown arguments.
        """
        super().__init__()
        refuse_unknown("CheckpointCallback", unknown, _KNOWN)
        self._monitor = Monitor.of(monitor)
        self._directory = directory
        self._arguments: dict[str, Any] = {
            "monitor": self._monitor, "every": every, "keep": keep, "snapshot": snapshot, "memory_every": memory_every,
            "staging_bytes": staging_bytes, "on_error": on_error, "verbose": verbose,
        }  # fmt: skip
        self._checkpointer = Checkpointer(directory, **self._arguments)  # made now, so that it complains now
        self._within = next((each for each in (every, memory_every) if each and not each.counts_only_epochs), None)
        self._was_used = False
        self._trainer: Any = None  # while it fits
        self._state: TrainerState | None = None
        self._resume: loop.Resume | None = None
        self._source: Any = None
        self._loader: TrackedLoader | None = None
        self._position = 0  # in the Trainer's list, before it was the first
        self._is_training = self._is_epoch_over = False
        self._only_between_epochs = ""
        self._steps_seen = self._batches_seen = 0
        self._metrics_before: dict[str, Any] = {}
        self._measured: dict[str, float] = {}

    # ------------------------------------------------------------------------------------------------------ fit begins

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Read the newest whole checkpoint and hand it to Lightning, as if it came from a file."""
        if not _is_trainer(trainer):
            raise Refused(
                f"CheckpointCallback is for lightning.pytorch.Trainer, this one is of {type(trainer).__module__}",
                hint="import Trainer, LightningModule and callbacks from lightning.pytorch",
            )
        self._resume = None
        if stage == "fit" and not trainer.fast_dev_run:
            check_trainer(
                trainer, (each is not self and isinstance(each, CheckpointCallback) for each in trainer.callbacks)
            )
            self._begin(trainer, pl_module)
        strategy = trainer.strategy
        strategy.checkpoint_io = RunIO(strategy.checkpoint_io, self._resume)

    def _begin(self, trainer: Any, pl_module: Any) -> None:
        if self._was_used:
            self._checkpointer = Checkpointer(self._directory, **self._arguments)
        self._was_used = True
        checkpointer = self._checkpointer
        if any(isinstance(each, TQDMProgressBar) for each in trainer.callbacks):
            checkpointer.voice.write = _write_above_the_bar
        self._trainer = trainer
        self._is_training = self._is_epoch_over = False
        self._measured, self._loader, self._position = {}, None, 0
        self._state = TrainerState(
            trainer,
            loop=lambda: loop.capture(trainer, self._loader, midway=self._batches_seen > 0),
            is_midway=lambda: self._batches_seen > 0,
        )
        checkpointer.track(**self._state.parts)
        before = random_state()
        planned = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else None
        found = checkpointer.start(epochs_planned=planned)
        if found is not None:
            self._resume = loop.Resume(found, self._state.saved(), self._state.parts[LOOP].saved, random_state())
            # What is still to be made, such as a random split of the data, must be made as it was at the fresh start.
            set_random_state(before, where=found.path)
            trainer._checkpoint_connector._loaded_checkpoint = self._resume.loaded  # noqa: SLF001
            self._compare_model(pl_module, self._resume)
        self._source = trainer.fit_loop._data_source  # noqa: SLF001
        trainer.fit_loop._data_source = TrackedSource(self._source.instance, self._source.name, self)  # noqa: SLF001

    def _compare_model(self, module: Any, resume: loop.Resume) -> None:
        """Before Lightning's `load_state_dict` changes anything; the layers may be made after our `setup`."""

        def compare(_: object, saved: Mapping[str, Any], *rest: Any) -> None:
            handle.remove()
            problems = model_differences(module, saved, strict=bool(rest[2]))
            if problems:
                raise live.mismatch(problems, resume.path)
            resume.weights_before = {
                name: value.clone() for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)
            }

        handle = module.register_load_state_dict_pre_hook(compare)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Optimizers and schedulers are made: they must fit before Lightning restores them."""
        if self._trainer is None:
            return
        resume = self._resume
        if resume is not None:
            problems = training_differences(trainer, resume.loaded, resume.loop["kinds"])
            if problems:
                pl_module.load_state_dict(resume.weights_before or {}, strict=False)
                raise live.mismatch(problems, resume.path)
            resume.weights_before = None
            # A learning-rate finder that ran in this hook has put its own in the place of ours.
            trainer._checkpoint_connector._loaded_checkpoint = resume.loaded  # noqa: SLF001
            if loop.is_stopped(trainer, resume):
                trainer.should_stop = True
        # First from now on: an epoch is saved when all callbacks are done with it, and before they begin or end the next.
        self._position = trainer.callbacks.index(self)
        trainer.callbacks = [self, *(each for each in trainer.callbacks if each is not self)]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Training begins, or goes on."""
        del pl_module
        if self._trainer is None:
            return
        self._only_between_epochs = loop.why_only_between_epochs(trainer)
        if self._only_between_epochs and self._within is not None:
            hint = "save between epochs: every=Every(epochs=1)"
            raise Refused(f"{self._within}: {self._only_between_epochs}", hint=hint)
        self._is_training = True
        if self._state is not None:
            self._state.optimizers.attach(trainer.optimizers)
        self._steps_seen, self._batches_seen = trainer.global_step, 0
        resume = self._resume
        if resume is None:
            self._checkpointer.progress.move(trainer.global_step, trainer.current_epoch)
            return
        difference = loop.length_difference(trainer, resume)
        if difference:
            self._say(difference, level=0)
        loop.prepare(trainer, resume)

    # ------------------------------------------------------------------------------------------------- while it trains

    @property
    def is_waiting(self) -> bool:
        """See `Watcher`."""
        return self._resume is not None

    @property
    def is_capturing(self) -> bool:
        """See `Watcher`."""
        return self._state is not None and self._state.is_capturing

    def ask(self, loader: TrackedLoader) -> None:
        """A batch is asked for, so the one before is done."""
        self._loader = loader
        resume = self._resume
        if not self._is_training:
            if resume is not None and resume.batch and loader.length is None:  # it is read one batch ahead
                loader.go_on(resume.loop["place"], resume.batch, where=resume.path)
            return
        if resume is not None:
            self._go_on(loader, resume)
        elif self._state is not None and not self._state.is_ready:
            self._rehearse(self._state)
        elif not self._only_between_epochs:
            done = self._trainer.fit_loop.epoch_loop.batch_progress.current.completed
            if done:
                self._end_batch(done)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """All of the epoch before is done, and nothing of this one."""
        del trainer, pl_module
        if not self._is_training:
            return
        if self._is_epoch_over:
            self._end_epoch()
        resume, self._resume = self._resume, None
        if resume is not None:
            if resume.batch:
                raise Mismatch(
                    f"{resume.path} is of the middle of an epoch, which Lightning begins anew", path=resume.path
                )
            self._put_back(resume)
        self._checkpointer.begin_epoch()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """If the process is asked to stop, it is after all that belongs to this batch."""
        self._take_signal(trainer)

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        """A validation is not cut short: within it there is no place to go on from."""
        self._take_signal(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Remember what has been measured before."""
        del pl_module
        if self._is_training:
            self._metrics_before = dict(trainer.callback_metrics)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Take what this validation has measured; it belongs to the step that is just done."""
        del pl_module
        if self._is_training:
            self._measured.update(metrics.renewed(trainer, self._metrics_before))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Record the metrics; schedulers and callbacks may still have to do."""
        del pl_module
        if not self._is_training:
            return
        checkpointer = self._checkpointer
        self._take_signal(trainer)
        self._count_steps()
        self._batches_seen = checkpointer.progress.batch = 0
        checkpointer.progress.is_iterating = False
        measured = {**self._measured, **metrics.of_epoch(trainer)}
        self._measured = {}
        if measured:
            checkpointer.log(measured)
        self._is_epoch_over = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Training is done: everything is durable when this returns."""
        del trainer, pl_module
        if not self._is_training:
            return
        if self._is_epoch_over:
            self._end_epoch()
        self._checkpointer.finish()
        self._is_training = False

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """The run is given back."""
        del pl_module, stage
        if self._trainer is not None:
            resume = self._resume
            if resume is not None:  # nothing was left to train
                self._say(f"Run is complete ({loop.why_complete(trainer, resume)}); nothing to train")
                metrics.restore(trainer, resume.loop["metrics"], midway=False)
                # Where weights are averaged, `state_dict` holds the averages, which the model has had when training ended.
                trainer.lightning_module.load_state_dict(resume.loaded["state_dict"], strict=False)
                self._checkpointer.finish()
            self._checkpointer.close()
        self._release(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Training has failed, or was asked to stop: then this place is saved first."""
        del pl_module
        checkpointer = self._checkpointer
        if self._trainer is not None:
            try:
                if self._is_training and checkpointer.preemption.is_asked and isinstance(exception, SIGTERMException):
                    exception.code = self._stop(exception.code)  # its own would be 0, as if training were done
            finally:
                checkpointer.__exit__(type(exception), exception, exception.__traceback__)
                self._release(trainer)
        else:
            self._release(trainer)

    # ---------------------------------------------------------------------------------------------------------- inside

    def _end_batch(self, done: int) -> None:
        """A batch is done, validation included; save if that is due."""
        checkpointer = self._checkpointer
        progress = checkpointer.progress
        self._batches_seen = progress.batch = done
        progress.is_iterating = progress.is_counted = True
        stepped = self._count_steps()
        if self._measured:
            checkpointer.log(self._measured)
            self._measured = {}
        if stepped:  # else gradients have come together that no checkpoint holds
            checkpointer.end_step(0, is_last=self._within is None and not checkpointer.preemption.is_asked)

    def _count_steps(self) -> int:
        steps = self._trainer.global_step
        stepped: int = steps - self._steps_seen
        self._steps_seen = steps
        self._checkpointer.progress.step += stepped
        return stepped

    def _end_epoch(self) -> None:
        self._is_epoch_over = False
        if self._state is not None:
            self._state.is_ready = True
        self._checkpointer.end_epoch()

    def _take_signal(self, trainer: Any) -> None:
        """Lightning would end training where it stands; the Checkpointer does at the next place that can be saved."""
        if self._is_training and self._checkpointer.preemption.is_asked and not self._only_between_epochs:
            trainer._signal_connector.received_sigterm = False  # noqa: SLF001

    def _stop(self, code: Any) -> Any:
        """Save and end, if this is a place between two steps; the exit code."""
        try:
            if self._is_epoch_over:
                self._end_epoch()
            elif not self._only_between_epochs:
                self._end_batch(self._trainer.fit_loop.epoch_loop.batch_progress.current.completed)
        except SystemExit as stop:
            return stop.code
        return code

    def _rehearse(self, state: TrainerState) -> None:
        """Gather the state once before the first batch: what cannot be saved is said now, not after the first epoch."""
        state.is_ready = True
        for name, part in state.parts.items():
            live.capture(name, part)
        if state.left_out:
            names = ", ".join(state.left_out)
            self._say(f"hyper-parameters that are no plain values are not saved: {names}")

    def _go_on(self, loader: TrackedLoader, resume: loop.Resume) -> None:
        """In the middle of an epoch: this batch is the first one that is not trained on."""
        checkpointer = self._checkpointer
        loop.go_on(self._trainer, loader, resume)
        self._resume, self._batches_seen = None, resume.batch
        checkpointer.begin_epoch()
        checkpointer.progress.hand_over()
        checkpointer.progress.is_iterating = checkpointer.progress.is_counted = True
        self._put_back(resume)

    def _put_back(self, resume: loop.Resume) -> None:
        changed = loop.restore(self._trainer, resume)
        if changed:
            self._say(f"frozen or trained as when {resume.checkpoint.name} was saved: {changed}", level=2)
        if self._state is not None:
            self._state.is_ready = True

    def _say(self, line: str, level: int = 1) -> None:
        self._checkpointer.voice.say(line, level=level)

    def _release(self, trainer: Any) -> None:
        """Leave the Trainer as it was."""
        io = trainer.strategy.checkpoint_io
        if isinstance(io, RunIO):
            trainer.strategy.checkpoint_io = io.inner
        if self._trainer is None:
            return
        if self._source is not None:
            trainer.fit_loop._data_source = self._source  # noqa: SLF001
        if self._position:
            trainer.callbacks = [each for each in trainer.callbacks if each is not self]
            trainer.callbacks.insert(self._position, self)
        self._is_training = False
        self._trainer = self._state = self._resume = self._source = self._loader = None


def _is_trainer(trainer: object) -> bool:
    return isinstance(trainer, Trainer)


def _write_above_the_bar(line: str) -> None:
    tqdm.write(line, file=sys.stderr)

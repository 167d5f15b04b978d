"""CheckpointCallback: the whole of highcamp inside `Trainer.train`."""

from __future__ import annotations

import functools
import numbers
import sys
import warnings
from typing import TYPE_CHECKING, Any, Literal

from tqdm.auto import tqdm
from transformers import TrainerCallback

from highcamp.errors import CheckpointNotFound, Damaged, InvalidArgument, InvalidState, Refused
from highcamp.policy.cadence import Every
from highcamp.policy.monitor import Monitor
from highcamp.policy.retention import Keep
from highcamp.training.arguments import refuse_unknown
from highcamp.training.checkpointer import Checkpointer
from highcamp.transformers import loop as loops
from highcamp.transformers import trainer as trainers

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from highcamp.run.checkpoint import Checkpoint
    from highcamp.run.run import Run
    from highcamp.storage.store import Store

_KNOWN = ("directory", "monitor", "every", "keep", "snapshot", "memory_every", "staging_bytes", "on_error", "verbose")
_SPEEDS = ("_runtime", "_per_second")  # of the machine, not of the model


class _BeginAgainError(Exception):
    """The checkpoint that was restored is an older one than the loop was told to go on from."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint.name)
        self.checkpoint = checkpoint


class CheckpointCallback(TrainerCallback):
    """Keeps the best model, and lets `trainer.train()` go on where it was: run the same script again after a crash.

        args = TrainingArguments("out", save_strategy="no", eval_strategy="epoch", num_train_epochs=3)
        trainer = Trainer(model, args, callbacks=[CheckpointCallback("runs/x", monitor="eval_loss")], …)
        trainer.train()

    Saved and restored are: model, optimizer, learning-rate scheduler, GradScaler, every random state, TrainerState with its
    log history, the state of the other callbacks (EarlyStoppingCallback, and any with `state_dict` and `load_state_dict`),
    the losses not logged yet, and the place in the data. A resumed run ends bit for bit as one that was never interrupted.
    Batches trained on are passed over by Trainer's own means: at once, except in an IterableDataset, which is read again.
    One case is exact between epochs only: `dataloader_num_workers` above 0, if the workers draw random numbers.

    A checkpoint of a step is taken when the step's logs and evaluation are done, so that its metrics are in it. Trainer's own
    saving is not needed: `save_strategy="no"`.
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

        directory: the run. monitor: the metric that ranks checkpoints, as Trainer logs it ("eval_loss"); without it,
        `metric_for_best_model` of the TrainingArguments. every: when a checkpoint is due. keep: which stay.
        snapshot: "copy" takes the state within the save, "overlap" during the next forward and backward.
        memory_every: when the state is also copied to shared memory, for the next attempt if this process is killed.
        staging_bytes: the most memory for the copy.
        on_error: "raise" or "warn", for a save that fails. verbose: 0 warnings, 1 a line per event, 2 details.
        Raises InvalidArgument, Refused for a directory that is a file, and TypeError for unknown arguments.
        """
        refuse_unknown("CheckpointCallback", unknown, _KNOWN)
        self._directory = directory
        self._arguments: dict[str, Any] = {
            "monitor": Monitor.of(monitor), "every": every, "keep": keep, "snapshot": snapshot, "memory_every": memory_every,
            "staging_bytes": staging_bytes, "on_error": on_error, "verbose": verbose,
        }  # fmt: skip
        self._checkpointer = Checkpointer(directory, **self._arguments)  # made now, so that it complains now
        self._trainer: Any = None
        self._loop: loops.Loop | None = None
        self._begin_at: Checkpoint | None = None
        self._saved: dict[str, Any] | None = None  # what the loop is told before anything can be restored
        self._first_place = (0, 0)
        self._first_step = 0
        self._epoch_is_over = self._is_finished = False
        self._measured_at = -1
        self._unrecorded: set[str] = set()

    @property
    def run(self) -> Run:
        """The run as a reader sees it, with `run.best`, `run.history` and the rest."""
        return self._checkpointer.run

    @property
    def best(self) -> Checkpoint | None:
        """The best checkpoint that is committed now."""
        return self._checkpointer.best

    def restore(self, reference: str = "best") -> Checkpoint:
        """Put the weights of a checkpoint into the Trainer's model; nothing else is changed.

        Raises InvalidState before there is a Trainer, CheckpointNotFound, Mismatch, Damaged.
        """
        checkpoint = self.run.checkpoint(reference)
        checkpoint.restore(model=self._attached().model)
        return checkpoint

    def attach(self, trainer: Any) -> None:
        """Let `trainer.train()` begin where this run is; only needed after `trainer.add_callback(…)`.

        Where a training begins is fixed before the first callback is called, so two methods of this one Trainer are wrapped:
        the one that runs the loop and the one that says where it begins. Raises Refused for a Trainer of several processes,
        InvalidArgument for settings that cannot work.
        """
        if self._trainer is trainer:
            return
        args = trainer.args
        others = [each for each in trainer.callback_handler.callbacks if isinstance(each, CheckpointCallback)]
        trainers.check(trainer, sum(each is not self for each in others))
        if self._arguments["monitor"] is None:
            self._arguments["monitor"] = trainers.monitor_of(args)
        self._checkpointer = Checkpointer(self._directory, **self._arguments)
        self._trainer = trainer
        for name, wrapper in ((trainers.LOOP, self._train), (trainers.PLACE, self._place)):
            original = getattr(trainer, name)
            setattr(trainer, name, functools.wraps(original)(functools.partial(wrapper, original)))
        if str(getattr(args.save_strategy, "value", args.save_strategy)) != "no":
            self._say(
                "Trainer saves checkpoints of its own as well; save_strategy='no' leaves saving to highcamp", level=2
            )

    # ------------------------------------------------------------------------------------------------- in the Trainer

    def _train(self, original: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        """In the place of the method that runs the loop."""
        trainer = self._trainer
        if keywords.get("trial") is not None or trainer.hp_search_backend is not None:
            raise Refused(
                f"{self.run.path}: a search over hyper-parameters trains many models, a run is one training",
                path=self.run.path,
                hint="search without CheckpointCallback, then train the best setting with it",
            )
        given = keywords.get("resume_from_checkpoint")
        self._begin_at, self._saved = self._newest()
        if given is not None and self._begin_at is not None:
            raise InvalidArgument(
                f"train(resume_from_checkpoint={given!r}): the run in {self.run.path} goes on from {self._begin_at.name}",
                hint="call train() alone, or use another directory",
            )
        while True:
            self._checkpointer = Checkpointer(self._directory, **self._arguments)
            self._checkpointer.voice.write = _write_line
            self._epoch_is_over = self._is_finished = False
            self._measured_at = -1
            if self._begin_at is not None:
                # Trainer passes over batches only if it is given a place. It finds none of its own files there.
                keywords["resume_from_checkpoint"] = self._begin_at.path
            try:
                with self._checkpointer:
                    try:
                        return original(*args, **keywords)
                    except _BeginAgainError as error:
                        self._begin_at, self._saved = error.checkpoint, loops.read(error.checkpoint)
            finally:
                self._loop = None

    def _newest(self) -> tuple[Checkpoint | None, dict[str, Any] | None]:
        """The newest checkpoint whose loop can be read; whether all of it is whole is seen when it is restored."""
        for checkpoint in reversed(self.run.checkpoints):
            try:
                return checkpoint, loops.read(checkpoint)
            except (Damaged, CheckpointNotFound):
                continue  # the restore says which, and why
        return None, None

    def _place(self, original: Callable[..., Any], *args: Any, **keywords: Any) -> tuple[int, int]:
        """In the place of the method that sets up TrainerState, and returns epochs done and batches to pass over."""
        first: tuple[int, int] = original(*args, **keywords)
        self._first_place = first
        if self._begin_at is None or self._saved is None:
            return first
        state = self._trainer.state
        loops.put_state(state, self._saved)
        if loops.is_complete(state, self._saved, self._begin_at.epoch):
            return sys.maxsize, 0  # no epoch begins: Trainer would train one more step
        return self._begin_at.epoch, self._begin_at.batch

    # ------------------------------------------------------------------------------------------------- Trainer's hooks

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The Trainer is made; it tells its callbacks nothing of itself."""
        del args, state, control
        trainer = trainers.calling(self)
        if trainer is not None:
            self.attach(trainer)

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Restore the newest whole checkpoint."""
        del args, control
        trainer, checkpointer = self._attached(), self._checkpointer
        self._loop = loops.Loop(trainer, self, objects["train_dataloader"], checkpointer.progress)
        tracked = {
            loops.LOOP: self._loop,
            "model": trainer.model,
            "optimizer": getattr(trainer.optimizer, "optimizer", trainer.optimizer),  # accelerate wraps it
            "scheduler": trainer.lr_scheduler,
            "scaler": getattr(trainer.accelerator, "scaler", None),
        }
        checkpointer.track(**{name: each for name, each in tracked.items() if each is not None})
        begin_at, saved = self._begin_at, self._saved
        if begin_at is not None and saved is not None:
            self._loop.compare(saved, begin_at.path)  # the restore compares the rest, also before it changes anything
        is_complete = begin_at is not None and saved is not None and loops.is_complete(state, saved, begin_at.epoch)
        planned = loops.epochs_planned(state)
        found = checkpointer.start(epochs_planned=max(begin_at.epoch, 1) if is_complete and begin_at else planned)
        if found is not None and (begin_at is None or found.name != begin_at.name):
            raise _BeginAgainError(found)
        self._loop.begin()
        self._first_step = state.global_step
        if found is None and state.global_step:  # train(resume_from_checkpoint=…) of a checkpoint of Trainer's own
            checkpointer.progress.move(state.global_step, self._first_place[0])
            checkpointer.progress.batch = self._first_place[1]
        if is_complete:
            self._say(f"Run is complete (step {state.global_step} of {state.max_steps}); nothing to train")

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An epoch begins: the one before is over, its logs and evaluation included."""
        del args, state, control
        checkpointer, loop = self._checkpointer, self._loop
        if loop is None:
            return
        self._end_epoch()
        batch = checkpointer.progress.batch
        checkpointer.begin_epoch()
        checkpointer.progress.hand_over()  # Trainer passes over the batches, not `batches`
        if self._first_step == checkpointer.step:
            checkpointer.progress.batch = batch
        loop.begin_epoch()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A step begins: the one before is over, its logs and evaluation included. Save if that is due."""
        del args, state, control
        checkpointer, loop = self._checkpointer, self._loop
        if loop is None:
            return
        if loop.restored is not None:
            loop.apply()
        elif checkpointer.progress.batch:
            checkpointer.end_step(0)
        checkpointer.progress.next_batch()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An optimizer step is done."""
        del control
        loop, progress = self._loop, self._checkpointer.progress
        if loop is None:
            return
        count = args.gradient_accumulation_steps
        progress.step, progress.batch, progress.is_counted = state.global_step, progress.batch + count, True
        if loop.length is not None and progress.batch >= loop.length:
            progress.batch = loop.length
            progress.is_iterating = False  # what is measured now belongs to the end of the epoch
        loop.end_step(count)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The batches of an epoch are done, or training stops in its middle."""
        del args, state
        loop, progress = self._loop, self._checkpointer.progress
        if loop is None:
            return
        ran_out = progress.batch >= loop.length if loop.length is not None else not control.should_training_stop
        self._epoch_is_over = ran_out or (control.should_epoch_stop and not control.should_training_stop)
        if self._epoch_is_over:
            progress.is_iterating = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Record the metrics for the step they were measured at."""
        del args, control
        loop = self._loop
        if loop is None or logs is None:
            return
        if loops.is_summary(logs):  # before Trainer puts its own best weights in the place of the last
            loops.correct_speed([logs, state.log_history[-1]], self._trainer, self._first_step)
            self._finish(state)
        elif (
            loop.restored is None
        ):  # an evaluation before the place is reached again was recorded by whom it is repeated for
            numbers_found = self._numbers(logs)
            self._checkpointer.log(numbers_found, step=state.global_step)
            loop.note_logged()
            monitor = self._arguments["monitor"]
            if monitor is not None and monitor.metric in numbers_found:
                self._measured_at = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Training is done: everything is durable when this returns."""
        del args, control
        if self._loop is not None and not self._is_finished:
            self._finish(state)

    # ------------------------------------------------------------------------------------------------- small matters

    def _end_epoch(self) -> None:
        """Count the epoch that is over; saves if due."""
        if not self._epoch_is_over:
            return
        self._epoch_is_over = False
        checkpointer, progress = self._checkpointer, self._checkpointer.progress
        if self._measured_at not in (-1, progress.step):  # within the epoch, which says nothing of its end
            progress.end_epoch(self.run.path)
            checkpointer.end_step(0)
        else:
            checkpointer.end_epoch()
        self._measured_at = -1

    def _finish(self, state: Any) -> None:
        loop = self._loop
        if loop is not None:
            loop.ended_at = state.max_steps
            self._end_epoch()
            self._checkpointer.start(epochs_planned=max(self._checkpointer.epoch, 1))  # as many as there will be
            self._checkpointer.finish()
            self._is_finished = True

    def _numbers(self, logs: Mapping[str, Any]) -> dict[str, Any]:
        """What of Trainer's logs is a metric; of what is no number only the monitored one is an error, the rest is named once."""
        found: dict[str, Any] = {}
        monitor = self._arguments["monitor"]
        for name, value in logs.items():
            if name == "epoch" or name.endswith(_SPEEDS):
                continue
            is_number = isinstance(value, numbers.Real) or getattr(value, "shape", None) == ()
            if is_number or (monitor is not None and name == monitor.metric):
                found[name] = value
            elif name not in self._unrecorded:
                self._unrecorded.add(name)
                warnings.warn(f"{name} is a {type(value).__name__}, not a number: it is not recorded", stacklevel=2)
        return found

    def _attached(self) -> Any:
        if self._trainer is None:
            raise InvalidState(
                "CheckpointCallback does not know its Trainer, so training could not go on after a restart",
                hint="give it to Trainer(callbacks=[…]), or call callback.attach(trainer) before train()",
            )
        return self._trainer

    def _say(self, line: str, level: int = 1) -> None:
        self._checkpointer.voice.say(line, level=level)


def _write_line(line: str) -> None:
    """Above the progress bar, if there is one."""
    tqdm.write(line, file=sys.stderr)

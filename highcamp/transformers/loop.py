"""The loop's own state: what belongs to a Trainer rather than to its model, optimizer or scheduler."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from highcamp.errors import Damaged, Mismatch
from highcamp.run import live
from highcamp.training.rng import random_state, set_random_state
from highcamp.transformers.ahead import Ahead

if TYPE_CHECKING:
    from highcamp.run.checkpoint import Checkpoint
    from highcamp.training.progress import Progress

LOOP = "trainer"
"""The object that holds all this in a checkpoint."""

_SUMMARY = "train_runtime"  # Trainer's last log of a training has it, and no other
# What TrainerState counts and finds out; its other fields are settings, and follow TrainingArguments.
_COUNTED: dict[str, tuple[type, ...]] = {
    "epoch": (int, float), "global_step": (int,), "num_input_tokens_seen": (int,), "total_flos": (int, float),
    "best_metric": (object,), "best_global_step": (int, type(None)),
    "best_model_checkpoint": (str, type(None)),
}  # fmt: skip
_PARTS: dict[str, tuple[type, ...]] = {
    "facts": (dict,), "state": (dict,), "log_history": (list,), "running": (dict,), "callbacks": (dict,),
    "ended_at": (int, type(None)), "order": (dict,), "began": (dict, type(None)), "ahead": (list, type(None)),
}  # fmt: skip


def is_summary(logs: dict[str, Any]) -> bool:
    """Whether these are the logs that end a training."""
    return _SUMMARY in logs


class Loop:
    """TrainerState, the running loss, the other callbacks, and the place in the data; tracked as "trainer".

    length: batches in an epoch, None if nobody knows. restored: what was restored and is not applied yet. ended_at: the
    `max_steps` of a training that has come to its end, early or not.
    """

    def __init__(self, trainer: Any, owner: object, loader: Any, progress: Progress) -> None:
        """Nothing is captured yet. owner: our own callback. loader: the Trainer's; its collator is replaced."""
        self.ended_at: int | None = None
        self.restored: dict[str, Any] | None = None
        self.length = _length(loader)
        self._trainer, self._owner, self._progress = trainer, owner, progress
        self._loader = getattr(loader, "base_dataloader", loader)  # accelerate's wraps torch's
        self._ahead = Ahead(self._loader)
        self._began: dict[str, Any] | None = None
        self._random: dict[str, Any] = {}
        self._total_loss = 0.0  # as of the last log; at its end Trainer adds what is not logged yet

    # What is saved

    def state_dict(self) -> dict[str, Any]:
        """Everything, as a tree."""
        trainer, state = self._trainer, self._trainer.state
        is_midway = self._progress.batch > 0
        return {
            "facts": self._facts(),
            "state": {name: getattr(state, name) for name in _COUNTED},
            "log_history": [row for row in state.log_history if not is_summary(row)],
            "running": {
                "loss": trainer._tr_loss,  # noqa: SLF001  (Trainer shows it to nobody)
                "total_loss": self._total_loss,
                "logged_at": trainer._globalstep_last_logged,  # noqa: SLF001
                "first_step": trainer._initial_global_step,  # noqa: SLF001
                "flos": trainer.current_flos,
            },
            "callbacks": {name: _callback_state(callback) for name, callback in self._siblings().items()},
            "ended_at": self.ended_at,
            "order": live.loader_position(self._loader) or {},
            "began": self._began if is_midway else None,
            "ahead": self._ahead.tree() if is_midway else None,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Keep what was saved for `apply`."""
        check(saved, "the checkpoint")
        gone = sorted(saved["callbacks"].keys() - self._siblings().keys())
        if gone:
            warnings.warn(
                f"the checkpoint holds the state of {', '.join(gone)}, which is not among the callbacks now",
                stacklevel=2,
            )
        self.restored = saved

    def compare(self, saved: dict[str, Any], where: str) -> None:
        """Whether the Trainer has been given the same as when it was saved. Raises Mismatch listing every difference."""
        here, there = self._facts(), saved["facts"]
        lines = [
            f"{name}: {there.get(name)} in the checkpoint, {here.get(name)} here"
            for name in dict.fromkeys([*here, *there])
            if here.get(name) != there.get(name)
        ]
        if lines:
            raise Mismatch(
                f"{where} is of another training ({len(lines)} differences, nothing was changed):"
                + "".join(f"\n  {line}" for line in lines)
                + "\n",
                path=where,
                hint="train with the same data and settings, or use another directory",
            )

    # Where the loop is

    def begin(self) -> None:
        """Training begins; what was tracked has been restored, and with it the random states."""
        self._random = random_state()
        if self.restored is not None:
            self._put_running(self.restored)
            self._put_siblings(self.restored)  # now, for a complete run; otherwise again when the place is reached
        self.note_logged()

    def note_logged(self) -> None:
        """Trainer has logged, and added up the losses until here."""
        self._total_loss = self._trainer._total_loss_scalar  # noqa: SLF001

    def begin_epoch(self) -> None:
        """An epoch begins; one that was left in its middle begins once more as it did then."""
        saved = self.restored
        if saved is not None and saved["began"] is not None:
            self._set_order(saved["began"]["order"])
            set_random_state(saved["began"]["random"], where="the checkpoint")
            self._ahead.begin(saved["ahead"], to_drop=self._progress.batch if _has_no_indices(self._loader) else 0)
        else:
            if saved is not None:
                self.apply()
            self._ahead.begin()
        self._began = {"random": random_state(), "order": live.loader_position(self._loader) or {}}

    def end_step(self, batches: int) -> None:
        """A step is done."""
        self._ahead.trained(batches)

    def apply(self) -> None:
        """Put everything back; the loop is at the very place where it was captured."""
        saved, trainer = self.restored, self._trainer
        if saved is None:
            return
        self.restored = None
        put_state(trainer.state, saved)
        self._put_running(saved)
        self._put_siblings(saved)
        self._set_order(saved["order"])
        set_random_state(self._random, where="the checkpoint")

    def _put_siblings(self, saved: dict[str, Any]) -> None:
        for name, callback in self._siblings().items():
            if name in saved["callbacks"]:
                _set_callback_state(callback, saved["callbacks"][name])

    def _put_running(self, saved: dict[str, Any]) -> None:
        """The losses that have not been logged yet, and what else the Trainer adds up."""
        trainer, running = self._trainer, saved["running"]
        trainer._tr_loss.copy_(running["loss"])  # noqa: SLF001
        trainer._total_loss_scalar = running["total_loss"]  # noqa: SLF001
        trainer._globalstep_last_logged = running["logged_at"]  # noqa: SLF001
        trainer._initial_global_step = running["first_step"]  # noqa: SLF001
        trainer.current_flos = running["flos"]

    def _set_order(self, saved: dict[str, Any]) -> None:
        """The generators of the loader and its samplers. accelerate makes that of a seedable sampler when it is first used."""
        now: Any = live.loader_position(self._loader)
        if now is None or not saved:
            return
        generators = {name: saved["generators"].get(name, state) for name, state in now["generators"].items()}
        live.framework("torch").restore(self._loader, {**saved, "generators": generators, "loader": None})

    def _facts(self) -> dict[str, Any]:
        """What must be the same for the state to mean the same."""
        trainer, args = self._trainer, self._trainer.args
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        return {
            "model": type(trainer.model).__name__,
            "optimizer": type(optimizer).__name__,
            "scheduler": type(trainer.lr_scheduler).__name__,
            "training examples": _length(trainer.train_dataset),
            "batches in an epoch": self.length,
            "batch size": trainer.state.train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "seed": args.seed,
            "data_seed": args.data_seed,
        }

    def _siblings(self) -> dict[str, Any]:
        """The other callbacks that have a state, by names that the same script gives again."""
        named: dict[str, Any] = {}
        for callback in self._trainer.callback_handler.callbacks:
            if callback is self._owner or not (_is_exportable(callback) or _is_stateful(callback)):
                continue
            kind = name = type(callback).__name__
            count = 1
            while name in named:
                count += 1
                name = f"{kind}~{count}"
            named[name] = callback
        return named


def read(checkpoint: Checkpoint) -> dict[str, Any]:
    """The loop's state in a checkpoint, with NumPy arrays as tensors. Raises Damaged, CheckpointNotFound."""
    saved = checkpoint.state(LOOP)
    check(saved, checkpoint.path)
    return saved  # type: ignore[no-any-return]


def check(saved: Any, where: str) -> None:
    """Whether a saved state is one. Raises Damaged."""
    if not _fits(saved, _PARTS) or not _fits(saved["state"], _COUNTED):
        raise Damaged(f"{where}: its {LOOP} is malformed", path=where)


def _fits(tree: Any, kinds: dict[str, tuple[type, ...]]) -> bool:
    return isinstance(tree, dict) and all(name in tree and isinstance(tree[name], kind) for name, kind in kinds.items())


def put_state(state: Any, saved: dict[str, Any]) -> None:
    """What a TrainerState has counted, back into it."""
    for name in _COUNTED:
        setattr(state, name, saved["state"][name])
    best = state.best_model_checkpoint
    if best is not None and not Path(best).is_dir():
        state.best_model_checkpoint = None  # as Trainer has it: a directory of its own that is gone
    state.log_history = [dict(row) for row in saved["log_history"]]


def is_complete(state: Any, saved: dict[str, Any], epoch: int) -> bool:
    """Whether nothing is left to train; a training that was stopped early goes on only if it is to be longer now."""
    is_done = state.global_step >= state.max_steps or epoch >= state.num_train_epochs
    return is_done or (saved["ended_at"] is not None and state.max_steps <= saved["ended_at"])


def epochs_planned(state: Any) -> int | None:
    """How many epochs there will be; None where only steps are counted, in data without a length."""
    return None if state.num_train_epochs == sys.maxsize else max(1, int(state.num_train_epochs))


def correct_speed(rows: list[dict[str, Any]], trainer: Any, first_step: int) -> None:
    """The loss of a summary is that of all steps; its speeds are to be those of the steps from `first_step` on."""
    state = trainer.state
    steps = state.global_step - trainer._initial_global_step  # noqa: SLF001
    share = (state.global_step - first_step) / steps if steps else 0.0
    for row in rows:
        for name in ("train_samples_per_second", "train_steps_per_second"):
            if name in row:
                row[name] = round(row[name] * share, 3)


def _is_exportable(callback: Any) -> bool:
    return callable(getattr(callback, "state", None))


def _is_stateful(callback: Any) -> bool:
    return callable(getattr(callback, "state_dict", None)) and callable(getattr(callback, "load_state_dict", None))


def _callback_state(callback: Any) -> Any:
    """What a callback remembers: by its own `state_dict`, else the attributes of an ExportableState."""
    return callback.state_dict() if _is_stateful(callback) else dict(callback.state()["attributes"])


def _set_callback_state(callback: Any, saved: Any) -> None:
    if _is_stateful(callback):
        callback.load_state_dict(saved)
        return
    for name in callback.state()["attributes"]:  # never a name that only the file knows
        if name in saved:
            setattr(callback, name, saved[name])


def _has_no_indices(loader: Any) -> bool:
    """Whether accelerate passes over batches by reading them."""
    return any(kind.__name__ == "IterableDataset" for kind in type(loader.dataset).__mro__)


def _length(sized: Any) -> int | None:
    """Its length, None for an iterable without one."""
    try:
        return len(sized)
    except TypeError:
        return None

"""Going on in the middle of an epoch: the batches that are done are read, or stood in for, but not trained on again.

`fit` cannot be told to begin at a batch. It asks `model.train_function` to train on each; for those that are done this
gives it a function that takes the batch and leaves the model alone. So `fit` counts, draws and shuffles as it would have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from highcamp.keras import state
from highcamp.keras.state import assign
from highcamp.training.rng import set_random_state

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Midway:
    """What a checkpoint taken within an epoch says of it: random states before the epoch, metrics, last logs."""

    def __init__(self, saved: Mapping[str, Any], position: int, now: Any, *, where: str) -> None:
        """saved: what `capture` gave. position: batches done. now: the random states of the save. where: for errors."""
        self._saved = saved
        self.position = position
        self._now = now
        self._where = where
        self._give_back: Callable[[], None] | None = None

    @property
    def before(self) -> Any:
        """The random states as the epoch began."""
        return self._saved["before"]

    @staticmethod
    def capture(model: Any, before: Any, logs: Mapping[str, Any], *, is_at_rest: bool = False) -> dict[str, Any]:
        """What is saved within an epoch. before: the random states as it began.

        is_at_rest: its batches are done, and what an evaluation changes is part of it: the seeds of layers that draw.
        """
        rest = None
        if is_at_rest:
            random = state.random_state()
            if random["generator"] is not None:
                random["generator"] = _copy(random["generator"])
            rest = {"seeds": [_copy(variable) for variable in _seeds(model)], "random": random}
        return {
            "before": before,
            "metrics": [_copy(variable) for variable in model.metrics_variables],
            "logs": {name: value for name, value in logs.items() if isinstance(value, int | float)},
            "is_stopped": bool(model.stop_training),
            "rest": rest,
        }

    def begin(self, model: Any, finish: Callable[[], None]) -> None:
        """In `on_epoch_begin`: set the stage as it was when the epoch began, and pass over what is done.

        finish: called once, right before the first batch that is trained on, or by `end`.
        """
        set_random_state(self._saved["before"], where=self._where)
        self._restore_metrics(model)
        trained = model.train_function
        backend = keras.backend.backend()
        steps = max(1, int(getattr(model, "steps_per_execution", 1) or 1))
        left = self.position

        def give_back() -> None:
            model.train_function = trained
            rest = self._saved["rest"]
            if rest is not None:
                for variable, value in zip(_seeds(model), rest["seeds"], strict=True):
                    assign(variable, np.asarray(value), variable.path)
                state.set_random_state(rest["random"])
                set_random_state(self._now, where=self._where)
            finish()

        def pass_over(*arguments: Any) -> Any:
            nonlocal left
            if left <= 0:
                self.end()
                return trained(*arguments)
            taken = _take(arguments[-1], min(steps, left)) if backend != "torch" else None
            if backend == "tensorflow" and left == self.position:
                self._build_metrics(model, taken)  # not later: a callback may end the epoch here as well
            left -= steps
            if left <= 0:
                # Before the next batch is read: reading it may draw numbers, and did so after the save.
                set_random_state(self._now, where=self._where)
                model.stop_training = self._saved["is_stopped"]  # a callback has ended the epoch with this batch
            logs = dict(self._saved["logs"])
            return (logs, arguments[0]) if backend == "jax" else logs

        self._give_back = give_back
        model.train_function = pass_over

    def end(self) -> None:
        """Everything is passed over: from here on it is trained, or evaluated. Twice is once."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()

    def _restore_metrics(self, model: Any) -> bool:
        """The means of the epoch so far. False if the metrics are not made yet, as on TensorFlow before a first batch."""
        saved, variables = self._saved["metrics"], list(model.metrics_variables)
        if len(saved) != len(variables):
            return False
        for variable, value in zip(variables, saved, strict=True):
            assign(variable, np.asarray(value), variable.path)
        return True

    def _build_metrics(self, model: Any, batch: Any) -> None:
        if not self._restore_metrics(model):
            model._symbolic_build(data_batch=batch)  # noqa: SLF001  (what fit does on the other backends)
            self._restore_metrics(model)


def _take(iterator: Any, count: int) -> Any:
    """Read `count` batches; the last of them. StopIteration is fit's to handle, as it would be in training."""
    batch = None
    for _ in range(count):
        batch = next(iterator)
    return batch


def _seeds(model: Any) -> list[Any]:
    """The states of the model's random generators: variables that are no weights."""
    weights = {id(variable) for variable in model.weights}
    return [variable for variable in model.variables if id(variable) not in weights]


def _copy(variable: Any) -> np.ndarray[Any, Any]:
    return np.array(keras.ops.convert_to_numpy(variable))

"""Going on in the middle of an epoch: the batches that are done are read, or stood in for, but not trained on again.

`fit` cannot be told to begin at a batch. It asks `model.train_function` to train on each; for those that are done this
gives it a function that takes the batch and leaves the model alone. So `fit` counts, draws and shuffles as it would have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np

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

    @property
    def before(self) -> Any:
        """The random states as the epoch began."""
        return self._saved["before"]

    @staticmethod
    def capture(model: Any, before: Any, logs: Mapping[str, Any]) -> dict[str, Any]:
        """What is saved within an epoch. before: the random states as it began."""
        return {
            "before": before,
            "metrics": [np.array(keras.ops.convert_to_numpy(variable)) for variable in model.metrics_variables],
            "logs": {name: value for name, value in logs.items() if isinstance(value, int | float)},
        }

    def begin(self, model: Any, finish: Callable[[], None]) -> None:
        """In `on_epoch_begin`: set the stage as it was when the epoch began, and pass over what is done.

        finish: called once, right before the first batch that is trained on.
        """
        set_random_state(self._saved["before"], where=self._where)
        self._restore_metrics(model)
        trained = model.train_function
        backend = keras.backend.backend()
        steps = max(1, int(getattr(model, "steps_per_execution", 1) or 1))
        left = self.position

        def pass_over(*arguments: Any) -> Any:
            nonlocal left
            if left <= 0:
                model.train_function = trained
                finish()
                return trained(*arguments)
            taken = _take(arguments[-1], min(steps, left)) if backend != "torch" else None
            left -= steps
            if left <= 0:
                if backend == "tensorflow":
                    self._build_metrics(model, taken)
                # Before the next batch is read: reading it may draw numbers, and did so after the save.
                set_random_state(self._now, where=self._where)
            logs = dict(self._saved["logs"])
            return (logs, arguments[0]) if backend == "jax" else logs

        model.train_function = pass_over

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

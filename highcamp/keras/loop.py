"""The loop: what belongs to `fit` rather than to an object, as it is saved: the epoch under way, random state, data order."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

import keras

from highcamp.errors import Mismatch
from highcamp.keras import state
from highcamp.keras.midway import Midway
from highcamp.keras.numbers import as_number
from highcamp.training.rng import random_state

if TYPE_CHECKING:
    from collections.abc import Mapping

    from highcamp.keras.dataset import EpochDataset


class Owner(Protocol):
    """Who has the model. On JAX it is asked for only when something is saved: each time costs."""

    @property
    def model(self) -> Any:
        """The model that `fit` trains, its values brought back."""


class Loop:
    """Where `fit` is; tracked as "keras".

    batch: batches done in the epoch under way. restored: what was restored, {} on a fresh start. is_under_way: an epoch is.
    is_resting: its batches are done, and what an evaluation changes has been set aside. length_change: in words, that an
    epoch has another number of batches now; "" if it has not.
    """

    def __init__(self, owner: Owner, data: EpochDataset | None, epochs: int, steps: int | None) -> None:
        """Nothing is under way. epochs: how many are planned. steps: batches in an epoch, None if nobody knows yet."""
        self.batch = 0
        self.restored: dict[str, Any] = {}
        self.is_under_way = self.is_resting = False
        self._owner, self._data, self._epochs = owner, data, epochs
        self._before: Any = None
        self._logs: Mapping[str, Any] = {}
        self._first_batch = self._iterations = 0
        self._steps = steps
        self.length_change = ""
        self._at_rest: dict[str, Any] | None = None

    def begin_epoch(self, model: Any, midway: Midway | None) -> None:
        """An epoch begins, or goes on in its middle."""
        self.batch = self._first_batch = midway.position if midway is not None else 0
        self._logs, self._at_rest = {}, None
        self.is_under_way, self.is_resting = True, False
        self._iterations = _iterations(model)
        self._before = midway.before if midway is not None else random_state()

    def count(self, batch: int, logs: Mapping[str, Any] | None) -> tuple[int, bool]:
        """`batch`, from 0, is the last one that is done. How many have been done since, and whether it ends the epoch."""
        # With several steps per execution Keras names the last batch there would be, even where the data end before.
        done = batch + 1 if self._steps is None else min(batch + 1, self._steps)
        count, self.batch, self._logs = done - self.batch, done, logs or {}
        return count, done == self._steps

    def count_rest(self, model: Any) -> int:
        """The batches of the epoch are done: how many of them nobody has counted."""
        if self.batch > self._first_batch:
            return 0
        count = max(0, _iterations(model) - self._iterations)
        self.batch += count
        return count

    def rest(self, model: Any) -> None:
        """An evaluation begins: set aside what it changes, so that a save in its middle holds what was before."""
        # An epoch that a callback has cut short may have told no logs; those of a usual model are its metrics.
        logs = self._logs or {name: as_number(value) for name, value in model.get_metrics_result().items()}
        self._at_rest = Midway.capture(model, self._before, logs, is_at_rest=True)
        self.is_resting = True

    def end_epoch(self) -> None:
        """Nothing of the epoch is left to save."""
        self.batch, self._before, self._logs, self._at_rest = 0, None, {}, None
        self.is_under_way = self.is_resting = False

    def state_dict(self) -> dict[str, Any]:
        """Everything, as a tree."""
        midway, random = self._at_rest, None
        if midway is not None:
            random = midway["rest"]["random"]
        elif self.batch:
            midway = Midway.capture(self._owner.model, self._before, self._logs)
        return {
            "backend": keras.backend.backend(),
            "epochs": self._epochs,
            "steps": self._steps,
            "random": random or state.random_state(),
            "data": None if self._data is None else self._data.state_dict(),
            "midway": midway,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Keep what was saved; the data are compared. Raises Mismatch.

        It is restored first, so that nothing has been changed then.
        """
        before = saved["steps"]
        if None not in (before, self._steps) and before != self._steps:
            self.length_change = f"the run was saved with {before} batches in an epoch, here are {self._steps}"
            if saved["midway"] is not None:
                hint = "use the same data and batch size as when it was saved, or another directory"
                raise Mismatch(self.length_change, hint=hint)
        if self._data is not None and saved["data"] is not None:
            self._data.load_state_dict(saved["data"])
        self.restored = saved


def last_execution(model: Any, steps: int | None) -> float:
    """The batch with which the last call of an epoch begins, or one before it; 0 where that cannot be told."""
    size = getattr(model, "steps_per_execution", 1)
    return max(0, steps - size) if steps is not None and isinstance(size, int) else 0


NEVER = math.inf
"""No batch has such a number."""


def _iterations(model: Any) -> int:
    """Batches the optimizer has seen: steps, or parts of them while gradients are accumulated. 0 without an optimizer."""
    optimizer = model.optimizer
    counter = getattr(optimizer, "_iterations", None)
    if counter is None or optimizer is None:
        return 0
    return int(keras.ops.convert_to_numpy(getattr(optimizer, "inner_optimizer", optimizer)._iterations))  # noqa: SLF001

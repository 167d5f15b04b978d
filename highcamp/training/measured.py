"""Measured: what has been logged of the step under way, and where metrics that are logged belong."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from highcamp.training.progress import Progress


class Measured:
    """The metrics of one step, and which epoch has ended with which step.

    is_empty: nothing has been logged yet.
    """

    def __init__(self, progress: Progress) -> None:
        """Nothing is measured yet."""
        self._progress = progress
        self._step, self._values = -1, dict[str, float]()
        self._ended: dict[int, int] = {}

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been logged at the step under way, ever."""
        return self._step < 0

    def at(self, step: int) -> dict[str, float]:
        """What has been logged at `step`, if it is the last one of which anything was."""
        return self._values if self._step == step else {}

    def place(self, step: int | None, epoch: int | None) -> tuple[int, int, int]:
        """Where metrics belong: (step, epoch, batch). step, epoch: as the caller says; None for now."""
        progress = self._progress
        now = progress.boundary_step
        step = now if step is None else step
        batch = progress.boundary_batch if step == now else 0
        if epoch is None:
            epoch = progress.boundary_epoch if step == now else self._ended.get(step, progress.epoch)
        return step, epoch, batch

    def add(self, step: int, values: Mapping[str, float]) -> bool:
        """Take in what is logged; whether it was measured now, and not at an earlier step."""
        if step != self._progress.boundary_step:
            return False
        self._step, self._values = step, {**self.at(step), **values}
        self._progress.is_logged = self._progress.at_boundary
        return True

    def end_epoch(self) -> None:
        """The epoch that has just ended did so with the step that is done."""
        self._ended[self._progress.step] = self._progress.epoch

"""The best so far: what the loop has seen of the monitored metric, rebuilt from the history after a restart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from highcamp.training import messages

if TYPE_CHECKING:
    from collections.abc import Mapping

    from highcamp.policy.monitor import Monitor
    from highcamp.run.history import History
    from highcamp.training.messages import Voice
    from highcamp.training.progress import Progress


@dataclass
class BestSoFar:
    """The best value of the monitored metric and the epoch it belongs to; a value that is not finite never counts.

    It words messages and counts epochs without improvement. Which checkpoint is best is asked of the run, never of this.
    """

    monitor: Monitor
    value: float | None = None
    epoch: int | None = None
    was_missing: bool = False

    def is_improved_by(self, metrics: Mapping[str, float]) -> bool:
        """Whether these metrics are better than the best so far; nothing is remembered."""
        value = self.monitor.value(metrics)
        return value is not None and (self.value is None or self.monitor.is_better(value, self.value))

    def not_saved(self, saved: float | None) -> str:
        """The line for a best value that is better than that of the best checkpoint; "" if it is not."""
        if self.value is None or not self.epoch or not (saved is None or self.monitor.is_better(self.value, saved)):
            return ""
        return messages.best_not_saved(self.epoch, self.monitor.metric, self.value)

    def replay(self, history: History, voice: Voice) -> None:
        """Go through the epochs of a history, as if they had been seen; says so if the metric is one of training data."""
        if messages.is_training_metric(self.monitor.metric):
            voice.say(messages.training_metric(self.monitor.metric))
        for row in history.epochs():
            if self.monitor.metric in row.metrics:
                self.see(row.epoch, row.metrics, None)

    def epochs_since(self, progress: Progress, metrics: Mapping[str, float]) -> int:
        """Epochs done since the best value. metrics: those of the epoch under way, which is done if they are its last."""
        done = progress.epoch
        if progress.is_logged and progress.at_boundary:  # done, but not ended yet
            if self.is_improved_by(metrics):
                return 0
            done += 1
        return max(0, done - (self.epoch or 0))

    def see(self, epoch: int, metrics: Mapping[str, float], saving: str | None) -> tuple[str, bool]:
        """Take in one epoch's metrics; returns the line to say ("" for none) and whether it is a warning.

        saving: the checkpoint that is about to be written, if one is.
        """
        metric = self.monitor.metric
        if metric not in metrics:
            said, self.was_missing = self.was_missing, True
            return ("" if said else messages.metric_missing(epoch, metric, metrics), True)
        value = metrics[metric]
        if not math.isfinite(value):
            return messages.not_finite(epoch, metric, value, self.epoch), True
        if self.value is None or self.monitor.is_better(value, self.value):
            line = messages.improved(epoch, metric, self.value, value, saving)
            self.value, self.epoch = value, epoch
            return line, False
        return messages.not_improved(epoch, metric, self.value, self.epoch or 0), False

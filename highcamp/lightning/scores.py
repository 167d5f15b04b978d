"""Scores: what loggers and user code ask of any checkpoint callback of Lightning, by the names of its ModelCheckpoint."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint

if TYPE_CHECKING:
    from highcamp.policy.monitor import Monitor
    from highcamp.run.checkpoint import Checkpoint
    from highcamp.run.run import Run
    from highcamp.training.checkpointer import Checkpointer


class ScoredCheckpoint(LightningCheckpoint):
    """A checkpoint callback over a run; each answer is what the run holds now, nothing is remembered.

    A Trainer that has one adds no ModelCheckpoint of its own. Paths are those of directories, which no logger uploads.
    """

    _checkpointer: Checkpointer
    _monitor: Monitor | None

    @property
    def run(self) -> Run:
        """The run as a reader sees it, with `run.best`, `run.history` and the rest."""
        return self._checkpointer.run

    @property
    def best(self) -> Checkpoint | None:
        """The best checkpoint that is committed now."""
        return self._checkpointer.best

    def restore(self, reference: str, model: torch.nn.Module) -> Checkpoint:
        """Put the weights of a checkpoint, such as "best", into a model; nothing else is changed.

        Raises CheckpointNotFound, Mismatch listing every difference, Damaged.
        """
        checkpoint = self.run.checkpoint(reference)
        checkpoint.restore(model=model)
        return checkpoint

    @property
    def monitor(self) -> str | None:
        """The name of the monitored metric."""
        return self._monitor.metric if self._monitor is not None else None

    @property
    def dirpath(self) -> str:
        """The directory of the checkpoints."""
        return os.path.join(self.run.path, "checkpoints")  # noqa: PTH118  (text, as Lightning's is)

    @property
    def best_model_path(self) -> str:
        """The directory of the best checkpoint, "" if there is none."""
        best = self.best
        return best.path if best is not None else ""

    @property
    def best_model_score(self) -> torch.Tensor | None:
        """The monitored value of the best checkpoint."""
        return self._score(self.best)

    @property
    def last_model_path(self) -> str:
        """The directory of the newest checkpoint, "" if there is none."""
        last = self.run.last
        return last.path if last is not None else ""

    @property
    def current_score(self) -> torch.Tensor | None:
        """The monitored value of the newest checkpoint, None if it was not measured there."""
        return self._score(self.run.last)

    @property
    def best_k_models(self) -> dict[str, torch.Tensor]:
        """The directory of each checkpoint that has a monitored value, and that value."""
        scores = {checkpoint.path: self._score(checkpoint) for checkpoint in self.run.checkpoints}
        return {path: score for path, score in scores.items() if score is not None}

    def _score(self, checkpoint: Checkpoint | None) -> torch.Tensor | None:
        if checkpoint is None or self.monitor not in checkpoint.metrics:
            return None
        return torch.tensor(checkpoint.metrics[self.monitor], dtype=torch.float64)

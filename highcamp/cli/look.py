"""One look at a run: everything a table says about it, read once, so that its rows agree with each other."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from highcamp.core.manifest import split_metrics
from highcamp.policy import retention
from highcamp.policy.candidate import Candidate
from highcamp.run import owner
from highcamp.run.candidates import candidate_of
from highcamp.run.history import format_time

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from highcamp.policy.monitor import Monitor
    from highcamp.run.checkpoint import Checkpoint
    from highcamp.run.history import History, Row
    from highcamp.run.run import Run
    from highcamp.run.verify import Verification

COMMITTED = "committed"
MIN_EPOCHS_FOR_NOISE = 6  # fewer differences say nothing about noise
ENDINGS = {"complete": "finished", "closed": "stopped", "error": "failed", "interrupted": "interrupted", None: "killed"}


@dataclass(frozen=True)
class Look:
    """A run as it was at one moment.

    checkpoints: in (step, sequence) order. checks: name -> names and sizes of its files compared. monitor: the run's own
    unless another one was asked for.
    """

    run: Run
    checkpoints: Sequence[Checkpoint]
    checks: Mapping[str, Verification]
    history: History
    monitor: Monitor | None
    pins: Mapping[str, str]
    at: datetime

    @cached_property
    def candidates(self) -> list[Candidate]:
        """The checkpoints as policies see them."""
        return [candidate_of(each) for each in self.checkpoints]

    @cached_property
    def ranked(self) -> list[Checkpoint]:
        """Those that have a finite value of the monitored metric, best first."""
        if self.monitor is None:
            return []
        by_name = {each.name: each for each in self.checkpoints}
        return [by_name[candidate.name] for candidate in self.monitor.rank(self.candidates)]

    @cached_property
    def best(self) -> Checkpoint | None:
        """The best-ranked one whose files are there in their full size."""
        return next((each for each in self.ranked if self.checks[each.name].is_whole), None)

    @cached_property
    def last(self) -> Checkpoint | None:
        """The newest one whose files are there in their full size, weights alone left aside."""
        resumable = [each for each in self.checkpoints if not each.manifest.is_weights_only]
        return next((each for each in reversed(resumable) if self.checks[each.name].is_whole), None)

    @cached_property
    def plan(self) -> retention.Plan:
        """What the run's own policy keeps, and why."""
        return retention.plan(
            self.run.keep,
            self.monitor,
            self.candidates,
            pins=self.pins,
            resumed_from=self.history.attempts[-1].resumed_from if self.history.attempts else None,
            damaged={name for name, check in self.checks.items() if not check.is_whole},
        )

    def reasons(self, name: str) -> list[str]:
        """Why a checkpoint is there, [] if the next save will remove it."""
        return list(self.plan.keep.get(name, ()))

    def state(self, name: str) -> str:
        """Either "committed", or what a look at the sizes found: missing, truncated, altered, foreign."""
        check = self.checks[name]
        return COMMITTED if check.ok else check.state

    def value(self, metrics: Mapping[str, float]) -> float | None:
        """The monitored value if it is finite."""
        return self.monitor.value(metrics) if self.monitor else None

    @cached_property
    def epochs(self) -> list[Row]:
        """One row per epoch, or one per step where a run has no epochs."""
        epochs = self.history.epochs()
        rows = self.history.rows
        if len(epochs) > 1 or len({row.step for row in rows}) <= 1:
            return epochs
        merged: dict[int, Row] = {}
        for row in rows:
            before = merged.get(row.step)
            values = {**before.metrics, **row.metrics} if before else row.metrics
            merged[row.step] = type(row)(row.attempt, row.step, row.epoch, values, row.at)
        return [merged[step] for step in sorted(merged)]

    @cached_property
    def best_row(self) -> Row | None:
        """The row of the history with the best monitored value, saved or not."""
        if self.monitor is None:
            return None
        rows = {str(n): row for n, row in enumerate(self.epochs)}
        found = self.monitor.best(
            Candidate(name, row.step, int(name), row.epoch, row.metrics) for name, row in rows.items()
        )
        return rows[found.name] if found else None

    @cached_property
    def noise(self) -> float | None:
        """The band within which two epochs cannot be told apart: twice a robust spread of the epoch-to-epoch differences.

        None if there are too few epochs. The spread is 1.4826 times the median absolute deviation, which for a normal
        distribution is its standard deviation. It changes words, never the rank.
        """
        values = [value for row in self.epochs if (value := self.value(row.metrics)) is not None]
        if len(values) < MIN_EPOCHS_FOR_NOISE:
            return None
        # The steep beginning is progress, not noise; the second half tells more.
        tail = values[len(values) // 2 :]
        steps = [after - before for before, after in itertools.pairwise(tail)]
        middle = statistics.median(steps)
        return 2 * 1.4826 * statistics.median(abs(step - middle) for step in steps)

    @property
    def name(self) -> str:
        """The run's own name: the last part of its path."""
        return self.run.path.rstrip("/").rpartition("/")[2] or self.run.path

    @property
    def epoch(self) -> int:
        """How many epochs are done."""
        rows = self.history.rows
        return max([row.epoch for row in rows] + [each.epoch for each in self.checkpoints], default=0)

    @cached_property
    def state_of_run(self) -> str:
        """running, finished, stopped, interrupted, failed, killed, or new."""
        if owner.current(self.run.store) is not None:
            return "running"
        planned = self.run.settings.epochs_planned
        if planned is not None and self.last is not None and self.last.epoch >= planned:
            return "finished"
        return ENDINGS.get(self.history.attempts[-1].ended, "stopped") if self.history.attempts else "new"

    def facts(self, entry: Checkpoint) -> dict[str, Any]:
        """A checkpoint as JSON."""
        return {
            "name": entry.name,
            "path": entry.path,
            "step": entry.step,
            "epoch": entry.epoch,
            "batch": entry.batch,
            "attempt": entry.attempt,
            "sequence": entry.sequence,
            **metric_facts(entry.metrics),
            "size_bytes": entry.size_bytes,
            "created_at": format_time(entry.created_at),
            "is_best": self.best is not None and entry.name == self.best.name,
            "is_last": self.last is not None and entry.name == self.last.name,
            "kept_because": self.reasons(entry.name),
            "state": self.state(entry.name),
            "weights_only": entry.manifest.is_weights_only,
            "healthy": entry.is_healthy,
        }


def look(run: Run, monitor: Monitor | None = None) -> Look:
    """Look at `run` now; monitor: rank by another metric than the run's own."""
    checkpoints = run.checkpoints
    return Look(
        run=run,
        checkpoints=checkpoints,
        checks={each.name: each.verify(quick=True) for each in checkpoints},
        history=run.history,
        monitor=monitor or run.monitor,
        pins=run.pins,
        at=datetime.now(UTC),
    )


def metric_facts(metrics: Mapping[str, float]) -> dict[str, Any]:
    """Metrics as JSON holds them: those that are not finite are null, and named beside."""
    finite, nonfinite = split_metrics(metrics)
    return {"metrics": finite, **({"nonfinite": nonfinite} if nonfinite else {})}


def number_facts(name: str, value: float | None) -> dict[str, Any]:
    """One number as JSON holds it."""
    if value is None or math.isfinite(value):
        return {name: value}
    return {name: None, "nonfinite": {name: str(value)}}


def monitor_facts(monitor: Monitor | None) -> dict[str, Any] | None:
    """A monitor as JSON."""
    if monitor is None:
        return None
    return {"metric": monitor.metric, "mode": monitor.mode, "min_delta": monitor.min_delta}


def ordered_metrics(look: Look) -> list[str]:
    """All metric names: the monitored one, its counterpart in training, then as they first appeared."""
    names = list(dict.fromkeys([*look.history.metrics, *(name for each in look.checkpoints for name in each.metrics)]))
    if look.monitor is None or look.monitor.metric not in names:
        return names
    watched = look.monitor.metric
    stem = watched.partition("_")[2] if watched.startswith(("val_", "eval_", "valid_", "test_")) else watched
    partners = [name for name in (stem, f"train_{stem}", f"val_{stem}") if name in names]
    return list(dict.fromkeys([watched, *partners, *names]))

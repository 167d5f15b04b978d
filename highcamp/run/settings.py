"""`run.json`: what a run is, and what it was last asked to do.

Its facts are hints for people and commands, but for the run id, which tells one run from another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

from highcamp.core import strict
from highcamp.core.manifest import FORMAT
from highcamp.errors import Damaged, InvalidArgument, Unreadable
from highcamp.policy.monitor import Monitor
from highcamp.policy.retention import Keep

if TYPE_CHECKING:
    from highcamp.storage.store import Store

RUN = "run.json"
MAX_RUN_BYTES = 1 << 20  # a page of facts


class MonitorFacts(msgspec.Struct, frozen=True):
    """A Monitor as JSON."""

    metric: str
    mode: Literal["auto", "min", "max"]
    min_delta: float = 0.0


class PaceFacts(msgspec.Struct, frozen=True, kw_only=True):
    """How often `Every.auto` saves, and why; times are seconds.

    overhead: the share of time that saving may cost. steps, seconds: from save to save. because: what decided, one of
    `highcamp.policy.pace.Because`. step_seconds, cost_seconds, durable_seconds, new_bytes: as measured, see
    `highcamp.policy.pace.Measured`. share: what saving has cost lately. expected_loss_seconds: what a crash costs on average.
    optimal_seconds: the interval of Young and Daly for failures that are failure_seconds apart.
    """

    overhead: float
    steps: int
    seconds: float
    because: str
    step_seconds: float
    cost_seconds: float
    durable_seconds: float
    new_bytes: int
    share: float | None = None
    expected_loss_seconds: float
    optimal_seconds: float
    failure_seconds: float


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The content of `run.json`.

    monitor, keep: as given to the last Checkpointer. every: its cadence, in words. pace: what `Every.auto` has chosen, None
    for another cadence. epochs_planned: the `n` of the last `epochs(n)`. tracked: the names of the tracked objects.
    """

    format: int = FORMAT
    run_id: str
    created_at: str
    monitor: MonitorFacts | None = None
    keep: dict[str, int | bool] = {}
    every: str = ""
    pace: PaceFacts | None = None
    epochs_planned: int | None = None
    tracked: tuple[str, ...] = ()

    def monitor_value(self) -> Monitor | None:
        """The recorded Monitor."""
        if self.monitor is None:
            return None
        return Monitor(self.monitor.metric, self.monitor.mode, min_delta=self.monitor.min_delta)

    def keep_value(self) -> Keep:
        """The recorded Keep."""
        return Keep(**self.keep)  # type: ignore[arg-type]  # its own checks tell a number from a flag


def monitor_facts(monitor: Monitor | None) -> MonitorFacts | None:
    """A Monitor as JSON."""
    return None if monitor is None else MonitorFacts(monitor.metric, monitor.mode, monitor.min_delta)


def keep_facts(keep: Keep) -> dict[str, int | bool]:
    """A Keep as JSON: quotas always, the rest where it is asked for."""
    facts = {"best": keep.best, "last": keep.last, "every_steps": keep.every_steps, "every_epochs": keep.every_epochs}
    found: dict[str, int | bool] = {name: count for name, count in facts.items() if count is not None}
    return {**found, "best_weights_only": True} if keep.best_weights_only else found


def read_settings(store: Store) -> Settings | None:
    """The run's settings, None if there is no `run.json`. Raises Damaged or Unreadable."""
    where = f"{store.url}/{RUN}"
    try:
        data = store.read(RUN, MAX_RUN_BYTES)
    except FileNotFoundError:
        return None
    document = strict.read(data, where=where, limit=MAX_RUN_BYTES)
    if isinstance(document, dict) and isinstance(document.get("format"), int) and document["format"] > FORMAT:
        raise Unreadable(
            f"{where} has format version {document['format']}, this highcamp reads up to {FORMAT}",
            path=where,
            hint="install a newer highcamp",
        )
    try:
        settings = msgspec.convert(document, Settings)
        settings.monitor_value()
        settings.keep_value()
    except (msgspec.ValidationError, InvalidArgument, KeyError, TypeError, ValueError) as error:
        raise Damaged(
            f"{where} is no run.json: {error}",
            path=where,
            hint="move it away: the run works from its checkpoints, and the next training writes a new one",
        ) from error
    return settings


def write_settings(store: Store, settings: Settings) -> None:
    """Replace `run.json` at once, durably."""
    store.replace(RUN, msgspec.json.format(msgspec.json.encode(settings), indent=2) + b"\n")

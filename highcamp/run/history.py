"""The history: every row of metrics logged, across the attempts of a run.

One file per attempt, `history/attempt-0001.jsonl`, appended by the one process of that attempt, an event per line:
`start` (where it resumed), `log` (a row of metrics), `end` (how it ended). A torn last line is ignored. After an append
has failed its file is not trusted again: the attempt goes on in `attempt-0001.2.jsonl`, beginning with every event that was
not yet durable; `row` tells events apart that stand in both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from highcamp.core.manifest import join_metrics, split_metrics

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from highcamp.storage.store import Store

DIRECTORY = "history"
MAX_HISTORY_BYTES = 1 << 30  # ten million rows; more is not a history but a mistake
_FILE = re.compile(r"attempt-(\d{4,9})(?:\.(\d{1,9}))?\.jsonl\Z")


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of a history file; which fields are used depends on `event`: start, log or end."""

    event: str
    at: str
    row: int = 0
    step: int = 0
    epoch: int = 0
    batch: int = 0
    metrics: dict[str, float | None] = {}
    nonfinite: dict[str, str] = {}
    resumed_from: str | None = None
    how: str | None = None
    host: str | None = None
    pid: int | None = None
    highcamp: str | None = None


@dataclass(frozen=True)
class Row:
    """Metrics logged at one step.

    batch: the batch of the epoch under way, 0 between epochs. `abandoned`: a later attempt resumed before this step, so the
    run went on without it.
    """

    attempt: int
    step: int
    epoch: int
    metrics: dict[str, float]
    at: datetime
    abandoned: bool = False
    batch: int = 0


@dataclass(frozen=True)
class Attempt:
    """One process's stretch of a run.

    resumed_from: the checkpoint it went on from, None for a fresh start; step, epoch, batch: where that was.
    ended: "complete", "closed", "error" or "interrupted"; None while it runs, or if it was killed.
    """

    number: int
    started_at: datetime
    resumed_from: str | None
    step: int
    epoch: int
    batch: int
    ended: str | None = None
    host: str | None = None
    pid: int | None = None


@dataclass(frozen=True)
class History:
    """Every row of metrics of a run.

    all_rows: as they were logged, those of abandoned stretches included. attempts: by number.
    """

    all_rows: tuple[Row, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    _by_place: dict[tuple[int, int], dict[str, float]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def rows(self) -> list[Row]:
        """The rows that led to where the run is now: nothing twice, nothing abandoned, in the order of training."""
        return [row for row in self.all_rows if not row.abandoned]

    @property
    def metrics(self) -> list[str]:
        """The names of all metrics, in the order in which they first appeared."""
        return list(dict.fromkeys(name for row in self.all_rows for name in row.metrics))

    def epochs(self) -> list[Row]:
        """One row per epoch: everything logged between it and the next, later values in place of earlier ones."""
        merged: dict[int, Row] = {}
        for row in self.rows:
            if row.batch:
                continue  # measured in the middle of the next epoch
            before = merged.get(row.epoch)
            values = {**before.metrics, **row.metrics} if before else dict(row.metrics)
            merged[row.epoch] = Row(row.attempt, row.step, row.epoch, values, row.at)
        return [merged[epoch] for epoch in sorted(merged)]

    def at_checkpoint(self, name: str, attempt: int, step: int) -> dict[str, float]:
        """What was measured on the state of a checkpoint.

        Those are the rows of its own step, logged by its attempt or by one that resumed from it.
        """
        found = dict(self._by_place.get((attempt, step), {}))
        for later in self.attempts:
            if later.resumed_from == name:
                found.update(self._by_place.get((later.number, step), {}))
        return found


def read_history(store: Store) -> History:
    """Read the history of the run in `store`; lines that are torn or not ours are passed over."""
    attempts: dict[int, Attempt] = {}
    logged: list[tuple[int, Event]] = []
    for number in attempt_numbers(store):
        ended: str | None = None
        for event in _events(store, number):
            if event.event == "start":
                attempts[number] = Attempt(
                    number, parse_time(event.at), event.resumed_from, event.step, event.epoch, event.batch,
                    None, event.host, event.pid,
                )  # fmt: skip
            elif event.event == "log":
                logged.append((number, event))
            elif event.event == "end":
                ended = event.how
        if number in attempts and ended:
            attempts[number] = replace(attempts[number], ended=ended)
    by_place: dict[tuple[int, int], dict[str, float]] = {}
    rows = []
    for number, event in logged:
        values = join_metrics(event.metrics, event.nonfinite)
        by_place.setdefault((number, event.step), {}).update(values)
        place = (event.step, event.epoch)
        gone = any(later.number > number and (later.step, later.epoch) < place for later in attempts.values())
        rows.append(Row(number, event.step, event.epoch, values, parse_time(event.at), gone, event.batch))
    return History(tuple(rows), tuple(attempts[n] for n in sorted(attempts)), by_place)


def attempt_numbers(store: Store) -> list[int]:
    """The numbers of the attempts that have a history file, ascending."""
    return sorted({int(found[1]) for name in store.list(DIRECTORY) if (found := _FILE.match(name))})


def append_events(store: Store, attempt: int, part: int, events: Sequence[Event], *, durable: bool) -> None:
    """Append lines to a history file of `attempt`; with `durable` all of the file survives a power cut from then on.

    part: 1, and one more after each failure. Raises StorageError.
    """
    suffix = "" if part == 1 else f".{part}"
    data = b"".join(msgspec.json.encode(event) + b"\n" for event in events)
    store.append(f"{DIRECTORY}/attempt-{attempt:04d}{suffix}.jsonl", data, durable=durable)


def log_event(step: int, epoch: int, metrics: Mapping[str, float], at: datetime, *, batch: int = 0) -> Event:
    """The line for a row of metrics."""
    finite, nonfinite = split_metrics(metrics)
    return Event(
        event="log", at=format_time(at), step=step, epoch=epoch, batch=batch, metrics=finite, nonfinite=nonfinite
    )


def format_time(at: datetime) -> str:
    """RFC 3339 in UTC with milliseconds, such as 2026-01-31T08:00:00.000Z."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_time(text: str) -> datetime:
    """The reverse of `format_time`; what is no time reads as the beginning of 1970."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):  # OverflowError: the first or the last day there is, in another time zone
        return datetime.fromtimestamp(0, UTC)


def _events(store: Store, attempt: int) -> list[Event]:
    decoder = msgspec.json.Decoder(Event)
    events: dict[int, Event] = {}
    for _, name in sorted(_parts(store, attempt)):
        for line in store.read(f"{DIRECTORY}/{name}", MAX_HISTORY_BYTES).split(b"\n"):
            try:
                event = decoder.decode(line)
            except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
                continue  # torn by a crash, or written by a newer version: the other rows still count
            events.setdefault(event.row or -1 - len(events), event)
    return list(events.values())


def _parts(store: Store, attempt: int) -> list[tuple[int, str]]:
    found = ((_FILE.match(name), name) for name in store.list(DIRECTORY))
    return [(int(match[2] or 1), name) for match, name in found if match and int(match[1]) == attempt]

"""The history: every row of metrics logged, across the attempts of a run.

One file per attempt, `history/attempt-0001.jsonl`, appended by the one process of that attempt, an event per line:
`start` (where it resumed), `log` (a row of metrics), `save` (what a save has cost), `end` (how it ended). A torn last line
is ignored. After an append has failed its file is not trusted again: the attempt goes on in `attempt-0001.2.jsonl`,
beginning with every event that was not yet durable; `row` tells events apart that stand in both.
"""

from __future__ import annotations

import functools
import math
import re
import sys
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated

import msgspec

from highcamp.core.manifest import Count, join_metrics, split_metrics, view_metrics
from highcamp.errors import Damaged

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from highcamp.storage.store import Store

DIRECTORY = "history"
MAX_HISTORY_BYTES = 1 << 30  # ten million rows; more is not a history but a mistake
MAX_LINE_BYTES = 1 << 20  # a row of 10,000 metrics fits; a longer line is passed over, and never held whole
PIECE_BYTES = 1 << 20  # read at once: a file without lines, or of nothing but ends of lines, takes no more memory
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
"""A stretch of time; longer than thirty years is a mistake, and its line is passed over."""
_NOTHING: Mapping[str, float] = MappingProxyType({})
# Places in a run are (step, epoch, batch).
_BEFORE_ALL = (-1, -1, -1)
_NEVER = (sys.maxsize, sys.maxsize, sys.maxsize)
_FILE = re.compile(r"attempt-(\d{4,9})(?:\.(\d{1,9}))?\.jsonl\Z")


class SaveCost(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What one save has cost, and what it wrote.

    pause_seconds: the loop stood still for it. wait_seconds: it stood still before, for the save before. durable_seconds:
    from the call to the commit. write_seconds: of these, spent in the background. interval_seconds: from the end of the
    pause before to the end of this one. new_bytes: written; linked_bytes: of files that the checkpoint before has too.
    """

    pause_seconds: Seconds = 0.0
    wait_seconds: Seconds = 0.0
    durable_seconds: Seconds = 0.0
    write_seconds: Seconds = 0.0
    interval_seconds: Seconds = 0.0
    new_bytes: Count = 0
    linked_bytes: Count = 0

    @property
    def bytes_per_second(self) -> float | None:
        """How fast it was written, flushing and renaming included; None where nothing was."""
        return _ratio(self.new_bytes, self.write_seconds) if self.new_bytes else None

    @property
    def share(self) -> float | None:
        """The share of time since the save before that the loop stood still; None where that time is not known."""
        return _ratio(self.pause_seconds + self.wait_seconds, self.interval_seconds)


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One line of a history file; which fields are used depends on `event`: start, log, save, failed or end."""

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
    checkpoint: str | None = None
    cost: SaveCost | None = None


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
    ended: "complete", "closed", "preempted", "error" or "interrupted"; None while it runs, or if it was killed.
    last_at: when it was heard of last.
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
    last_at: datetime | None = None


@dataclass(frozen=True)
class Save:
    """One save that was committed, and what it has cost. checkpoint: its name, which may be gone by now."""

    attempt: int
    checkpoint: str
    step: int
    epoch: int
    at: datetime
    cost: SaveCost


@dataclass(frozen=True)
class Failure:
    """A save that failed while training went on. reason: in words; step, epoch: what was to be saved."""

    attempt: int
    step: int
    epoch: int
    at: datetime
    reason: str


@dataclass
class _Log:
    """What the history files of one attempt hold."""

    start: Event | None = None
    ended: str | None = None
    last_at: str = ""
    events: list[Event] = field(default_factory=list)
    saves: list[Event] = field(default_factory=list)
    failures: list[Event] = field(default_factory=list)
    by_step: dict[int, Mapping[str, float]] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)

    def add(self, event: Event) -> None:
        """Take in one event; one that stands in two files counts once."""
        if event.row in self.seen:
            return
        if event.row:
            self.seen.add(event.row)
        self.last_at = event.at
        if event.event == "start":
            self.start = event
        elif event.event == "end":
            self.ended = event.how
        elif event.event == "save":
            self.saves.append(event)
        elif event.event == "failed":
            self.failures.append(event)
        elif event.event == "log":
            self.events.append(event)
            values = view_metrics(event.metrics, event.nonfinite)
            before = self.by_step.get(event.step)
            self.by_step[event.step] = values if before is None else {**before, **values}


@dataclass(frozen=True)
class History:
    """Every row of metrics of a run. attempts: by number."""

    attempts: tuple[Attempt, ...] = ()
    _logs: Mapping[int, _Log] = field(default_factory=dict, repr=False, compare=False)

    @functools.cached_property
    def all_rows(self) -> tuple[Row, ...]:
        """The rows as they were logged, those of abandoned stretches included."""
        rows: list[Row] = []
        ends: list[tuple[int, int, int]] = []  # for each attempt, the earliest place that a later one began at
        earliest = _NEVER
        for attempt in reversed(self.attempts):
            ends.append(earliest)
            place = (attempt.step, attempt.epoch, attempt.batch)
            earliest = min(earliest, _BEFORE_ALL if attempt.resumed_from is None else place)
        begun = dict(zip((attempt.number for attempt in self.attempts), reversed(ends), strict=True))
        for number in sorted(self._logs):
            end = begun.get(number, _NEVER)
            for event in self._logs[number].events:
                values = join_metrics(event.metrics, event.nonfinite)
                gone = end < (event.step, event.epoch, event.batch)
                rows.append(Row(number, event.step, event.epoch, values, parse_time(event.at), gone, event.batch))
        return tuple(rows)

    @property
    def rows(self) -> list[Row]:
        """The rows that led to where the run is now: nothing twice, nothing abandoned, in the order of training."""
        return [row for row in self.all_rows if not row.abandoned]

    @functools.cached_property
    def saves(self) -> tuple[Save, ...]:
        """What each save has cost, in the order of the commits; runs of older versions of highcamp have noted none."""
        return tuple(
            Save(number, event.checkpoint, event.step, event.epoch, parse_time(event.at), event.cost)
            for number in sorted(self._logs)
            for event in self._logs[number].saves
            if event.checkpoint is not None and event.cost is not None
        )

    @functools.cached_property
    def failures(self) -> tuple[Failure, ...]:
        """The saves that failed and were only told, as `on_error="warn"` asks for."""
        return tuple(
            Failure(number, event.step, event.epoch, parse_time(event.at), event.how or "")
            for number in sorted(self._logs)
            for event in self._logs[number].failures
        )

    def save_of(self, checkpoint: str, attempt: int) -> Save | None:
        """What the save of a checkpoint has cost; None if that is not known. attempt: the one that wrote it."""
        found = (save for save in reversed(self.saves) if (save.checkpoint, save.attempt) == (checkpoint, attempt))
        return next(found, None)

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

    def at_checkpoint(self, name: str, attempt: int, step: int, *, until: int | None = None) -> Mapping[str, float]:
        """What was measured on the state of a checkpoint, by rows of its own step.

        They are its own attempt's, those of an attempt that resumed from it, and those that a later attempt logged for a
        step behind it. until: the attempt that has committed that step anew, to whose checkpoint later ones belong.
        """
        own = self._logs.get(attempt)
        found = own.by_step.get(step, _NOTHING) if own else _NOTHING
        for number in self._logged_at.get(step, ()):
            start = self._logs[number].start
            if number <= attempt or start is None:
                continue
            is_behind = start.step > step and (until is None or number < until)
            if start.resumed_from == name or is_behind:
                found = {**found, **self._logs[number].by_step[step]}
        return found

    @functools.cached_property
    def _logged_at(self) -> dict[int, list[int]]:
        """The attempts that have rows of a step, for the steps that more than their first attempt knows."""
        found: dict[int, list[int]] = {}
        for number in sorted(self._logs)[1:]:
            for step in self._logs[number].by_step:
                found.setdefault(step, []).append(number)
        return found


class HistoryReader:
    """Reads the history of a run again and again; what has been read is remembered, so that only news is parsed."""

    def __init__(self, store: Store) -> None:
        """Nothing is read yet."""
        self._store = store
        self._lock = threading.Lock()  # training asks, and so does the writer that prunes
        self._parsed: dict[str, int] = {}
        self._logs: dict[int, _Log] = {}

    def read(self) -> History:
        """The history as it is now; lines that are torn or not ours are passed over."""
        with self._lock:
            files = [(int(match[1]), int(match[2] or 1), name) for name, match in _files(self._store)]
            sizes = {name: self._store.size(f"{DIRECTORY}/{name}") or 0 for _, _, name in files}
            if any(sizes.get(name, -1) < parsed for name, parsed in self._parsed.items()):
                self._parsed, self._logs = {}, {}  # another run has been put in this place
            for number, _, name in sorted(files):
                log = self._logs.setdefault(number, _Log())
                if sizes[name] > self._parsed.get(name, 0):
                    self._parsed[name] = self._read_on(name, log, sizes[name])
            attempts = [_attempt(number, log) for number, log in sorted(self._logs.items())]
            return History(tuple(attempt for attempt in attempts if attempt), dict(self._logs))

    def _read_on(self, name: str, log: _Log, size: int) -> int:
        """Parse what has come since the last look, whole lines only; returns where the next look begins."""
        begin = self._parsed.get(name, 0)
        if size > MAX_HISTORY_BYTES:
            raise Damaged(f"{DIRECTORY}/{name} is {size} bytes, the limit is {MAX_HISTORY_BYTES}", path=name)
        decode = _decoder().decode
        whole, begun = begin, b""
        with self._store.open(f"{DIRECTORY}/{name}") as reader:
            end = min(size, reader.size)
            for start in range(begin, end, PIECE_BYTES):
                piece = bytearray(min(PIECE_BYTES, end - start))
                reader.read_into(start, memoryview(piece))
                *lines, rest = (begun + piece).split(b"\n")
                for line in lines:
                    if not 0 < len(line) <= MAX_LINE_BYTES:
                        continue
                    try:
                        log.add(decode(line))
                    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
                        continue  # torn, or written by a newer version: the other rows still count
                if lines:
                    whole = start + len(piece) - len(rest)
                begun = rest[: MAX_LINE_BYTES + 1]  # of a line that is too long already, the rest does not matter
        return whole


@functools.cache  # made once: it evaluates the annotations of Event
def _decoder() -> msgspec.json.Decoder[Event]:
    return msgspec.json.Decoder(Event)


def _attempt(number: int, log: _Log) -> Attempt | None:
    start = log.start
    if start is None:
        return None
    return Attempt(
        number, parse_time(start.at), start.resumed_from, start.step, start.epoch, start.batch, log.ended, start.host,
        start.pid, parse_time(log.last_at),
    )  # fmt: skip


def _files(store: Store) -> list[tuple[str, re.Match[str]]]:
    return [(name, match) for name in store.list(DIRECTORY) if (match := _FILE.match(name))]


def attempt_numbers(store: Store) -> list[int]:
    """The numbers of the attempts that have a history file, ascending."""
    return sorted({int(match[1]) for _, match in _files(store)})


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


def save_event(checkpoint: str, step: int, epoch: int, cost: SaveCost, at: datetime) -> Event:
    """The line for a save that is committed."""
    return Event(event="save", at=format_time(at), step=step, epoch=epoch, checkpoint=checkpoint, cost=cost)


def total_cost(costs: Iterable[SaveCost]) -> SaveCost:
    """Several saves as if they were one: every figure is the sum."""
    known = list(costs)
    return SaveCost(**{name: sum(getattr(cost, name) for cost in known) for name in SaveCost.__struct_fields__})


def _ratio(amount: float, seconds: float) -> float | None:
    """One by the other where that is a number."""
    ratio = amount / seconds if seconds > 0 else math.inf
    return ratio if math.isfinite(ratio) else None


def format_time(at: datetime) -> str:
    """RFC 3339 in UTC with milliseconds, such as 2026-01-31T08:00:00.000Z."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_time(text: str) -> datetime:
    """The reverse of `format_time`; what is no time reads as the beginning of 1970."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):  # OverflowError: the first or the last day there is, in another time zone
        return datetime.fromtimestamp(0, UTC)

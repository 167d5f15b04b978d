"""The history: every row of metrics, across the attempts of a run."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta, timezone

import pytest

from highcamp.run.history import (
    Event,
    HistoryReader,
    append_events,
    attempt_numbers,
    format_time,
    log_event,
    parse_time,
)
from highcamp.storage.memory import MemoryStore

NOW = datetime(2026, 1, 31, 8, tzinfo=UTC)


@pytest.fixture
def store():
    """Where the history is."""
    return MemoryStore()


def _start(number, *, resumed_from=None, step=0, epoch=0, batch=0):
    return Event(event="start", at=format_time(NOW), resumed_from=resumed_from, step=step, epoch=epoch, batch=batch)


def _write(store, number, *events):
    append_events(store, number, 1, events, durable=False)


def _row(step, epoch, batch=0, **metrics):
    return log_event(step, epoch, metrics, NOW, batch=batch)


def test_rows_come_back(store):
    """A number that changes on its way through the file is another curve."""
    metrics = {"a": 0.1 + 0.2, "b": math.nan, "c": math.inf, "d": -math.inf, "e": 5e-324, 'quote"\n': 1.0}
    _write(store, 1, _start(1), log_event(5, 1, metrics, NOW))

    (row,) = HistoryReader(store).read().rows

    assert repr(row.metrics) == repr(metrics)
    assert (row.attempt, row.step, row.epoch, row.at, row.abandoned) == (1, 5, 1, NOW, False)
    for line in store.read("history/attempt-0001.jsonl", 1 << 20).splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_no_history_is_an_empty_one(store):
    """A run that has logged nothing."""
    history = HistoryReader(store).read()

    assert (history.rows, history.attempts, history.metrics, history.epochs()) == ([], (), [], [])


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_last_line_is_ignored(store, cut):
    """A crash while a row is written would cost all the rows before."""
    _write(store, 1, _start(1), _row(1, 1, loss=0.5), _row(2, 2, loss=0.25))
    data = store.read("history/attempt-0001.jsonl", 1 << 20)
    store.replace("history/attempt-0001.jsonl", data[:-cut])

    rows = HistoryReader(store).read().rows

    assert [row.step for row in rows] == [1]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"garbage",
        b"{}",
        b"[]",
        b"\xff\xfe",
        b"[" * 50_000,
        b'{"event": 3, "at": ""}',
        b'{"event":"log"}',
        b"\0" * 4096,
    ],
)
def test_a_line_that_is_not_ours_is_passed_over(store, line):
    """A block of zeros after a power cut, or a row of a newer version, hides no other row."""
    _write(store, 1, _start(1), _row(1, 1, loss=0.5))
    store.append("history/attempt-0001.jsonl", line + b"\n", durable=False)
    _write(store, 1, _row(2, 2, loss=0.25))

    assert [row.step for row in HistoryReader(store).read().rows] == [1, 2]


def test_an_unknown_event_is_passed_over(store):
    """What a newer version notes beside the rows must not be taken for one."""
    _write(store, 1, _start(1), Event(event="preempted", at="", step=7), _row(1, 1, loss=0.5))

    history = HistoryReader(store).read()

    assert [row.step for row in history.all_rows] == [1]
    assert len(history.attempts) == 1


def test_abandoned_rows_are_marked(store):
    """A stretch that was trained twice would stand twice in the curve."""
    _write(store, 1, _start(1), *(_row(step, step, loss=step) for step in range(1, 6)))
    _write(store, 2, _start(2, resumed_from="step-3", step=3, epoch=3), _row(4, 4, loss=40), _row(5, 5, loss=50))
    _write(store, 3, _start(3, resumed_from="step-4", step=4, epoch=4), _row(5, 5, loss=500))

    history = HistoryReader(store).read()

    assert [(row.attempt, row.metrics["loss"]) for row in history.rows] == [(1, 1), (1, 2), (1, 3), (2, 40), (3, 500)]
    assert [(row.attempt, row.step) for row in history.all_rows if row.abandoned] == [(1, 4), (1, 5), (2, 5)]


def test_a_fresh_start_abandons_everything(store):
    """All checkpoints are gone, the run begins anew: the old curve is not the new one's."""
    _write(store, 1, _start(1), _row(1, 1, loss=1))
    _write(store, 2, _start(2), _row(1, 1, loss=2))

    assert [row.metrics["loss"] for row in HistoryReader(store).read().rows] == [2]


def test_the_end_of_an_epoch_is_abandoned_by_a_resume_within_it(store):
    """Resumed after the last batch, before the epoch was called done: its metrics are logged again."""
    _write(store, 1, _start(1), _row(4, 0, batch=4, loss=1), _row(4, 1, val_loss=2))
    _write(store, 2, _start(2, resumed_from="step-4", step=4, epoch=0, batch=4), _row(4, 1, val_loss=3))

    assert [(row.attempt, row.batch, row.metrics) for row in HistoryReader(store).read().rows] == [
        (1, 4, {"loss": 1}),
        (2, 0, {"val_loss": 3}),
    ]


def test_epochs_are_merged(store):
    """One row for each epoch: validation does not hide training, and what comes in passing hides neither."""
    _write(
        store, 1, _start(1), _row(2, 1, loss=1, lr=0.5), _row(2, 1, val_loss=3), _row(2, 1, loss=2),
        _row(3, 1, batch=1, loss=99), _row(4, 2, loss=5),
    )  # fmt: skip

    history = HistoryReader(store).read()

    assert [(row.epoch, row.step, row.metrics) for row in history.epochs()] == [
        (1, 2, {"loss": 2, "lr": 0.5, "val_loss": 3}),
        (2, 4, {"loss": 5}),
    ]
    assert history.metrics == ["loss", "lr", "val_loss"]


def test_a_metric_belongs_to_the_attempt_that_measured_it(store):
    """Step 3 of one attempt and step 3 of another are other weights."""
    _write(store, 1, _start(1), _row(3, 3, loss=1), _row(4, 4, loss=7))
    _write(store, 2, _start(2, resumed_from="step-3", step=3, epoch=3), _row(3, 3, val_loss=2), _row(4, 4, loss=8))
    _write(store, 3, _start(3, resumed_from="step-3.2", step=3, epoch=3), _row(3, 3, val_loss=9))

    history = HistoryReader(store).read()

    assert history.at_checkpoint("step-3", 1, 3) == {"loss": 1, "val_loss": 2}
    assert history.at_checkpoint("step-4", 1, 4) == {"loss": 7}
    assert history.at_checkpoint("step-4", 2, 4) == {"loss": 8}
    assert history.at_checkpoint("step-9", 1, 9) == {}


def test_attempts_say_how_they_ended(store):
    """None: still running, or killed."""
    _write(store, 1, _start(1), Event(event="end", at=format_time(NOW), how="interrupted", step=3))
    _write(store, 2, _start(2, resumed_from="step-3", step=3, epoch=1, batch=2))

    attempts = HistoryReader(store).read().attempts

    assert [(each.number, each.resumed_from, each.step, each.epoch, each.batch, each.ended) for each in attempts] == [
        (1, None, 0, 0, 0, "interrupted"),
        (2, "step-3", 3, 1, 2, None),
    ]
    assert attempts[0].started_at == NOW


def test_other_files_are_no_attempts(store):
    """A copy made by an editor must not become an attempt, or double every row."""
    _write(store, 1, _start(1), _row(1, 1, loss=1))
    data = store.read("history/attempt-0001.jsonl", 1 << 20)
    for name in ("attempt-0001.jsonl~", "attempt-1.jsonl", "attempt-0002.json", "notes.txt", "attempt-0003.jsonl.bak"):
        store.replace(f"history/{name}", data)

    assert attempt_numbers(store) == [1]
    assert len(HistoryReader(store).read().rows) == 1


def test_a_row_that_was_written_twice_counts_once(store):
    """After a failed append the rows that may be lost are written again, beside the old file."""
    rows = [Event(event="log", at=format_time(NOW), row=n, step=n, epoch=n, metrics={"loss": n}) for n in (1, 2, 3)]
    append_events(store, 1, 1, [_start(1), rows[0], rows[1]], durable=False)
    append_events(store, 1, 2, [rows[1], rows[2]], durable=False)

    assert [row.step for row in HistoryReader(store).read().rows] == [1, 2, 3]
    assert attempt_numbers(store) == [1]


def test_times_are_utc():
    """Two machines in two zones write one history."""
    there = datetime(2026, 1, 31, 10, 0, 0, 123456, tzinfo=timezone(timedelta(hours=2)))

    assert format_time(there) == "2026-01-31T08:00:00.123Z"
    assert parse_time(format_time(there)) == datetime(2026, 1, 31, 8, 0, 0, 123000, tzinfo=UTC)
    for text in ("", "yesterday", "2026-13-01T00:00:00Z", "9" * 400):
        assert parse_time(text).year == 1970

"""The history: every row of metrics, across the attempts of a run."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta, timezone

import pytest

from highcamp.run.history import (
    Event,
    HistoryReader,
    SaveCost,
    append_events,
    attempt_numbers,
    format_time,
    log_event,
    parse_time,
    save_event,
    total_cost,
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


def test_a_fresh_start_abandons_what_was_measured_before_the_first_step(store):
    """An evaluation before training stands twice in the curve."""
    _write(store, 1, _start(1), _row(0, 0, val_loss=1), _row(1, 1, val_loss=2))
    _write(store, 2, _start(2), _row(0, 0, val_loss=3))

    assert [row.metrics["val_loss"] for row in HistoryReader(store).read().rows] == [3]


def test_batches_that_make_no_step_are_abandoned_too(store):
    """Gradients are accumulated over several batches: what was measured in between is measured again."""
    _write(store, 1, _start(1), _row(1, 0, batch=2, loss=1), _row(1, 0, batch=3, loss=2))
    _write(store, 2, _start(2, resumed_from="step-1", step=1, epoch=0, batch=2), _row(1, 0, batch=3, loss=3))

    assert [(row.batch, row.metrics["loss"]) for row in HistoryReader(store).read().rows] == [(2, 1), (3, 3)]


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


COST = SaveCost(
    pause_seconds=0.003, wait_seconds=0.001, durable_seconds=0.6, write_seconds=0.5, interval_seconds=2.0,
    new_bytes=1_000_000, linked_bytes=7,
)  # fmt: skip


def test_what_a_save_has_cost_comes_back(store):
    """A number that changes on its way through the file is another cost."""
    _write(store, 1, _start(1), save_event("step-00000005", 5, 1, COST, NOW))

    (save,) = HistoryReader(store).read().saves

    assert (save.attempt, save.checkpoint, save.step, save.epoch, save.at) == (1, "step-00000005", 5, 1, NOW)
    assert save.cost == COST
    assert (save.cost.bytes_per_second, save.cost.share) == (2_000_000, 0.002)


def test_a_save_is_no_row_of_metrics(store):
    """It would be an epoch without metrics in every table, and hide the metrics of its step from ranking."""
    rows = (_row(5, 1, loss=0.5), _row(6, 2, loss=0.25))
    _write(store, 1, _start(1), *rows)
    without = HistoryReader(store).read()
    _write(store, 1, save_event("step-00000005", 5, 1, COST, NOW), save_event("step-00000006", 6, 2, COST, NOW))

    history = HistoryReader(store).read()

    assert (history.all_rows, history.epochs(), history.metrics) == (without.all_rows, without.epochs(), ["loss"])
    assert history.at_checkpoint("step-00000005", 1, 5) == {"loss": 0.5}


def test_a_history_without_saves_still_reads(store):
    """Runs of an older version have noted none."""
    _write(store, 1, _start(1), _row(1, 1, loss=1))

    history = HistoryReader(store).read()

    assert history.saves == ()
    assert history.save_of("step-00000001", 1) is None


def test_the_cost_of_a_checkpoint_is_that_of_its_own_attempt(store):
    """A name is given again after a restart: step 5 of one attempt and step 5 of another are two saves."""
    other = SaveCost(pause_seconds=9.0)
    _write(store, 1, _start(1), save_event("step-00000005", 5, 1, COST, NOW))
    _write(store, 2, _start(2), save_event("step-00000005", 5, 1, other, NOW))

    history = HistoryReader(store).read()

    assert history.save_of("step-00000005", 1).cost == COST
    assert history.save_of("step-00000005", 2).cost == other
    assert history.save_of("step-00000006", 2) is None


@pytest.mark.parametrize(
    "line",
    [
        b'{"event":"save","at":"","checkpoint":"a","cost":{"pause_seconds":-1.0}}',
        b'{"event":"save","at":"","checkpoint":"a","cost":{"pause_seconds":1e308}}',
        b'{"event":"save","at":"","checkpoint":"a","cost":{"new_bytes":-1}}',
        b'{"event":"save","at":"","checkpoint":"a","cost":{"new_bytes":18446744073709551615}}',
        b'{"event":"save","at":"","checkpoint":"a","cost":3}',
        b'{"event":"save","at":"","checkpoint":"a"}',
        b'{"event":"save","at":"","cost":{}}',
    ],
)
def test_a_cost_that_cannot_be_is_passed_over(store, line):
    """One wrong line would turn every total into nonsense."""
    _write(store, 1, _start(1), save_event("step-00000005", 5, 1, COST, NOW))
    store.append("history/attempt-0001.jsonl", line + b"\n", durable=False)

    assert [save.cost for save in HistoryReader(store).read().saves] == [COST]


def test_costs_add_up():
    """The total of a run is what its summary tells."""
    total = total_cost([COST, COST])

    assert (total.pause_seconds, total.new_bytes, total.interval_seconds) == (0.006, 2_000_000, 4.0)
    assert (total.bytes_per_second, total.share) == (2_000_000, 0.002)
    assert (total_cost([]).bytes_per_second, total_cost([]).share) == (None, None)


@pytest.mark.parametrize("cost", [SaveCost(), SaveCost(new_bytes=5), SaveCost(new_bytes=5, write_seconds=5e-324)])
def test_no_rate_without_a_time(cost):
    """Everything was linked, or a clock stood still: infinitely fast is no rate, and no JSON."""
    assert (cost.bytes_per_second, cost.share) == (None, None)


def test_an_attempt_was_last_heard_of_with_its_last_event(store):
    """How long a killed attempt has lived is known by nothing else."""
    later = NOW + timedelta(hours=3)
    _write(store, 1, _start(1), _row(1, 1, loss=1), save_event("step-00000005", 5, 1, COST, later))

    (attempt,) = HistoryReader(store).read().attempts

    assert (attempt.started_at, attempt.last_at) == (NOW, later)

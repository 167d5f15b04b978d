"""`highcamp log`: the history, one row per epoch, across restarts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from highcamp.cli.arguments import find_run
from highcamp.cli.look import ENDINGS, look, metric_facts, monitor_facts, ordered_metrics
from highcamp.cli.program import command
from highcamp.cli.table import Column, Table
from highcamp.cli.text import duration, exact, numbers, plain
from highcamp.errors import InvalidArgument
from highcamp.run.history import format_time

if TYPE_CHECKING:
    from collections.abc import Sequence

    from highcamp.cli.look import Look
    from highcamp.cli.output import Output
    from highcamp.run.history import Attempt, Row


@command(header=True, epilog="Mark: * the best epoch. In a pipe, the attempt of each row stands for the restart lines.")
@click.argument("run", required=False)
@click.option("-n", "limit", type=click.IntRange(min=1), metavar="N", help="The last N rows only.")
@click.option("--metric", "metrics", multiple=True, metavar="NAME", help="Show this metric; may be repeated.")
def log(output: Output, run: str | None, limit: int | None, metrics: tuple[str, ...]) -> int:
    """Print the history of RUN: one row per epoch, the best one marked, a line where training was resumed."""
    seen = look(find_run(run))
    names = ordered_metrics(seen)
    for name in metrics:
        if name not in names:
            raise InvalidArgument(
                f"no metric {name!r} in {seen.run.path}", hint=f"there are {', '.join(names) or 'none'}"
            )
    rows = seen.epochs[-limit:] if limit else seen.epochs
    if output.as_json:
        output.json(
            "log/1",
            run=seen.run.path,
            monitor=monitor_facts(seen.monitor),
            items=[_facts(seen, row) for row in rows],
            attempts=[attempt_facts(attempt) for attempt in seen.history.attempts],
        )
        return 0
    if not rows:
        output.message("no metrics have been logged yet")
        return 0
    output.table(history_table(seen, rows, list(metrics) or names))
    return 0


def history_table(seen: Look, rows: Sequence[Row], names: Sequence[str]) -> Table:
    """The rows of a history as a table, with its best row and its restarts marked."""
    began = seen.history.attempts[0].started_at if seen.history.attempts else rows[0].at
    watched = seen.monitor.metric if seen.monitor else None
    return Table(
        [
            Column("EPOCH", [str(row.epoch) for row in rows], right=True, drop=0),
            Column("STEP", [str(row.step) for row in rows], right=True, drop=0),
            *(
                Column(
                    name,
                    numbers([row.metrics.get(name) for row in rows]),
                    [exact(row.metrics.get(name)) for row in rows],
                    right=True,
                    drop=0 if name == watched else 2,
                )
                for name in names
            ),
            Column(
                "TIME",
                [duration((row.at - began).total_seconds()) for row in rows],
                [format_time(row.at) for row in rows],
                right=True,
                drop=3,
            ),
            Column("ATTEMPT", [str(row.attempt) for row in rows], right=True, drop=4),
            Column("NOTE", [_note(seen, row) for row in rows]),
        ],
        signs=["*" if row is seen.best_row else " " for row in rows],
        styles=["green" if row is seen.best_row else "" for row in rows],
        notes=_restarts(seen, rows),
    )


def restart_words(seen: Look, attempt: Attempt) -> str:
    """How the attempt before ended, and where this one goes on."""
    before = [each for each in seen.history.attempts if each.number < attempt.number]
    how = ENDINGS.get(before[-1].ended, "stopped") if before else "stopped"
    return f"{how}; attempt {attempt.number} {origin_words(attempt)}"


def origin_words(attempt: Attempt) -> str:
    """Where an attempt after the first went on."""
    if not attempt.resumed_from:
        return "began anew"
    batch = f", batch {attempt.batch}" if attempt.batch else ""
    return f"resumed from {plain(attempt.resumed_from)}, epoch {attempt.epoch}{batch}"


def _restarts(seen: Look, rows: Sequence[Row]) -> dict[int, list[str]]:
    """Row number -> the restarts between it and the row before."""
    notes: dict[int, list[str]] = {}
    first = rows[0].attempt
    for attempt in seen.history.attempts:
        if attempt.number > first:
            at = next((n for n, row in enumerate(rows) if row.attempt >= attempt.number), len(rows))
            notes.setdefault(at, []).append(f"--- {restart_words(seen, attempt)} ---")
    return notes


def _note(seen: Look, row: Row) -> str:
    saved = [each for each in seen.checkpoints if each.step == row.step and each.epoch == row.epoch]
    names = {each.name for each in saved}
    words = []
    if row is seen.best_row:
        words.append("best" if saved else "best, not saved")
    elif seen.best and seen.best.name in names:
        words.append("best saved")
    if seen.last and seen.last.name in names:
        words.append("last")
    if saved and not words:
        words.append("kept")
    return ", ".join(words)


def _facts(seen: Look, row: Row) -> dict[str, Any]:
    saved = [each.name for each in seen.checkpoints if each.step == row.step and each.epoch == row.epoch]
    return {
        "epoch": row.epoch,
        "step": row.step,
        "attempt": row.attempt,
        **metric_facts(row.metrics),
        "at": format_time(row.at),
        "is_best": row is seen.best_row,
        "checkpoints": saved,
    }


def attempt_facts(attempt: Attempt) -> dict[str, Any]:
    """An attempt as JSON."""
    return {
        "number": attempt.number,
        "started_at": format_time(attempt.started_at),
        "resumed_from": attempt.resumed_from,
        "step": attempt.step,
        "epoch": attempt.epoch,
        "batch": attempt.batch,
        "ended": attempt.ended,
    }

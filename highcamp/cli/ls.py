"""`highcamp ls`: the checkpoints of a run, or the runs of a directory."""

from __future__ import annotations

import operator
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from highcamp.cli.arguments import find_target, is_run, refer, runs_below, shown_path
from highcamp.cli.look import COMMITTED, look, metric_facts, monitor_facts, number_facts, ordered_metrics
from highcamp.cli.program import command
from highcamp.cli.table import Column, Table
from highcamp.cli.text import MISSING, age, count, exact, number, numbers, plain, size
from highcamp.errors import InvalidArgument
from highcamp.run.history import format_time
from highcamp.run.run import open_run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from highcamp.cli.look import Look
    from highcamp.cli.output import Output
    from highcamp.run.checkpoint import Checkpoint

COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le, ">=": operator.ge, "!=": operator.ne, "==": operator.eq, "=": operator.eq,
    "<": operator.lt, ">": operator.gt,
}  # fmt: skip
_CONDITION = re.compile(
    r"\s*(?P<name>[^<>=!\s]+)\s*(?P<sign><=|>=|!=|==|=|<|>)\s*(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*\Z"
)
PLACES = ("step", "epoch", "size", "saved")
WEIGHTS_ONLY = "weights only"
UNHEALTHY = "not healthy"
FEW_METRICS = 3  # on a terminal, unless they are named: monitored, its counterpart, one more


@command(
    header=True,
    epilog="Marks: * the best, = as good as the best within noise. In a pipe: all metrics, tab-separated, full precision.",
)
@click.argument("run", required=False)
@click.option("--sort", metavar="METRIC", help="A metric, step, epoch, size or saved; otherwise the best come first.")
@click.option("--reverse", is_flag=True, help="The other way round.")
@click.option("-n", "limit", type=click.IntRange(min=1), metavar="N", help="At most N rows.")
@click.option("--metric", "metrics", multiple=True, metavar="NAME", help="Show this metric; may be repeated.")
@click.option(
    "--where", "conditions", multiple=True, metavar="CONDITION", help="Such as 'val_loss<0.3' or 'epoch>=10'."
)
def ls(
    output: Output,
    run: str | None,
    sort: str | None,
    reverse: bool,  # noqa: FBT001
    limit: int | None,
    metrics: tuple[str, ...],
    conditions: tuple[str, ...],
) -> int:
    """List the checkpoints of RUN, best first, and why each is kept; for a directory of runs, list the runs."""
    if run and "://" not in run and Path(run).is_dir() and not is_run(Path(run)):
        below = runs_below(Path(run))
        if below:
            _list_runs(output, Path(run), below, limit)
            return 0
    seen = look(find_target(run).run)
    names = ordered_metrics(seen)
    for name in metrics:
        if name not in names:
            raise InvalidArgument(
                f"no metric {name!r} in {seen.run.path}", hint=f"there are {', '.join(names) or 'none'}"
            )
    rows = _sorted(seen, sort, names)
    rows = [each for each in rows if all(_holds(each, condition, names) for condition in conditions)]
    rows = (rows[::-1] if reverse else rows)[:limit]
    if output.as_json:
        output.json(
            "ls/1",
            run=seen.run.path,
            run_id=seen.run.run_id,
            state=seen.state_of_run,
            monitor=monitor_facts(seen.monitor),
            items=[seen.facts(each) for each in rows],
            unreadable=[{"name": name, "message": why} for name, why in seen.run.unreadable],
        )
        return 0
    _print_checkpoints(output, seen, rows, list(metrics) or names, all_metrics=bool(metrics))
    return 0


def headline(seen: Look) -> list[str]:
    """A run in a few words each: run digits, its monitor, epochs, checkpoints, state."""
    parts = [f"run {plain(seen.name)}"]
    if seen.monitor:
        parts.append(f"monitor {plain(seen.monitor.metric)} ({seen.monitor.mode})")
    attempts = f" in {count(len(seen.history.attempts), 'attempt')}" if len(seen.history.attempts) > 1 else ""
    parts.append(count(seen.epoch, "epoch") + attempts)
    parts.append(
        f"{count(len(seen.checkpoints), 'checkpoint')}, {size(sum(each.size_bytes for each in seen.checkpoints))}"
    )
    return [*parts, seen.state_of_run]


def _print_checkpoints(
    output: Output, seen: Look, rows: Sequence[Checkpoint], names: list[str], *, all_metrics: bool
) -> None:
    shown = names if all_metrics or not output.is_terminal else names[:FEW_METRICS]
    if seen.monitor and seen.monitor.metric not in shown:
        shown = [seen.monitor.metric, *shown]
    columns = [
        Column("CHECKPOINT", [each.name for each in rows], drop=0),
        Column("EPOCH", [str(each.epoch) for each in rows], right=True, drop=2),
        Column("STEP", [str(each.step) for each in rows], right=True, drop=0),
        *(
            Column(
                name,
                numbers([each.metrics.get(name) for each in rows]),
                [exact(each.metrics.get(name)) for each in rows],
                right=True,
                drop=0 if seen.monitor and name == seen.monitor.metric else 6,  # they are in `log` too: the first to go
            )
            for name in shown
        ),
        Column(
            "SIZE",
            [size(each.size_bytes) for each in rows],
            [str(each.size_bytes) for each in rows],
            right=True,
            drop=3,
        ),
        Column(
            "SAVED",
            [age((seen.at - each.created_at).total_seconds()) for each in rows],
            [format_time(each.created_at) for each in rows],
            drop=4,
        ),
        Column(
            "KEPT BECAUSE", [", ".join(seen.reasons(each.name)) or "not pruned yet" for each in rows], flexible=True
        ),
        Column("STATE", [_state(seen, each) for each in rows], drop=5),  # what is damaged is said below in any case
    ]
    if output.is_terminal:
        output.parts(headline(seen), style="bold")
    if rows:
        output.table(Table(columns, [_sign(seen, each) for each in rows], [_style(seen, each) for each in rows]))
    elif output.is_terminal:
        output.line("no checkpoint fits" if seen.checkpoints else "no checkpoints yet")
    if output.is_terminal:
        output.parts([f" {part}" for part in [*_legend(seen, rows), *_marked(rows)]])
        _say_what_is_wrong(output, seen)
        if seen.best:
            output.hint(
                f"highcamp export {refer(seen.run, 'best')} -o model.safetensors",
                f"highcamp log {refer(seen.run)}".rstrip(),
                f"highcamp plot {refer(seen.run)}".rstrip(),
            )


def _state(seen: Look, each: Checkpoint) -> str:
    state = seen.state(each.name)
    if state != COMMITTED:
        return state
    marks = [WEIGHTS_ONLY] if each.manifest.is_weights_only else []
    marks += [UNHEALTHY] if each.is_healthy is False else []
    return ", ".join(marks) or state


def _say_what_is_wrong(output: Output, seen: Look) -> None:
    for each in seen.checkpoints:
        if not seen.checks[each.name].is_whole:
            findings = "; ".join(finding.message for finding in seen.checks[each.name].findings)
            output.message(f"{each.name} is damaged: {plain(findings)}")
    for name, why in seen.run.unreadable:
        output.message(f"{plain(name)} cannot be read: {plain(why)}")


def _sign(seen: Look, each: Checkpoint) -> str:
    if seen.best is None:
        return " "
    if each.name == seen.best.name:
        return "*"
    return "=" if _is_as_good(seen, each) else " "


def _is_as_good(seen: Look, each: Checkpoint) -> bool:
    value, best = seen.value(each.metrics), seen.value(seen.best.metrics) if seen.best else None
    return None not in (value, best, seen.noise) and abs((value or 0.0) - (best or 0.0)) <= (seen.noise or 0.0)


def _style(seen: Look, each: Checkpoint) -> str:
    if not seen.checks[each.name].is_whole:
        return "red"
    return "green" if seen.best is not None and each.name == seen.best.name else ""


def _legend(seen: Look, rows: Sequence[Checkpoint]) -> list[str]:
    if seen.best is None:
        return [] if seen.monitor is None else [f"no best: no checkpoint has a finite {plain(seen.monitor.metric)}"]
    parts = ["* best"] if any(each.name == seen.best.name for each in rows) else []
    if any(each.name != seen.best.name and _is_as_good(seen, each) for each in rows) and seen.noise is not None:
        parts.append(f"= as good as the best within noise ({seen.noise:.2g})")
    later = seen.epoch - seen.best.epoch
    if later > 0 and seen.monitor:
        parts.append(f"no better {plain(seen.monitor.metric)} for {count(later, 'epoch')}")
    return parts


def _marked(rows: Sequence[Checkpoint]) -> list[str]:
    """Said below as well: where the terminal is narrow, the column of states is the first to go."""
    marked = {
        WEIGHTS_ONLY: [each.name for each in rows if each.manifest.is_weights_only],
        f"{UNHEALTHY} (NaN or infinite weights)": [each.name for each in rows if each.is_healthy is False],
    }
    return [f"{mark}: {', '.join(names)}" for mark, names in marked.items() if names]


def _sorted(seen: Look, sort: str | None, names: Sequence[str]) -> list[Checkpoint]:
    if sort is None:
        ranked = {each.name for each in seen.ranked}
        return [*seen.ranked, *(each for each in seen.checkpoints if each.name not in ranked)]
    if sort not in PLACES and sort not in names:
        raise InvalidArgument(f"cannot sort by {sort!r}", hint=f"there are {', '.join([*PLACES, *names])}")
    present = [each for each in seen.checkpoints if _quantity(each, sort) is not None]
    absent = [each for each in seen.checkpoints if _quantity(each, sort) is None]
    return [*sorted(present, key=lambda each: _quantity(each, sort) or 0.0), *absent]


def _quantity(each: Checkpoint, name: str) -> float | None:
    """A number to sort by or compare; None for a metric that is missing or NaN, which compares with nothing."""
    places = {"step": each.step, "epoch": each.epoch, "size": each.size_bytes, "saved": each.created_at.timestamp()}
    value = each.metrics[name] if name in each.metrics else places.get(name)
    return None if value is None or value != value else float(value)  # noqa: PLR0124


def _holds(each: Checkpoint, condition: str, names: Sequence[str]) -> bool:
    match = _CONDITION.match(condition)
    if match is None:
        raise InvalidArgument(f"--where {condition!r} is no condition", hint="for example --where 'val_loss<0.3'")
    if match["name"] not in PLACES and match["name"] not in names:
        raise InvalidArgument(
            f"--where {condition!r}: there is no {match['name']!r}", hint=f"there are {', '.join([*PLACES, *names])}"
        )
    value = _quantity(each, match["name"])
    return value is not None and COMPARISONS[match["sign"]](value, float(match["number"]))


def _list_runs(output: Output, directory: Path, paths: Sequence[Path], limit: int | None) -> None:
    seen = [look(open_run(path)) for path in paths[:limit]]
    if output.as_json:
        output.json("ls/1", directory=str(directory.absolute()), runs=[_run_facts(each) for each in seen])
        return
    values = [each.value(each.best.metrics) if each.best else None for each in seen]
    bytes_each = [sum(entry.size_bytes for entry in each.checkpoints) for each in seen]
    metrics = [each.monitor.metric if each.monitor else MISSING for each in seen]
    columns = [
        Column("RUN", [shown_path(path) for path in paths[:limit]], drop=0),
        Column("STATE", [each.state_of_run for each in seen]),
        Column("EPOCH", [str(each.epoch) for each in seen], right=True),
        Column("BEST", [str(each.best.epoch) if each.best else MISSING for each in seen], right=True),
        Column("VALUE", [number(value) for value in values], [exact(value) for value in values], right=True, drop=0),
        Column("MONITOR", metrics),
        Column("LAST", [each.last.name if each.last else MISSING for each in seen]),
        Column("CHECKPOINTS", [str(len(each.checkpoints)) for each in seen], right=True),
        Column("SIZE", [size(total) for total in bytes_each], [str(total) for total in bytes_each], right=True),
    ]
    output.table(Table(columns))
    output.hint(f"highcamp ls {refer(seen[0].run)}")


def _run_facts(seen: Look) -> dict[str, Any]:
    return {
        "run": seen.run.path,
        "run_id": seen.run.run_id,
        "state": seen.state_of_run,
        "monitor": monitor_facts(seen.monitor),
        "epoch": seen.epoch,
        "best": _short(seen, seen.best),
        "last": _short(seen, seen.last),
        "checkpoint_count": len(seen.checkpoints),
        "size_bytes": sum(each.size_bytes for each in seen.checkpoints),
    }


def _short(seen: Look, each: Checkpoint | None) -> dict[str, Any] | None:
    if each is None:
        return None
    value = seen.value(each.metrics)
    place = {"name": each.name, "epoch": each.epoch, "step": each.step}
    return {**place, **number_facts("value", value), **metric_facts(each.metrics)}

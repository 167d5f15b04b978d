"""`highcamp best`: the path of the best checkpoint, for scripts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from highcamp.cli.arguments import find_run
from highcamp.cli.look import look, monitor_facts
from highcamp.cli.program import command
from highcamp.cli.text import count, number, plain
from highcamp.errors import CheckpointNotFound, InvalidArgument
from highcamp.policy.monitor import Monitor

if TYPE_CHECKING:
    from highcamp.cli.output import Output


@command(epilog="For example: cp $(highcamp best runs/digits)/model.safetensors .")
@click.argument("run", required=False)
@click.option("--metric", metavar="NAME", help="Rank by this metric instead of the monitored one.")
@click.option(
    "--mode", type=click.Choice(["auto", "min", "max"]), default="auto", help="Whether less or more is better."
)
def best(output: Output, run: str | None, metric: str | None, mode: str) -> int:
    """Print the path of the best checkpoint of RUN alone on stdout, and why it is the best on stderr."""
    found = find_run(run)
    if metric is None and mode != "auto":
        raise InvalidArgument("--mode was given without --metric", hint="the monitor of the run has its own mode")
    asked = Monitor(metric, "min" if mode == "min" else "max" if mode == "max" else "auto") if metric else None
    seen = look(found, asked)
    if seen.monitor is None:
        raise CheckpointNotFound(
            f"{found.path} has no best: no metric is monitored",
            path=found.path,
            hint="name one, such as --metric val_loss",
        )
    if seen.best is None:
        raise CheckpointNotFound(
            f"{found.path} has no best: no whole checkpoint has a finite {seen.monitor.metric}",
            path=found.path,
            hint=f"metrics there are: {', '.join(seen.history.metrics) or 'none'}; @last is the newest",
        )
    if output.as_json:
        output.json("best/1", run=found.path, monitor=monitor_facts(seen.monitor), **seen.facts(seen.best))
        return 0
    output.line(plain(seen.best.path))
    output.message(
        reason(seen.best.epoch, seen.best.step, seen.monitor, seen.value(seen.best.metrics), len(seen.ranked))
    )
    return 0


def reason(epoch: int, step: int, monitor: Monitor, value: float | None, ranked_count: int) -> str:
    """Why a checkpoint is the best, in words."""
    least = "lowest" if monitor.mode == "min" else "highest"
    place = f"epoch {epoch}" if epoch else f"step {step}"
    return f"{place}: {plain(monitor.metric)} {number(value)}, the {least} of {count(ranked_count, 'checkpoint')} kept"

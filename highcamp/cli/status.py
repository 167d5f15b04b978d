"""Bare `highcamp`: how the nearest run is doing and what to type next, or what to do first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from highcamp.cli.arguments import find_target, refer, runs_below, shown_path
from highcamp.cli.look import look
from highcamp.cli.ls import headline
from highcamp.cli.text import count, number, plain
from highcamp.errors import RunNotFound

if TYPE_CHECKING:
    from highcamp.cli.look import Look
    from highcamp.cli.output import Output

FIRST = """\
highcamp keeps the best model you have trained, and never loses more than moments of work.

There is no run here. To begin:

  highcamp demo      train a small network, kill it, see it go on (about a minute)
  highcamp --help    all commands

In a training script:

  from highcamp import Checkpointer, Keep          # a loop of your own
  from highcamp.keras import CheckpointCallback    # model.fit(..., callbacks=[CheckpointCallback("runs/digits")])
"""
MAX_SHOWN = 5


def print_status(output: Output) -> None:
    """The nearest run in a few lines and three next commands; without one, what to do first."""
    try:
        run = find_target(None).run
    except RunNotFound:
        below = runs_below(Path.cwd())
        if not below:
            output.line(FIRST.rstrip())
            return
        output.line(f"{count(len(below), 'run')} below this directory:")
        for path in below[:MAX_SHOWN]:
            output.parts([f"  {part}" if not n else part for n, part in enumerate(headline(look_at(path)))])
        if len(below) > MAX_SHOWN:
            output.line(f"  and {len(below) - MAX_SHOWN} more")
        name = plain(shown_path(below[0]))
        _say_next([f"highcamp ls {name}", f"highcamp log {name}", "highcamp --help"], output)
        return
    seen = look(run)
    output.parts(headline(seen), style="bold")
    for line in _lines(seen):
        output.line(line)
    where = refer(run)
    commands = [f"highcamp {name} {where}".rstrip() for name in ("ls", "log", "plot")]
    if seen.state_of_run == "finished" and seen.best:
        commands[0] = f"highcamp export {refer(run, 'best')} -o model.safetensors"
    _say_next(commands, output)


def look_at(path: Path) -> Look:
    """A look at the run at `path`."""
    return look(find_target(str(path)).run)


def _lines(seen: Look) -> list[str]:
    lines = []
    monitor = seen.monitor
    if seen.best and monitor:
        value = number(seen.value(seen.best.metrics))
        lines.append(f"best  epoch {seen.best.epoch}, {plain(monitor.metric)} {value}, {seen.best.name}")
    elif monitor:
        lines.append(f"best  none: no checkpoint has a finite {plain(monitor.metric)}")
    if seen.last:
        watched = f", {plain(monitor.metric)} {number(seen.value(seen.last.metrics))}" if monitor else ""
        lines.append(f"last  epoch {seen.last.epoch}{watched}, {seen.last.name}")
    damaged = [name for name, check in seen.checks.items() if not check.is_whole]
    if damaged:
        lines.append(f"{count(len(damaged), 'checkpoint')} damaged: {', '.join(damaged)}; see highcamp verify")
    return lines


def _say_next(commands: list[str], output: Output) -> None:
    output.line()
    output.line("next:")
    for command in commands:
        output.line(f"  {command}")

"""`highcamp run`: starts a training script, and starts it again after a crash."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from highcamp.cli.arguments import RUN_VARIABLE, nearest_run, runs_below
from highcamp.cli.child import Child
from highcamp.cli.output import write_message
from highcamp.cli.program import command
from highcamp.cli.text import plain
from highcamp.errors import InvalidArgument, RunNotFound
from highcamp.run.run import open_run
from highcamp.training.supervisor import Patience, Supervisor

if TYPE_CHECKING:
    from collections.abc import Callable

    from highcamp.cli.output import Output
    from highcamp.run.run import Run

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(s|min|h|d)?", re.ASCII)
_UNIT_SECONDS = {None: 1.0, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
REQUEUED_AFTER = {75, 128 + signal.SIGUSR1, 128 + signal.SIGUSR2}  # the job's time is up; SIGTERM may mean scancel
SCONTROL_SECONDS = 60.0


class _Time(click.ParamType[float]):
    """A stretch of time such as 30s, 5min or 1h, in seconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = _DURATION.fullmatch(str(value))
        if match is None:
            self.fail(f"{plain(str(value))!r} is no time; for example 30s, 5min or 1h", param, ctx)
        return float(match[1]) * _UNIT_SECONDS[match[2]]


@command(
    epilog="For example: highcamp run -- python train.py. The exit code is that of the last attempt, 128 + signal if it "
    "was killed. A script that ended by SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2 or a deadline (75) was asked to stop, and "
    "is not started again."
)
@click.option(
    "--run", "place", metavar="RUN", help="The run that shows what was gained; the one that is written to, by default."
)
@click.option(
    "--max-restarts", type=click.IntRange(min=0), default=10, show_default=True, help="Give up after so many …"
)
@click.option("--window", type=_Time(), default="1h", show_default=True, help="… within this time.")
@click.option(
    "--delay", type=_Time(), default="1s", show_default=True, help="Wait before the first restart; then twice as long."
)
@click.option("--max-delay", type=_Time(), default="1min", show_default=True, help="Wait no longer than this.")
@click.option("--requeue", is_flag=True, help="Put the Slurm job back into the queue when its time is up.")
@click.argument("program", metavar="-- COMMAND", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    output: Output,
    place: str | None,
    max_restarts: int,
    window: float,
    delay: float,
    max_delay: float,
    requeue: bool,  # noqa: FBT001
    program: tuple[str, ...],
) -> int:
    """Run a training COMMAND, and start it again when it crashes.

    It gives up when two attempts in a row have not gained a step, or after too many restarts. Signals are passed on, and
    its save is waited for. Terminal and streams are the command's own; messages of this one are lines on stderr.
    """
    say = _voice(output)
    patience = Patience(max_restarts, window, delay, max_delay)
    with Child(program) as child:
        code = Supervisor(child, _finder(place), say, patience).supervise()
    if requeue and code in REQUEUED_AFTER:
        _requeue(say)
    return code


run.allow_interspersed_args = False  # what follows the command's name belongs to it, with or without "--"


def _voice(output: Output) -> Callable[..., None]:
    """Where messages go: stderr, because stdout is the command's own; one line each."""

    def say(event: str, words: str, **facts: Any) -> None:
        if output.as_json:
            write_message(json.dumps({"schema": "highcamp.run/1", "type": event, "message": words, **facts}))
        else:
            output.message(f"highcamp run: {plain(words)}")

    return say


def _finder(place: str | None) -> Callable[[], list[Run]]:
    """The runs that the command may write to: the one that is named, or all at and below the current directory."""
    default = os.environ.get(RUN_VARIABLE)
    start = Path.cwd()

    def find() -> list[Run]:
        around = [nearest_run(start), *runs_below(start)]
        paths = [place] if place else [*([default] if default else []), *(str(path) for path in around if path)]
        found = []
        for path in paths:
            with contextlib.suppress(RunNotFound):  # it does not begin to exist before training does
                found.append(open_run(path))
        return list({run.path: run for run in found}.values())

    return find


def _requeue(say: Callable[..., None]) -> None:
    """Ask Slurm to begin the job again; its first task does so for all."""
    job = os.environ.get("SLURM_JOB_ID")
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array:
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    if not job:
        raise InvalidArgument(
            "--requeue: this is no Slurm job, for SLURM_JOB_ID is not set", hint="leave --requeue out"
        )
    if os.environ.get("SLURM_PROCID", "0") != "0":
        return
    try:
        done = subprocess.run(  # noqa: S603  (a fixed program; the number is Slurm's)
            ["scontrol", "requeue", job],  # noqa: S607  (where it lies differs from site to site)
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SCONTROL_SECONDS, check=False,
        )  # fmt: skip
        problem = "" if done.returncode == 0 else done.stderr.strip() or f"exit code {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        say("warning", f"scontrol requeue {job} failed: {problem}")
    else:
        say("requeue", f"job {job} is back in the queue")

"""`highcamp plot`: a picture of the history."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from highcamp.cli.arguments import find_run, shown_path
from highcamp.cli.program import command
from highcamp.cli.text import plain

if TYPE_CHECKING:
    from highcamp.cli.output import Output

FILE_NAME = "curve.png"


@command(epilog="Needs matplotlib: pip install 'highcamp[plot]'.")
@click.argument("run", required=False)
@click.option(
    "-o", "--output", "file", metavar="FILE", help=f"PNG, SVG or PDF by suffix; {FILE_NAME} in the run by default."
)
@click.option("--metric", metavar="NAME", help="Draw this metric instead of the monitored one.")
def plot(output: Output, run: str | None, file: str | None, metric: str | None) -> int:
    """Draw the training and validation curves of RUN, the best epoch and the restarts marked; prints the path."""
    found = find_run(run)
    # Pictures of runs that lie in a store elsewhere go to where the user is.
    beside = Path(FILE_NAME) if "://" in found.path else Path(found.path) / FILE_NAME
    written = found.plot(file or beside, metric=metric)
    if output.as_json:
        best = found.best
        monitor = found.monitor
        value = monitor.value(best.metrics) if best and monitor else None
        output.json(
            "plot/1",
            run=found.path,
            file=str(written.absolute()),
            metric=metric or (monitor.metric if monitor else None),
            best_epoch=best.epoch if best else None,
            best_value=value if value is None or math.isfinite(value) else None,
        )
    else:
        output.line(plain(shown_path(written)))
    return 0

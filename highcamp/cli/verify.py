"""`highcamp verify`: every byte against its digest."""

from __future__ import annotations

import re
import sys
import time
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import click

from highcamp.cli.arguments import find_target, refer, shown_path
from highcamp.cli.program import FAILED, command
from highcamp.cli.table import Column, Table
from highcamp.cli.text import MISSING, count, plain, size
from highcamp.errors import InvalidArgument
from highcamp.run.verify import verify_all, verify_structure, verify_unlisted
from highcamp.training.resume import preferred

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from highcamp.cli.arguments import Target
    from highcamp.cli.output import Output
    from highcamp.run.checkpoint import Checkpoint
    from highcamp.run.verify import Verification

FOUND = 1
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|min|h)?\Z")
_UNIT_SECONDS = {None: 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


@command(header=True, epilog="Exit code 1 if anything is not as it was committed, 3 if the time was too short for all.")
@click.argument("run", metavar="[RUN[@REF]]", required=False)
@click.option("--quick", is_flag=True, help="Compare names, sizes and tables of tensors; read no tensor.")
@click.option("--max-duration", metavar="TIME", help="Read no further checkpoint after this time, such as 60s or 5min.")
@click.option("--fail-fast", is_flag=True, help="Stop at the first finding.")
def verify(output: Output, run: str | None, quick: bool, max_duration: str | None, fail_fast: bool) -> int:  # noqa: FBT001
    """Compare every byte of a checkpoint, or of all of RUN, with its digest, and name what is damaged; repairs nothing."""
    target = find_target(run)
    checkpoints = [target.checkpoint()] if target.reference else target.run.checkpoints
    deadline = time.monotonic() + _seconds(max_duration) if max_duration else None
    began, results, skipped = time.monotonic(), [], 0
    with (
        _progress(output, 0 if quick else sum(each.size_bytes for each in checkpoints)) as advance,
        closing(_results(target, checkpoints, advance, quick=quick)) as found_so_far,
    ):
        for result in found_so_far:
            results.append(result)
            if output.as_json:
                output.json_line("item", "verify/1", **facts(result))
            if fail_fast and not result.ok:
                skipped = len(checkpoints) - len(results)
                break
            if deadline is not None and time.monotonic() > deadline and len(results) < len(checkpoints):
                skipped = len(checkpoints) - len(results)
                break
    skipped = max(0, skipped)
    found = [result for result in results if not result.ok]
    if output.as_json:
        output.json_line(
            "result",
            "verify/1",
            run=target.run.path,
            verified_count=len(results),
            skipped_count=skipped,
            finding_count=sum(len(result.findings) for result in found),
            bytes_read=sum(result.bytes_read for result in results),
            seconds=round(time.monotonic() - began, 3),
        )
    else:
        _print(output, results)
        _summarize(output, target, results, skipped, quick=quick)
    if found:
        return FOUND
    return FAILED if skipped else 0


def facts(result: Verification) -> dict[str, object]:
    """A verification as JSON."""
    return {
        "name": result.name,
        "state": result.state,
        "bytes_read": result.bytes_read,
        "findings": [
            {"file": each.file, "state": each.state, "tensor": each.tensor, "message": each.message}
            for each in result.findings
        ],
    }


def _results(
    target: Target, checkpoints: Sequence[Checkpoint], advance: Callable[[int], None], *, quick: bool
) -> Generator[Verification]:
    yield from map(verify_structure, checkpoints) if quick else verify_all(checkpoints, advance)
    if not target.reference:
        yield from verify_unlisted(target.run.store, [each.name for each in checkpoints])


def _print(output: Output, results: Sequence[Verification]) -> None:
    rows = [(result, finding) for result in results for finding in result.findings or (None,)]
    if not rows:
        output.message("there are no checkpoints to verify")
        return
    output.table(
        Table(
            [
                Column("NAME", [result.name for result, _ in rows], drop=0),
                Column("STATE", [finding.state if finding else result.state for result, finding in rows], drop=0),
                Column(
                    "BYTES READ",
                    [size(result.bytes_read) for result, _ in rows],
                    [str(result.bytes_read) for result, _ in rows],
                    right=True,
                ),
                Column("FILE", [finding.file if finding else MISSING for _, finding in rows]),
                Column(
                    "TENSOR", [(finding.tensor if finding else None) or MISSING for _, finding in rows], flexible=True
                ),
            ],
            styles=["red" if finding else "" for _, finding in rows],
        )
    )


def _summarize(output: Output, target: Target, results: Sequence[Verification], skipped: int, *, quick: bool) -> None:
    for result in results:
        for finding in result.findings:
            output.message(f"{plain(result.name)}: {plain(finding.message)}")
    whole = sum(result.ok for result in results)
    how = "by names, sizes and tables" if quick else f"{size(sum(result.bytes_read for result in results))} read"
    rest = f"; {count(skipped, 'checkpoint')} not verified" if skipped else ""
    output.message(f"{whole} of {count(len(results), 'checkpoint')} whole, {how}{rest}")
    damaged = any(result.state not in ("whole", "foreign") for result in results)
    if damaged and target.run.last is not None:
        output.message(f"nothing was changed; {_resumes_from(target, results)}")
        output.hint(f"highcamp ls {refer(target.run)}".rstrip())


def _seconds(text: str) -> float:
    match = _DURATION.match(text)
    if match is None:
        raise InvalidArgument(f"--max-duration {text!r} is no time", hint="for example 60s, 5min or 1h")
    return float(match[1]) * _UNIT_SECONDS[match[2]]


@contextmanager
def _progress(output: Output, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr for a person who waits; gives a function that moves it on."""
    if not total_bytes or output.quiet or output.as_json or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    console = Console(stderr=True)
    with Progress(TextColumn("verifying"), BarColumn(), DownloadColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=total_bytes)
        yield lambda size_bytes: progress.advance(task, size_bytes)


def _resumes_from(target: Target, results: Sequence[Verification]) -> str:
    """Where training would go on, by what was just found."""
    damaged = {result.name for result in results if not result.is_whole}
    whole = [each.name for each in preferred(target.run.checkpoints) if each.name not in damaged]
    cure = f'"highcamp rm {shown_path(target.run.path)}@NAME --apply" takes a damaged one away'
    return f"training resumes from {whole[0]}; {cure}" if whole else "no checkpoint is left to resume from"

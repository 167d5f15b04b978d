"""`highcamp pin` and `highcamp unpin`: names that protect."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from highcamp.cli.arguments import find_run, find_target, refer
from highcamp.cli.program import command
from highcamp.cli.text import plain

if TYPE_CHECKING:
    from highcamp.cli.output import Output


@command(
    epilog="For example: highcamp pin runs/digits@best paper. A pin has letters, digits, dot, dash and underscore."
)
@click.argument("target", metavar="RUN@REF")
@click.argument("name")
def pin(output: Output, target: str, name: str) -> int:
    """Give a checkpoint the name NAME; a pinned checkpoint is never removed, and RUN@pin:NAME means it."""
    found = find_target(target)
    entry = found.run.pin(found.checkpoint().name, name)
    if output.as_json:
        output.json("pin/1", run=found.run.path, name=name, checkpoint=entry.name)
    else:
        output.line(plain(entry.name))
        output.message(f"pinned as {plain(name)}; {refer(found.run, f'pin:{name}')} means it")
    return 0


@command()
@click.argument("arguments", metavar="[RUN] NAME", nargs=-1, required=True)
def unpin(output: Output, arguments: tuple[str, ...]) -> int:
    """Take the pin NAME away; its checkpoint stays for as long as the policy has a reason."""
    if len(arguments) > 2:
        raise click.UsageError(f"unpin takes a run and a name, not {len(arguments)} arguments")
    run = find_run(arguments[0] if len(arguments) > 1 else None)
    name = arguments[-1].removeprefix("pin:")
    checkpoint = run.unpin(name)
    if output.as_json:
        output.json("unpin/1", run=run.path, name=name, checkpoint=checkpoint)
    else:
        output.line(plain(checkpoint))
        output.message(f"the pin {plain(name)} is gone")
    return 0

"""`highcamp help`: the pages that belong to no single command."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from highcamp.cli.program import COMMANDS, CONTEXT

if TYPE_CHECKING:
    from collections.abc import Mapping

TOPICS: Mapping[str, str] = {
    "refs": """\
A checkpoint is named as RUN@REF. Without RUN it is the nearest run: the current directory or one above it.

  best        the best-ranked whole checkpoint        best~1   the second best
  last        the newest whole checkpoint             last~2   the one two before it
  step:450    the newest checkpoint of step 450       epoch:45 the newest one of epoch 45
  pin:paper   the one pinned as "paper"
  step-00000450                                       its own name, as ls prints it

For example: highcamp show runs/digits@best~1, highcamp verify @last, highcamp export @pin:paper -o model.safetensors
""",
    "exit-codes": """\
  0    done, also when nothing was to do
  1    findings: something on disk is not as it was committed
  2    usage: an argument that cannot work, or something that is not installed
  3    partly done, or the disk failed
  10   no run there
  11   another live process writes to the run
  12   no such checkpoint
  13   refused: it would remove something protected, or the file exists
  130  interrupted
""",
    "environment": """\
  HIGHCAMP_RUN      the run that is meant where none is given
  NO_COLOR          no colors; marks are words or signs in any case
  FORCE_COLOR       colors where they would not be guessed, on a terminal
  COLUMNS           how wide tables may be
  KERAS_BACKEND     the backend of highcamp demo: torch, jax or tensorflow
  HIGHCAMP_DEADLINE   when training must be gone: seconds since the epoch, or an ISO time; it saves and ends in time,
                      with exit code 75. Without it the end of the Slurm job (SLURM_JOB_END_TIME); empty: neither

None of them changes what a training script saves or keeps otherwise.
""",
}


@click.command("help", context_settings=CONTEXT, short_help=COMMANDS["help"][2])
@click.argument("topic", required=False, type=click.Choice([*TOPICS, *COMMANDS]), metavar="[TOPIC]")
@click.pass_context
def topics(context: click.Context, topic: str | None) -> int:
    """Explain a topic (refs, exit-codes, environment) or a command."""
    parent = context.find_root()
    if topic is None:
        click.echo(parent.get_help())
        click.echo("\nTopics: " + ", ".join(f"highcamp help {name}" for name in TOPICS))
    elif topic in TOPICS:
        click.echo(TOPICS[topic].rstrip())
    else:
        group = parent.command
        found = group.get_command(parent, topic) if isinstance(group, click.Group) else None
        if found is not None:
            with click.Context(found, info_name=topic, parent=parent) as inner:
                click.echo(found.get_help(inner))
    return 0

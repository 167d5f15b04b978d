"""The program `highcamp`: its commands, each imported when it is called, and how errors are said."""

from __future__ import annotations

import difflib
import functools
import importlib
import json
import os
import sys
import traceback
from typing import TYPE_CHECKING, Any

import click

import highcamp
from highcamp.cli.output import Output, write_message
from highcamp.cli.text import plain
from highcamp.errors import HighcampError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import override
else:

    def override(method: object) -> object:
        """What Python 3.12 has in `typing`: a word to the type checker, and nothing at run time."""
        return method


USAGE = 2
FAILED = 3
PIPE_CLOSED = 141  # 128 + SIGPIPE, as a shell counts programs that nobody listens to any more
INTERRUPTED = 130  # 128 + SIGINT

# Command -> the module it is in, the function there, and one line of help; in the order in which a person meets them.
COMMANDS = {
    "demo": ("demo.command", "demo", "Train a small network, kill it, see it go on, and look at the result."),
    "ls": ("ls", "ls", "List the checkpoints of a run, or the runs of a directory."),
    "show": ("show", "show", "Show the facts of a run or a checkpoint."),
    "best": ("best", "best", "Print the path of the best checkpoint."),
    "log": ("log", "log", "Print the history, one row per epoch, across restarts."),
    "plot": ("plot", "plot", "Draw the curves with the best epoch marked."),
    "verify": ("verify", "verify", "Compare every byte with its digest."),
    "prune": ("prune", "prune", "Move what the policy does not keep to the trash."),
    "rm": ("rm", "rm", "Move checkpoints to the trash."),
    "undelete": ("rm", "undelete", "Bring checkpoints back from the trash."),
    "pin": ("pin", "pin", "Give a checkpoint a name that protects it."),
    "unpin": ("pin", "unpin", "Take a pin away."),
    "export": ("export", "export", "Write the weights of a checkpoint to a file for other tools."),
    "run": ("run", "run", "Run a training command, and start it again when it crashes."),
    "help": ("topics", "topics", "Explain refs, exit-codes or environment."),
}

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Program(click.Group):
    """The group of all commands: imports the one that is called, and no other."""

    @override
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """All names, in the order of COMMANDS."""
        return list(COMMANDS)

    @override
    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The command of that name, imported now."""
        if cmd_name not in COMMANDS:
            return None
        module, function, _ = COMMANDS[cmd_name]
        command = getattr(importlib.import_module(f"highcamp.cli.{module}"), function)
        if not isinstance(command, click.Command):
            raise TypeError(f"highcamp.cli.{module}.{function} is no command")
        return command

    @override
    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command meant, or an error that names the nearest one."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0].lower(), COMMANDS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
            raise click.UsageError(f"there is no command {plain(args[0])!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    @override
    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """The list in the help, without importing a single command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])

    @override
    def invoke(self, ctx: click.Context) -> Any:
        """Run, and end quietly when the reader of our output has gone."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            silence_stdout()
            ctx.exit(PIPE_CLOSED)
        return result


def silence_stdout() -> None:
    """Let what is still buffered go nowhere: Python would complain at exit otherwise."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(cls=Program, invoke_without_command=True, context_settings=CONTEXT)
@click.version_option(highcamp.__version__, "--version", message="highcamp %(version)s")
@click.pass_context
def program(context: click.Context) -> None:
    """Keep the best model you have trained, and never lose more than moments of work.

    A command works on a run: the directory that a Checkpointer writes to. Without one it takes the nearest run
    upwards. RUN@REF is one of its checkpoints, such as runs/digits@best; @best alone means the nearest run.
    """
    if context.invoked_subcommand is None:
        from highcamp.cli.status import print_status

        print_status(Output())


def command(*, header: bool = False, epilog: str | None = None) -> Callable[[Callable[..., int | None]], click.Command]:
    """A command whose function gets an Output first and returns its exit code; adds the options that all share.

    header: whether it prints a table, so that `--header` makes sense.
    """

    def decorate(function: Callable[..., int | None]) -> click.Command:
        @functools.wraps(function)
        def run(*, as_json: bool, quiet: bool, debug: bool, header: bool = False, **options: Any) -> int:  # noqa: ARG001
            return function(Output(as_json=as_json, quiet=quiet, header=header), **options) or 0

        shared = [
            click.option("--debug", is_flag=True, help="Show the whole trace-back of an error."),
            click.option("-q", "--quiet", is_flag=True, help="No messages, no hints; data and errors only."),
            click.option(
                "--json", "as_json", is_flag=True, help="JSON instead of a table; fields are only ever added."
            ),
        ]
        if header:
            shared.append(click.option("--header", is_flag=True, help="Column titles in pipes too."))
        wrapped: Callable[..., int] = run
        for option in shared:
            wrapped = option(wrapped)
        name = function.__name__
        return click.command(name, context_settings=CONTEXT, epilog=epilog, short_help=COMMANDS[name][2])(wrapped)

    return decorate


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code; an error is one paragraph on stderr, or one object with `--json`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    ours = given[: given.index("--")] if "--" in given else given  # what follows belongs to the command that is run
    as_json, debug = "--json" in ours, "--debug" in ours
    try:
        result = program.main(args=given, prog_name="highcamp", standalone_mode=False)
    except HighcampError as error:
        if debug:
            traceback.print_exc()
        _say(error, as_json=as_json)
        return error.exit_code
    except click.ClickException as error:
        path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "highcamp"
        _say(
            HighcampError(error.format_message().rstrip("."), hint=f'"{path} --help" shows what there is'),
            as_json=as_json,
            code="usage",
            exit_code=USAGE,
        )
        return USAGE
    except (click.Abort, KeyboardInterrupt):
        write_message("interrupted")
        return INTERRUPTED
    except OSError as error:
        if debug:
            traceback.print_exc()
        named = f"{error.filename}: " if error.filename else ""
        _say(HighcampError(f"{named}{error.strerror or error}"), as_json=as_json, code="storage_error")
        return FAILED
    return result if isinstance(result, int) else 0


def _say(error: HighcampError, *, as_json: bool, code: str | None = None, exit_code: int | None = None) -> None:
    if as_json:
        said = {
            "code": code or _code(error),
            "exit_code": error.exit_code if exit_code is None else exit_code,
            "message": error.message,
            "path": error.path,
            "hint": error.hint,
        }
        write_message(json.dumps({"error": said}))
    else:
        # Lines are kept, because a mismatch lists one difference per line; what else is unprintable is escaped.
        write_message("highcamp: " + "\n".join(plain(line) for line in str(error).split("\n")))


def _code(error: HighcampError) -> str:
    """The error's class in snake_case: run_not_found."""
    name = type(error).__name__
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")

"""`highcamp rm` and `highcamp undelete`: single checkpoints to the trash and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from highcamp.cli.arguments import find_target, refer
from highcamp.cli.program import FAILED, command
from highcamp.cli.text import count, plain, size
from highcamp.errors import HighcampError, InvalidArgument, StorageError

if TYPE_CHECKING:
    from highcamp.cli.output import Output
    from highcamp.run.checkpoint import Checkpoint
    from highcamp.run.run import Run


@command(epilog="Without --apply nothing changes. All are looked at before the first one goes.")
@click.argument("targets", metavar="RUN@REF...", nargs=-1, required=True)
@click.option("--apply", "is_applied", is_flag=True, help="Do it.")
def rm(output: Output, targets: tuple[str, ...], is_applied: bool) -> int:  # noqa: FBT001
    """Move checkpoints to the trash. The best, the last, the one resumed from and pinned ones are refused."""
    chosen: dict[tuple[str, str], tuple[Run, Checkpoint]] = {}
    for argument in targets:
        target = find_target(argument)
        entry = target.checkpoint()
        chosen[(target.run.path, entry.name)] = (target.run, entry)
    for run, entry in chosen.values():
        run.check_removable(entry)
    total = sum(entry.size_bytes for _, entry in chosen.values())
    removed: list[str] = []
    failures: list[str] = []
    if is_applied:
        for run, entry in chosen.values():
            try:
                removed.append(run.remove(entry.name))
            except StorageError as error:
                failures.append(str(error))
    if output.as_json:
        output.json(
            "rm/1",
            applied=is_applied,
            items=[
                {"run": run.path, "name": entry.name, "frees_bytes": entry.size_bytes} for run, entry in chosen.values()
            ],
            removed=removed,
            failures=failures,
        )
    else:
        for _, entry in chosen.values():
            output.line(plain(entry.name))
        for failure in failures:
            output.message(f"highcamp: {plain(failure)}")
        if is_applied:
            run, entry = next(iter(chosen.values()))
            output.message(f"{len(removed)} of {count(len(chosen), 'checkpoint')} moved to the trash")
            output.hint(
                f"highcamp undelete {refer(run, entry.name)}", f"highcamp prune {refer(run)} --empty-trash --apply"
            )
        else:
            output.message(
                f"nothing was changed; --apply moves {count(len(chosen), 'checkpoint')}, {size(total)}, to the trash"
            )
    return FAILED if failures else 0


@command(epilog="Without a name after the @, or without an argument, it lists what is in the trash.")
@click.argument("targets", metavar="[RUN@NAME...]", nargs=-1)
@click.option(
    "--apply", "is_applied", is_flag=True, hidden=True, help="Accepted as in rm; bringing back needs no asking."
)
def undelete(output: Output, targets: tuple[str, ...], is_applied: bool) -> int:  # noqa: ARG001, FBT001
    """Bring checkpoints back from the trash by the name they had; without one, list what is there."""
    found = [find_target(argument) for argument in targets] or [find_target(None)]
    if any(target.reference is None for target in found):
        if len(found) > 1:
            raise InvalidArgument(
                "undelete was given a run without a name", hint="for example runs/digits@step-00000450"
            )
        _list_trash(output, found[0].run)
        return 0
    returned: list[dict[str, str]] = []
    failures: list[HighcampError] = []
    for target in found:
        try:
            returned.append({"run": target.run.path, "name": target.run.undelete(target.reference or "")})
        except HighcampError as error:
            if len(found) == 1:
                raise
            failures.append(error)
    if output.as_json:
        output.json("undelete/1", items=returned, failures=[str(failure) for failure in failures])
    else:
        for each in returned:
            output.line(plain(each["name"]))
        for failure in failures:
            output.message(f"highcamp: {plain(str(failure))}")
        output.message(f"{len(returned)} of {count(len(found), 'checkpoint')} brought back")
    if failures and not returned:
        return failures[0].exit_code
    return FAILED if failures else 0


def _list_trash(output: Output, run: Run) -> None:
    names = sorted(run.trash.values())
    if output.as_json:
        output.json("undelete/1", run=run.path, items=[], trash=names)
        return
    for name in names:
        output.line(plain(name))
    output.message("these are in the trash" if names else "the trash is empty")
    if names:
        output.hint(f"highcamp undelete {refer(run, names[-1])}")

"""`highcamp prune`: what the policy keeps and why, and what it removes."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from highcamp.cli.arguments import find_run, refer
from highcamp.cli.look import look
from highcamp.cli.program import command
from highcamp.cli.table import Column, Table
from highcamp.cli.text import MISSING, count, size
from highcamp.errors import InvalidArgument
from highcamp.run.commit import checkpoint_path

if TYPE_CHECKING:
    from highcamp.cli.output import Output
    from highcamp.policy.retention import Plan
    from highcamp.run.checkpoint import Checkpoint
    from highcamp.run.run import Run

LOUD = {"remove": "REMOVE", "weights": "WEIGHTS ONLY"}  # on a terminal; a word that is read past is no warning


@command(
    header=True,
    epilog="Without --apply nothing changes. Removed checkpoints go to the trash: undelete brings them back, and only "
    "--empty-trash frees their space.",
)
@click.argument("run", required=False)
@click.option("--best", type=click.IntRange(min=0), metavar="N", help="Keep the N best.")
@click.option("--last", type=click.IntRange(min=0), metavar="N", help="Keep the N last.")
@click.option(
    "--every-steps", type=click.IntRange(min=1), metavar="N", help="Keep those whose step is a multiple of N."
)
@click.option(
    "--every-epochs", type=click.IntRange(min=1), metavar="N", help="Keep those whose epoch is a multiple of N."
)
@click.option(
    "--best-weights-only/--best-whole",
    default=None,
    help="Of a best that is not among the last, keep its weights alone.",
)
@click.option("--empty-trash", is_flag=True, help="Remove for good what is in the trash, and prune nothing.")
@click.option("--apply", "is_applied", is_flag=True, help="Do it.")
def prune(
    output: Output,
    run: str | None,
    best: int | None,
    last: int | None,
    every_steps: int | None,
    every_epochs: int | None,
    best_weights_only: bool | None,  # noqa: FBT001
    empty_trash: bool,  # noqa: FBT001
    is_applied: bool,  # noqa: FBT001
) -> int:
    """Show which checkpoints of RUN its policy, or the one given here, keeps and why; with --apply, remove the others.

    A number not given here is the one the run was trained with. The best, the last, the one resumed from, pinned ones
    and the only whole one always stay.
    """
    found = find_run(run)
    asked: dict[str, int | bool | None] = {
        "best": best, "last": last, "every_steps": every_steps, "every_epochs": every_epochs,
        "best_weights_only": best_weights_only,
    }  # fmt: skip
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if empty_trash:
        if given:
            raise InvalidArgument("--empty-trash takes no other policy", hint="prune first, then empty the trash")
        return _empty_trash(output, found, is_applied=is_applied)
    seen = look(found)
    keep = replace(found.keep, **given)
    plan = found.prune(keep, dry_run=not is_applied)
    rows = [each for each in seen.checkpoints if each.name in plan.keep or each.name in plan.remove]
    going = [*plan.remove, *plan.strip]
    verdicts = [_verdict(each.name, plan) for each in rows]
    reasons = [", ".join(plan.keep.get(each.name, ())) or "no rule keeps it" for each in rows]
    frees = [_frees(each, verdict) for each, verdict in zip(rows, verdicts, strict=True)]
    freed = sum(frees)
    if output.as_json:
        output.json(
            "prune/1",
            run=found.path,
            applied=is_applied,
            keep=asdict(keep),
            items=[
                {"name": each.name, "verdict": verdict, "because": list(plan.keep.get(each.name, ())), "frees_bytes": n}
                for each, verdict, n in zip(rows, verdicts, frees, strict=True)
            ],
            removed=going if is_applied else [],
            frees_bytes=freed,
        )
        return 0
    if rows:
        output.table(
            Table(
                [
                    Column("CHECKPOINT", [each.name for each in rows], drop=0),
                    Column("EPOCH", [str(each.epoch) for each in rows], right=True),
                    Column("VERDICT", [LOUD.get(verdict, verdict) for verdict in verdicts], verdicts, drop=0),
                    Column("BECAUSE", reasons, drop=0, flexible=True),
                    Column("FREES", [size(n) if n else MISSING for n in frees], [str(n) for n in frees], right=True),
                ],
                styles=["" if verdict == "keep" else "yellow" for verdict in verdicts],
            )
        )
    if not going:
        output.message("nothing to remove" if rows else "no checkpoints yet")
    elif is_applied:
        output.message(
            f"{count(len(going), 'checkpoint')} moved to the trash; {size(freed)} come free when it is emptied"
        )
        output.hint(f"highcamp undelete {refer(found, going[-1])}", f"highcamp prune {refer(found)} --empty-trash")
    else:
        output.message(
            f"nothing was changed; --apply moves {count(len(going), 'checkpoint')}, {size(freed)}, to the trash"
        )
    return 0


def _verdict(name: str, plan: Plan) -> str:
    if name in plan.remove:
        return "remove"
    return "weights" if name in plan.strip else "keep"


def _frees(checkpoint: Checkpoint, verdict: str) -> int:
    """The bytes that come free when the trash is emptied; the files of weights are linked."""
    if verdict == "keep":
        return 0
    objects = checkpoint.manifest.objects.values()
    stay = {name for each in objects if each.weights is True for name in each.files} if verdict == "weights" else set()
    return sum(file.size for file in checkpoint.files if file.name not in stay)


def _empty_trash(output: Output, run: Run, *, is_applied: bool) -> int:
    trash = run.trash
    sizes = [_tree_bytes(run, entry) for entry in trash]
    total = sum(sizes)
    if is_applied:
        run.empty_trash()
    if output.as_json:
        output.json(
            "prune/1",
            run=run.path,
            applied=is_applied,
            items=[
                {"name": name, "verdict": "remove", "because": ["in the trash"], "frees_bytes": n}
                for name, n in zip(trash.values(), sizes, strict=True)
            ],
            frees_bytes=total,
        )
        return 0
    if trash:
        output.table(
            Table(
                [
                    Column("CHECKPOINT", list(trash.values()), drop=0),
                    Column("VERDICT", ["REMOVE" for _ in trash], ["remove" for _ in trash], drop=0),
                    Column("BECAUSE", ["in the trash" for _ in trash]),
                    Column("FREES", [size(n) for n in sizes], [str(n) for n in sizes], right=True),
                ]
            )
        )
        output.message(
            f"{size(total)} freed" if is_applied else f"nothing was changed; --apply frees {size(total)}, for good"
        )
    else:
        output.message("the trash is empty")
    return 0


def _tree_bytes(run: Run, trash: str) -> int:
    directory = checkpoint_path(trash)
    return sum(run.store.size(f"{directory}/{name}") or 0 for name in run.store.list(directory))

"""`highcamp show`: the facts of a run or of a checkpoint."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
import msgspec

from highcamp.cli.arguments import find_target, refer, shown_path
from highcamp.cli.log import attempt_facts, origin_words
from highcamp.cli.look import ENDINGS, look, monitor_facts
from highcamp.cli.program import command
from highcamp.cli.table import Column, Table
from highcamp.cli.text import MISSING, age, count, exact, number, plain, size
from highcamp.policy.pace import WRITE_BUDGET
from highcamp.run.history import format_time, total_cost
from highcamp.training.messages import nonfinite_words, percent, saves_words, seconds_words, written

if TYPE_CHECKING:
    from collections.abc import Sequence

    from highcamp.cli.look import Look
    from highcamp.cli.output import Output
    from highcamp.run.checkpoint import Checkpoint
    from highcamp.run.history import Failure, SaveCost
    from highcamp.run.settings import PaceFacts


@command()
@click.argument("run", metavar="[RUN[@REF]]", required=False)
@click.option("--layers", is_flag=True, help="Every tensor of a checkpoint: path, dtype, shape.")
def show(output: Output, run: str | None, layers: bool) -> int:  # noqa: FBT001
    """Show the facts of a run: monitor, cadence, cost of saving; or of one checkpoint: metrics, files, digests, versions."""
    target = find_target(run)
    seen = look(target.run)
    if target.reference is None and not layers:
        _show_run(output, seen)
    else:
        _show_checkpoint(output, seen, target.checkpoint("last"), layers=layers)
    return 0


def _show_run(output: Output, seen: Look) -> None:
    run = seen.run
    total = sum(each.size_bytes for each in seen.checkpoints)
    pace, saves = run.settings.pace, seen.history.saves
    cost = total_cost(each.cost for each in saves)
    if output.as_json:
        output.json(
            "show/1",
            run=run.path,
            run_id=run.run_id,
            created_at=format_time(run.created_at),
            state=seen.state_of_run,
            monitor=monitor_facts(seen.monitor),
            every=run.every,
            pace=msgspec.to_builtins(pace),
            saving={"count": len(saves), **_cost_facts(cost)} if saves else None,
            keep=asdict(run.keep),
            epoch=seen.epoch,
            epochs_planned=run.epochs_planned,
            best=seen.facts(seen.best) if seen.best else None,
            last=seen.facts(seen.last) if seen.last else None,
            pins=dict(seen.pins),
            attempts=[attempt_facts(attempt) for attempt in seen.history.attempts],
            failed_saves=[
                {"step": each.step, "epoch": each.epoch, "at": format_time(each.at), "reason": each.reason}
                for each in seen.history.failures
            ],
            checkpoint_count=len(seen.checkpoints),
            size_bytes=total,
            trash=sorted(run.trash.values()),
        )
        return
    planned = f" of {run.epochs_planned}" if run.epochs_planned else ""
    monitor = f"{seen.monitor.metric} ({seen.monitor.mode})" if seen.monitor else "none"
    if seen.monitor and seen.monitor.min_delta:
        monitor += f", by more than {number(seen.monitor.min_delta)}"
    facts = [
        ("run", shown_path(run.path)),
        ("id", run.run_id or MISSING),
        ("created", format_time(run.created_at)),
        ("state", seen.state_of_run),
        ("monitor", monitor),
        ("saves", run.every or MISSING),
        *([("pace", _pace_words(pace))] if pace else []),
        *([("cost of saving", _costs_words(cost, len(saves)))] if saves else []),
        *([("failed saves", _failures_words(seen.history.failures))] if seen.history.failures else []),
        ("keeps", _keep_words(seen)),
        ("epochs", f"{seen.epoch}{planned}"),
        ("best", _line(seen, seen.best)),
        ("last", _line(seen, seen.last)),
        *(("pin", f"{pin}: {name}") for pin, name in seen.pins.items()),
        ("checkpoints", f"{len(seen.checkpoints)}, {size(total)}"),
    ]
    if run.trash:
        facts.append(("trash", ", ".join(sorted(run.trash.values()))))
    for attempt in seen.history.attempts:
        is_now = attempt is seen.history.attempts[-1] and seen.state_of_run == "running"
        words = [origin_words(attempt)] if attempt.number > 1 else []
        words.append("running" if is_now else ENDINGS.get(attempt.ended, "stopped"))
        facts.append(("attempt", f"{attempt.number}  {format_time(attempt.started_at)}  {'; '.join(words)}"))
    _print_facts(output, facts)
    output.hint(f"highcamp ls {refer(run)}".rstrip(), f"highcamp show {refer(run, 'best' if seen.best else 'last')}")


def _show_checkpoint(output: Output, seen: Look, entry: Checkpoint, *, layers: bool) -> None:
    tensors = [
        (f"{name}/{path}", array.dtype.name, list(array.shape), array.nbytes)
        for name in (entry.objects if layers else ())
        for path, array in entry.load(name).items()
    ]
    save = seen.history.save_of(entry.name, entry.attempt)
    if output.as_json:
        output.json(
            "show/1",
            run=seen.run.path,
            **seen.facts(entry),
            parent=entry.parent,
            save=_cost_facts(save.cost) if save else None,
            nonfinite_weights=msgspec.to_builtins(entry.manifest.health) if entry.is_healthy is False else None,
            objects=[
                {
                    "name": name,
                    "tensor_count": found.tensors,
                    "tensor_bytes": found.bytes,
                    "files": list(found.files),
                    "weights": found.weights if isinstance(found.weights, bool) else None,
                }
                for name, found in entry.manifest.objects.items()
            ],
            files=[{"name": file.name, "size_bytes": file.size, "digest": file.digest} for file in entry.files],
            pins=[pin for pin, name in seen.pins.items() if name == entry.name],
            versions=entry.versions,
            **(
                {"tensors": [{"name": n, "dtype": d, "shape": s, "size_bytes": b} for n, d, s, b in tensors]}
                if layers
                else {}
            ),
        )
        return
    if layers:
        output.table(
            Table(
                [
                    Column("TENSOR", [name for name, *_ in tensors], drop=0),
                    Column("DTYPE", [dtype for _, dtype, *_ in tensors]),
                    Column("SHAPE", [str(tuple(shape)) for _, _, shape, _ in tensors]),
                    Column("SIZE", [size(n) for *_, n in tensors], [str(n) for *_, n in tensors], right=True),
                ]
            )
        )
        return
    batch = f", and {entry.batch} batch{'' if entry.batch == 1 else 'es'} of the next" if entry.batch else ""
    saved = f"{format_time(entry.created_at)}"
    if output.is_terminal:
        saved += f" ({age((seen.at - entry.created_at).total_seconds())} ago)"
    facts = [
        ("checkpoint", entry.name),
        ("path", shown_path(entry.path)),
        ("epoch", f"{entry.epoch}{batch}"),
        ("step", str(entry.step)),
        ("attempt", str(entry.attempt)),
        ("saved", saved),
        *([("cost of saving", _cost_words(save.cost))] if save else []),
        *((name, number(value) if output.is_terminal else exact(value)) for name, value in entry.metrics.items()),
        ("kept because", ", ".join(seen.reasons(entry.name)) or "not pruned yet"),
        ("state", seen.state(entry.name)),
        ("health", _health_words(entry)),
        *([("holds", "weights only: training cannot resume from it")] if entry.manifest.is_weights_only else []),
        ("parent", entry.parent or MISSING),
        *(("file", f"{file.name}  {size(file.size)}  {file.digest}") for file in entry.files),
        *(
            (
                "object",
                f"{name}: {count(found.tensors, 'tensor')}, {size(found.bytes)}"
                if found.tensors
                else f"{name}: no tensors",
            )
            for name, found in entry.manifest.objects.items()
        ),
        ("written with", ", ".join(f"{name} {version}" for name, version in entry.versions.items()) or MISSING),
    ]
    _print_facts(output, facts)
    output.hint(
        f"highcamp verify {refer(seen.run, entry.name)}", f"highcamp show {refer(seen.run, entry.name)} --layers"
    )


def _failures_words(failures: Sequence[Failure]) -> str:
    newest = failures[-1]
    return f"{len(failures)}, the last at step {newest.step}: {newest.reason}"


def _health_words(entry: Checkpoint) -> str:
    health = entry.manifest.health
    if health is msgspec.UNSET:
        return "not known"
    return f"not healthy: {nonfinite_words(health)}" if health.nonfinite else "no weight is NaN or infinite"


def _print_facts(output: Output, facts: list[tuple[str, str]]) -> None:
    """A name and a value per line; tab-separated in a pipe."""
    if not output.is_terminal:
        output.table(
            Table([Column("FACT", [name for name, _ in facts]), Column("VALUE", [value for _, value in facts])])
        )
        return
    width = max(len(plain(name)) for name, _ in facts)
    for name, value in facts:
        start = f"{plain(name):<{width}}  "
        lines = textwrap.wrap(plain(value), output.width, initial_indent=start, subsequent_indent=" " * len(start))
        for line in lines or [start]:
            output.line(line)


def _line(seen: Look, entry: Checkpoint | None) -> str:
    if entry is None:
        return "none"
    value = seen.value(entry.metrics)
    watched = f", {seen.monitor.metric} {number(value)}" if seen.monitor and value is not None else ""
    return f"{entry.name}, epoch {entry.epoch}{watched}"


def _keep_words(seen: Look) -> str:
    keep = seen.run.keep
    words = [f"best {keep.best}", f"last {keep.last}"]
    if keep.every_steps:
        words.append(f"every {count(keep.every_steps, 'step')}")
    if keep.every_epochs:
        words.append(f"every {count(keep.every_epochs, 'epoch')}")
    if keep.best_weights_only:
        words.append("weights only of a best that nothing else keeps")
    return ", ".join(words)


def _pace_words(pace: PaceFacts) -> str:
    """What `Every.auto` has chosen, and why."""
    allowed = f"{100 * pace.overhead:.12g} %"
    because = {
        "cost": f"a save costs the loop {seconds_words(pace.cost_seconds)}, and {allowed} is allowed",
        "pipe": f"a save is durable after {seconds_words(pace.durable_seconds)}, and the next one waits for it",
        "wear": f"a save writes {size(pace.new_bytes)}, and {size(int(WRITE_BUDGET))}/s on average spare the drive",
        "step": f"even that costs no more than {allowed}",
        "share": f"saving more often has cost more than {allowed}",
    }.get(pace.because, pace.because)
    return (
        f"every {'step' if pace.steps == 1 else count(pace.steps, 'step')} ({seconds_words(pace.seconds)}): {because}; "
        f"a crash costs {seconds_words(pace.expected_loss_seconds)} of work on average"
    )


def _cost_words(cost: SaveCost) -> str:
    """What one save has cost."""
    waited = f", wait {seconds_words(cost.wait_seconds)}" if cost.wait_seconds >= 1e-3 else ""
    share = "" if cost.share is None else f", {percent(cost.share)} of the time since the save before"
    return f"pause {seconds_words(cost.pause_seconds)}{waited}{share}; {written(cost)}"


def _costs_words(cost: SaveCost, saves: int) -> str:
    """What all saves of a run have cost together."""
    return saves_words(saves, cost.pause_seconds / saves, cost.bytes_per_second, cost.share)


def _cost_facts(cost: SaveCost) -> dict[str, Any]:
    """The same as JSON holds it."""
    facts = {name: getattr(cost, name) for name in cost.__struct_fields__}
    return {**facts, "bytes_per_second": cost.bytes_per_second, "share": cost.share}

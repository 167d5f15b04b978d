"""What training says: one line per event, on standard error, in words that Keras users know."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from highcamp.core.manifest import Health

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from highcamp.errors import HighcampError
    from highcamp.run.checkpoint import Checkpoint
    from highcamp.run.history import SaveCost

FEW_TENSORS = 3  # named in one line


def _print_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201


@dataclass
class Voice:
    """Where messages go. verbose: 0 warnings only, 1 one line per event, 2 details of every save and removal."""

    verbose: int = 1
    write: Callable[[str], None] = field(default=_print_line)

    def say(self, line: str, *, level: int = 1) -> None:
        """Say `line` if `verbose` is at least `level`; level 0 is a warning."""
        if self.verbose >= level:
            with suppress(OSError, ValueError):  # a terminal that has gone away must not end training
                self.write(line)


def two_numbers(one: float, other: float) -> tuple[str, str]:
    """Both with five decimals, or as many as it takes to tell them apart; exponents where decimals would be all zero."""
    for digits in range(5, 18):
        texts = (f"{one:.{digits}f}", f"{other:.{digits}f}")
        if texts[0] != texts[1] and all(
            value == 0 or float(text) for value, text in zip((one, other), texts, strict=True)
        ):
            return texts
    return (f"{one:.17g}", f"{other:.17g}") if one != other else (f"{one:.5f}", f"{other:.5f}")


def one_number(value: float) -> str:
    """Five decimals, or an exponent where they would be all but zero."""
    return f"{value:.5f}" if value == 0 or abs(value) >= 1e-4 else f"{value:.4e}"


def improved(epoch: int, metric: str, old: float | None, new: float, name: str | None) -> str:
    """A better value. old: None for the first one. name: the checkpoint being saved, if one is."""
    saving = f", saving {name}" if name else ", not saved: none is due"
    if old is None:
        return f"Epoch {epoch}: {metric} improved to {one_number(new)}{saving}"
    before, after = two_numbers(old, new)
    return f"Epoch {epoch}: {metric} improved from {before} to {after}{saving}"


def not_improved(epoch: int, metric: str, best: float, best_epoch: int) -> str:
    """A value that is no better."""
    return f"Epoch {epoch}: {metric} did not improve from {one_number(best)} (epoch {best_epoch})"


def not_finite(epoch: int, metric: str, value: float, best_epoch: int | None) -> str:
    """NaN or an infinity."""
    stays = f"best stays epoch {best_epoch}" if best_epoch is not None else "there is no best yet"
    return f"Epoch {epoch}: {metric} is {value}; recorded, not ranked ({stays})"


def is_training_metric(metric: str) -> bool:
    """Whether a name says that the metric is measured on the training data, as Keras's "loss" is."""
    return metric.startswith("train") or metric in ("loss", "acc", "accuracy")


def training_metric(metric: str) -> str:
    """The monitored metric is measured while the weights change."""
    return f"{metric} is measured on training data, mostly as a mean over an epoch in which the weights change; val_… tells more"


def metric_missing(epoch: int, metric: str, there: Iterable[str]) -> str:
    """The monitored metric was not logged."""
    names = ", ".join(there) or "no metrics at all"
    return f'Epoch {epoch}: no "{metric}" among {names}; checkpoints are saved unranked'


def resumed(name: str, epoch: int, batch: int, attempt: int, to_go: int | None) -> str:
    """Where a run goes on. to_go: epochs that are left, None where epochs are not counted."""
    place = f"epoch {epoch}, " if epoch or batch else ""
    place += f"batch {batch} of the next, " if batch else ""
    rest = "" if to_go is None else f"; {counted(to_go, 'epoch')} to go"
    return f"Resumed from {name} ({place}attempt {attempt}){rest}"


def counted(count: int, noun: str) -> str:
    """A number with its noun in the singular or the plural."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def fell_back(error: HighcampError, name: str) -> str:
    """A damaged checkpoint was passed over."""
    return f"{error.message}; resumed from {name} instead"


def passed_over(name: str, why: str) -> str:
    """Something lies among the checkpoints that cannot be read as one."""
    return f"{name} is passed over and left as it is: {why}"


def nonfinite_words(health: Health) -> str:
    """What is wrong with weights, in short: NaN in model/fc.weight, infinity in model/fc.bias and 3 more tensors."""
    spelled = {"nan": "NaN", "inf": "infinity"}
    shown = list(health.tensors.items())[:FEW_TENSORS]
    words = ", ".join(f"{spelled.get(word, word)} in {name}" for name, word in shown)
    more = health.nonfinite - len(shown)
    return f"{words} and {counted(more, 'more tensor')}" if more > 0 else words


def unhealthy(checkpoint: Checkpoint) -> str:
    """A checkpoint was saved whose weights are not finite; said once."""
    return (
        f"{checkpoint.name} is saved but not healthy: {nonfinite_words(_health(checkpoint))} at step {checkpoint.step}. "
        "A restart goes on from the newest healthy checkpoint, and restore() does so now; against the cause help a lower "
        "learning rate, clipped gradients or another precision"
    )


def unhealthy_passed_over(newer: Sequence[Checkpoint], name: str) -> str:
    """Newer checkpoints, the newest first, are not what training goes on from. name: what is."""
    oldest = newer[-1]
    others = f" and {counted(len(newer) - 1, 'newer checkpoint')}" if len(newer) > 1 else ""
    are, they = ("are", "they stay as they are") if others else ("is", "it stays as it is")
    return (
        f"{oldest.name}{others} {are} not healthy ({nonfinite_words(_health(oldest))}), so training goes on from {name}, "
        f"the newest that is; {they}"
    )


def none_healthy(checkpoint: Checkpoint) -> str:
    """Training goes on from weights that are not finite, because there are no others."""
    return (
        f"No whole checkpoint is healthy, so training goes on from {checkpoint.name}, which has "
        f"{nonfinite_words(_health(checkpoint))}: what is learned from there on may be lost; to begin anew, use another "
        "directory"
    )


def _health(checkpoint: Checkpoint) -> Health:
    health = checkpoint.manifest.health
    return Health() if health is msgspec.UNSET else health


def complete(done: int, planned: int) -> str:
    """Nothing left to do."""
    return f"Run is complete ({done} of {planned} epochs); nothing to train. epochs({done + 10}) would go on"


def best_not_saved(epoch: int, metric: str, value: float) -> str:
    """The best epoch seen has no checkpoint, because none was due at its end."""
    return (
        f"The best, epoch {epoch} with {metric} {value:.5g}, was not saved, because no checkpoint was due then; "
        "every=Every(epochs=1), together with steps= or seconds=, saves each epoch"
    )


def nothing_saved(path: str) -> str:
    """Something was logged, but no checkpoint was made."""
    return f"Nothing was saved in {path}: loop over checkpointer.epochs(n), or call save()"


def saved(name: str, cost: SaveCost) -> str:
    """A save is durable: what it took, and what it wrote."""
    waited = f", waited {seconds_words(cost.wait_seconds)} for the save before" if cost.wait_seconds >= 1e-3 else ""
    return f"saved {name}: pause {seconds_words(cost.pause_seconds)}{waited}, {written(cost)}"


def written(cost: SaveCost) -> str:
    """How long it took until a save was durable, what it wrote and how fast."""
    linked = f", {size_words(cost.linked_bytes)} linked" if cost.linked_bytes else ""
    rate = f", {size_words(cost.bytes_per_second)}/s" if cost.bytes_per_second else ""
    return f"durable after {seconds_words(cost.durable_seconds)}, {size_words(cost.new_bytes)} written{linked}{rate}"


def saves_words(count: int, pause_seconds: float, bytes_per_second: float | None, share: float | None) -> str:
    """Several saves in short: 12 saves, pause 3.1 ms each, 1.2 GB/s, 0.4 % of training time. pause_seconds: of each."""
    pause = f", pause {seconds_words(pause_seconds)}{'' if count == 1 else ' each'}"
    rate = f", {size_words(bytes_per_second)}/s" if bytes_per_second else ""
    return f"{counted(count, 'save')}{pause}{rate}" + ("" if share is None else f", {percent(share)} of training time")


def saving_is_dear(
    share: float, elapsed: float, pause: float, wait: float, slowed: float, *, is_auto: bool, overlaps: bool
) -> str:
    """Saving costs much. elapsed: in how many seconds. pause, wait, slowed: what one save has cost on average, in seconds.

    is_auto, overlaps: what is in use already.
    """
    advice = [] if is_auto else ["every=Every.auto() saves as often as 1 % of the time allows"]
    if not overlaps and pause >= (pause + wait + slowed) / 4:
        advice.append('snapshot="overlap" shortens the pause')
    minutes = counted(round(elapsed / 60), "minute")
    parts = [
        f"{word} {seconds_words(seconds)}"
        for word, seconds in (("pause", pause), ("wait", wait), ("slower steps", slowed))
        if seconds >= 1e-3 or word == "pause"
    ]
    return (
        f"Saving took {percent(share)} of the last {minutes} ({', '.join(parts)} per save); "
        f"{', '.join(advice) or 'save less often'}"
    )


def no_memory_tier(error: HighcampError) -> str:
    """Shared memory cannot be used."""
    return f"no snapshots are kept in shared memory: {error}"


def recovered(name: str, before: int) -> str:
    """A snapshot in shared memory has outlived its process. before: the step of the last checkpoint on disk, -1 for none."""
    behind = f"newer than step {before} on disk" if before >= 0 else "there is nothing on disk yet"
    return f"Recovered {name} from shared memory ({behind})"


def kept_in_memory(count: int, pause_seconds: float) -> str:
    """How often the state was copied to shared memory."""
    return f"{counted(count, 'snapshot')} in shared memory, pause {seconds_words(pause_seconds)} each"


def percent(share: float) -> str:
    """A share of something: 0.4 %."""
    return f"{100 * share:.1f} %"


def seconds_words(seconds: float) -> str:
    """A stretch of time in three digits or fewer: 3.1 ms, 840 ms, 1.5 s, 12 s."""
    if seconds < 0.9995:
        return f"{1e3 * seconds:.1f} ms" if seconds < 0.00995 else f"{1e3 * seconds:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"


def size_words(size_bytes: float) -> str:
    """Bytes in decimal units: 812 B, 1.2 kB, 137 MB, 1.5 GB."""
    for unit, length in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= 0.9995 * length:
            amount = size_bytes / length
            return f"{amount:.1f} {unit}" if amount < 9.95 else f"{amount:.0f} {unit}"
    return f"{size_bytes:.0f} B"


def summary(
    best: tuple[str, float, str, str] | None,
    saves: int,
    share: float,
    path: str,
    *,
    pause_seconds: float | None = None,
    bytes_per_second: float | None = None,
) -> str:
    """The last line. best: where, value, metric, path of the best checkpoint. share: of training time that saving took.

    pause_seconds: of one save. bytes_per_second: at which they were written.
    """
    head = "" if best is None else f"Best: {best[0]}, {best[2]} {one_number(best[1])} -> {best[3]} · "
    costs = f"{counted(saves, 'save')}, {percent(share)} of training time"
    if pause_seconds is not None:
        costs = saves_words(saves, pause_seconds, bytes_per_second, share)
    return f"{head}{costs} · highcamp ls {path}"


def failed_saves(count: int, reason: str) -> str:
    """Training has ended well, though not everything that was due was saved."""
    word = "save" if count == 1 else "saves"
    return f"{count} {word} failed while training went on, the last because: {reason}"

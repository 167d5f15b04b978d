"""Resume: the newest healthy checkpoint that is whole, and what is said of those that are not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from highcamp.errors import Damaged, HighcampError, Refused
from highcamp.run.restoring import Overwritten
from highcamp.run.verify import verify_unlisted
from highcamp.training import messages

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from highcamp.run.attempt import OngoingAttempt
    from highcamp.run.checkpoint import Checkpoint
    from highcamp.run.verify import Verification
    from highcamp.storage.store import Store
    from highcamp.training.messages import Voice


def newest_whole(attempt: OngoingAttempt, voice: Voice, load: Callable[[Checkpoint], object]) -> Checkpoint | None:
    """Call `load` with each checkpoint, in the order of `preferred`, until one is not Damaged, and return that one.

    A damaged one may have been read into live objects in part; the next one overwrites all of it. One that holds weights
    alone is passed over. None if the run has no checkpoints at all. Raises Damaged if it has some and none is whole, Refused
    if all hold weights alone: training from the start over what may still be saved is for a person to decide. This error,
    and any that `load` raises, says of live objects if they are undefined.
    """
    checkpoints = preferred(attempt.run.checkpoints)
    known = [checkpoint.name for checkpoint in checkpoints]
    unlisted = _damaged_unlisted(attempt.run.store, known)
    strangers = [entry.name for entry in verify_unlisted(attempt.run.store, known) if entry.state == "foreign"]
    if strangers and not checkpoints:  # one that was copied in beside our own is listed as unreadable, and left alone
        raise Refused(
            f"{attempt.run.path} holds checkpoints of another run: {', '.join(strangers[:5])}",
            path=attempt.run.path,
            hint="move them away, or use another directory: two runs in one are never told apart again",
        )
    for entry in unlisted:
        voice.say(messages.passed_over(entry.name, entry.findings[0].message), level=0)
    errors: list[Damaged] = []
    stripped: list[str] = []
    for checkpoint in checkpoints:
        if checkpoint.manifest.is_weights_only:
            stripped.append(checkpoint.name)
            continue
        try:
            load(checkpoint)
        except Damaged as error:
            errors.append(error)
            attempt.note_damaged(checkpoint.name)
        except HighcampError as error:
            for damage in errors:
                voice.say(damage.message, level=0)
            error.hint = _advice(error.hint, errors)
            raise
        else:
            for damage in errors:
                voice.say(messages.fell_back(damage, checkpoint.name), level=0)
            for name in stripped:
                voice.say(messages.passed_over(name, "it holds weights alone, so training cannot resume from it"))
            _tell_health(checkpoint, checkpoints, voice)
            return checkpoint
    for damage in errors:
        voice.say(damage.message, level=0)
    if errors or unlisted:
        names = [name for name in known if name not in stripped] + [entry.name for entry in unlisted]
        weights = f"{_weights_there(stripped)}; " if stripped else ""
        raise Damaged(
            f"{attempt.run.path} has checkpoints, but none is whole: {', '.join(names)}",
            path=attempt.run.path,
            hint=_advice(
                f'{weights}"highcamp verify {attempt.run.path}" shows what is left; to start anew, use another directory',
                errors,
            ),
        )
    if stripped:
        raise Refused(
            f"{attempt.run.path} has nothing that training could resume from: {', '.join(stripped)} "
            f"{'holds' if len(stripped) == 1 else 'hold'} weights alone, no state of an optimizer",
            path=attempt.run.path,
            hint=f"{_weights_there(stripped)}; to train on from them, use another directory",
        )
    return None


def preferred(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Those that training would resume from, first come first: the newest, but known to be unhealthy ones behind all others.

    checkpoints: in (step, sequence) order. What a step makes of weights that are NaN is NaN again, so a run that goes on
    from them has ended, and would not be told.
    """
    newest_first = checkpoints[::-1]
    unhealthy = [each for each in newest_first if each.is_healthy is False]
    return [each for each in newest_first if each.is_healthy is not False] + unhealthy


def _tell_health(chosen: Checkpoint, checkpoints: Sequence[Checkpoint], voice: Voice) -> None:
    """Say, of the checkpoint that training goes on from, if newer ones are unhealthy, or if it is itself."""
    if chosen.is_healthy is False:
        voice.say(messages.none_healthy(chosen), level=0)
        return
    order = chosen.manifest.order
    unhealthy = [each for each in checkpoints if each.is_healthy is False and not each.manifest.is_weights_only]
    newer = [each for each in unhealthy if each.manifest.order > order]
    if newer:
        voice.say(messages.unhealthy_passed_over(newer, chosen.name), level=0)


def _weights_there(names: Sequence[str]) -> str:
    return f'restore("best") or restore("{names[0]}") gives the weights back'


def _advice(hint: str | None, errors: Sequence[Damaged]) -> str | None:
    """The hint, and that the tracked objects are undefined, if damaged checkpoints have been read into them in part."""
    if not any(isinstance(error, Overwritten) for error in errors):
        return hint
    told = (
        "the tracked objects are undefined now, because what is damaged was found when it had been read into them: "
        "make them anew; where they must survive, call verify() first"
    )
    return f"{hint}; {told}" if hint else told


def _damaged_unlisted(store: Store, known: Sequence[str]) -> list[Verification]:
    """What was a checkpoint, as far as can be told without its manifest; an unfinished save has no manifest at all."""
    return [entry for entry in verify_unlisted(store, known) if entry.state in ("altered", "unreadable")]

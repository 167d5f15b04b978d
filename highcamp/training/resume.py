"""Resume: the newest checkpoint that is whole, and what is said of those that are not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from highcamp.errors import Damaged, Refused
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
    """Call `load` with each checkpoint, newest first, until one is not Damaged, and return that one.

    None if the run has no checkpoints at all. Raises Damaged if it has some and none is whole: training from the start
    over what may still be saved is for a person to decide.
    """
    checkpoints = list(reversed(attempt.run.checkpoints))
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
    for checkpoint in checkpoints:
        try:
            load(checkpoint)
        except Damaged as error:
            errors.append(error)
            attempt.note_damaged(checkpoint.name)
        else:
            for damage in errors:
                voice.say(messages.fell_back(damage, checkpoint.name), level=0)
            return checkpoint
    for damage in errors:
        voice.say(damage.message, level=0)
    if errors or unlisted:
        names = [*(checkpoint.name for checkpoint in checkpoints), *(entry.name for entry in unlisted)]
        raise Damaged(
            f"{attempt.run.path} has checkpoints, but none is whole: {', '.join(names)}",
            path=attempt.run.path,
            hint=f'"highcamp verify {attempt.run.path}" shows what is left; to start anew, use another directory',
        )
    return None


def _damaged_unlisted(store: Store, known: Sequence[str]) -> list[Verification]:
    """What was a checkpoint, as far as can be told without its manifest; an unfinished save has no manifest at all."""
    return [entry for entry in verify_unlisted(store, known) if entry.state in ("altered", "unreadable")]

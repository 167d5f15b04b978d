"""Resume: the newest checkpoint that is whole, and what is said of those that are not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from highcamp.errors import Damaged
from highcamp.run.verify import verify_unlisted
from highcamp.training import messages

if TYPE_CHECKING:
    from collections.abc import Callable

    from highcamp.run.attempt import OngoingAttempt
    from highcamp.run.checkpoint import Checkpoint
    from highcamp.training.messages import Voice


def newest_whole(attempt: OngoingAttempt, voice: Voice, load: Callable[[Checkpoint], object]) -> Checkpoint | None:
    """Call `load` with each checkpoint, newest first, until one is not Damaged, and return that one.

    None if the run has no checkpoints at all. Raises Damaged if it has some and none is whole: training from the start
    over what may still be saved is for a person to decide.
    """
    checkpoints = list(reversed(attempt.run.checkpoints))
    errors: list[Damaged] = []
    for place, checkpoint in enumerate(checkpoints):
        try:
            load(checkpoint)
        except Damaged as error:
            errors.append(error)
            attempt.note_damaged(checkpoint.name)
            older = checkpoints[place + 1].name if place + 1 < len(checkpoints) else None
            voice.say(messages.fell_back(error, older), level=0)
        else:
            return checkpoint
    known = [checkpoint.name for checkpoint in checkpoints]
    unlisted = [
        entry for entry in verify_unlisted(attempt.run.store, known) if entry.state in ("altered", "unreadable")
    ]
    if errors or unlisted:
        names = [*known, *(entry.name for entry in unlisted)]
        raise Damaged(
            f"{attempt.run.path} has checkpoints, but none is whole: {', '.join(names)}",
            path=attempt.run.path,
            hint=f'"highcamp verify {attempt.run.path}" shows what is left; to start anew, use another directory',
        )
    return None

"""The Trainer: how a callback finds it, which ones can be resumed exactly, and what it takes for the best."""

from __future__ import annotations

import sys
from typing import Any, Literal

from highcamp.errors import InvalidArgument, InvalidState, Refused
from highcamp.policy.monitor import Monitor

LOOP = "_inner_training_loop"
"""The method of a Trainer that runs its loop."""
PLACE = "_init_training_state"
"""The one that sets up TrainerState, and says at which epoch and batch the loop begins."""
_MAX_FRAMES = 8  # Trainer.__init__ -> on_init_end -> call_event -> ours is three; subclasses and decorators add a few


def calling(callback: Any) -> Any:
    """The Trainer that is making itself and calls us, None if nobody of that kind does.

    It gives its callbacks no way to itself; only looked at, never changed.
    """
    frame = sys._getframe(1)  # noqa: SLF001  (there is no other door)
    for _ in range(_MAX_FRAMES):
        back = frame.f_back
        if back is None:
            return None
        frame = back
        found = frame.f_locals.get("self")
        callbacks = getattr(getattr(found, "callback_handler", None), "callbacks", ())
        if any(each is callback for each in callbacks):
            return found
    return None


def check(trainer: Any, others: int) -> None:
    """Whether this Trainer can be resumed exactly. others: CheckpointCallbacks that it has besides the one that asks.

    Raises Refused, InvalidArgument, InvalidState.
    """
    args = trainer.args
    if args.world_size > 1:
        raise Refused(
            f"CheckpointCallback saves one process's training, this one has {args.world_size} processes",
            hint="train in one process; several are not supported yet",
        )
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise Refused(
            "CheckpointCallback cannot save what DeepSpeed or FSDP has divided",
            hint="train without them, in one process",
        )
    if args.ignore_data_skip:
        raise InvalidArgument(
            "ignore_data_skip=True would train on the first batches of an epoch twice after a restart",
            hint="leave it out; batches are passed over without being read",
        )
    if others:
        raise InvalidArgument(
            f"{others + 1} CheckpointCallbacks on one Trainer: a training goes on from one run",
            hint="keep one; several of the best are kept with keep=Keep(best=3)",
        )
    missing = [name for name in (LOOP, PLACE) if not callable(getattr(trainer, name, None))]
    if missing:
        raise InvalidState(
            f"{type(trainer).__name__} has no {' and no '.join(missing)}: its loop is not the one that highcamp knows",
            hint="use transformers' Trainer, 5.23 or newer, or a subclass that keeps its loop",
        )


def monitor_of(args: Any) -> Monitor | None:
    """What TrainingArguments take for the best; None if they do not say."""
    name = args.metric_for_best_model
    if name is None:
        return None
    name = name if name.startswith("eval_") else f"eval_{name}"
    asked: Literal["min", "max"] = "max" if args.greater_is_better else "min"
    try:
        monitor = Monitor(name)
    except InvalidArgument:  # a name that says nothing of its direction
        return Monitor(name, asked)
    if monitor.mode != asked:  # Trainer takes every name that does not end in "loss" for one of which more is better
        raise InvalidArgument(
            f"metric_for_best_model is {args.metric_for_best_model!r} and greater_is_better is {args.greater_is_better}, "
            f"but of {name} {'less' if monitor.mode == 'min' else 'more'} is better",
            hint=f"set greater_is_better={monitor.mode == 'max'}, or say monitor=Monitor({name!r}, mode={asked!r})",
        )
    return monitor

"""Arguments as people type them: names of other libraries, metrics that are arrays of one number."""

from __future__ import annotations

import difflib
import numbers
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from highcamp.errors import InvalidArgument, InvalidMetric
from highcamp.policy.cadence import Every
from highcamp.policy.retention import Keep

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_METRIC_NAME = 200  # longer ones are sentences, and make every table unreadable

_HABITS = {
    "filepath": "directory", "dirpath": "directory", "backup_dir": "directory", "save_folder": "directory",
    "mode": 'monitor=Monitor("val_loss", mode="min")', "greater_is_better": 'monitor=Monitor(…, mode="max")',
    "metric_for_best_model": "monitor", "score_name": "monitor", "score_function": "monitor", "comp": "monitor",
    "best_fn": "monitor", "best_mode": "monitor=Monitor(…, mode=…)",
    "initial_value_threshold": "nothing: the best is found again after a restart",
    "save_best_only": "keep=Keep(best=1, last=1)", "save_top_k": "keep=Keep(best=…)", "save_last": "keep=Keep(last=1)",
    "n_saved": "keep=Keep(best=…)", "save_total_limit": "keep=Keep(last=…)", "total_limit": "keep=Keep(last=…)",
    "max_to_keep": "keep=Keep(last=…)", "keep_period": "keep=Keep(every_steps=…)",
    "load_best_model_at_end": 'restore("best") after training',
    "save_weights_only": 'run.best.load("model") for weights alone',
    "save_freq": "every=Every(steps=…) or every=Every(epochs=…)", "save_strategy": "every=Every(…)",
    "save_steps": "every=Every(steps=…)", "save_interval": "every=Every(…)", "save_interval_steps": "every=Every(steps=…)",
    "every_n_train_steps": "every=Every(steps=…)", "every_n_epochs": "every=Every(epochs=…)",
    "train_time_interval": "every=Every(seconds=…)",
    "resume_from_checkpoint": "nothing: the same script goes on by itself", "autoresume": "nothing: it always resumes",
    "to_save": "track(model=…)",
}  # fmt: skip


def refuse_unknown(what: str, unknown: Mapping[str, object], known: tuple[str, ...]) -> None:
    """Raise TypeError for keywords that `what` does not have, naming ours for those that other libraries use."""
    for name in unknown:
        ours = _HABITS.get(name)
        if ours is None:
            near = difflib.get_close_matches(name, known, 1)
            ours = near[0] if near else f"one of {', '.join(known)}"
        raise TypeError(f"{what} has no argument {name!r}; use {ours}")


def check_kind(name: str, value: object, kind: type, example: str) -> None:
    """Raise InvalidArgument unless `value` is a `kind`."""
    if not isinstance(value, kind):
        raise InvalidArgument(f"{name} is {value!r}, not a {kind.__name__}", hint=f"for example {name}={example}")


CHECKPOINTER = ("monitor", "every", "keep", "snapshot", "memory_every", "staging_bytes", "on_error", "verbose")
"""What a Checkpointer takes beside its directory."""

LEAST_STAGING_BYTES = 1 << 20  # less would be written in pieces too small for any disk's rate


def check_checkpointer(
    *, every: object, keep: object, snapshot: object, memory_every: object, staging_bytes: object, on_error: object
) -> None:
    """Raise InvalidArgument for an argument of Checkpointer that cannot work, alone or beside another."""
    check_kind("every", every, Every, "Every(epochs=1)")
    check_kind("keep", keep, Keep, "Keep(best=1, last=2)")
    for name, value, choices in (
        ("on_error", on_error, ("raise", "warn")),
        ("snapshot", snapshot, ("copy", "overlap")),
    ):
        if value not in choices:
            raise InvalidArgument(f"{name} is {value!r}", hint=f"use {' or '.join(map(repr, choices))}")
    if memory_every is not None:
        check_kind("memory_every", memory_every, Every, "Every(steps=1)")
    if staging_bytes is None:
        return
    if memory_every is not None:
        raise InvalidArgument(
            "staging_bytes and memory_every exclude each other: a snapshot in shared memory is whole",
            hint="leave out staging_bytes",
        )
    if isinstance(staging_bytes, bool) or not isinstance(staging_bytes, int) or staging_bytes < LEAST_STAGING_BYTES:
        raise InvalidArgument(
            f"staging_bytes is {staging_bytes!r}, not a number of bytes of at least {LEAST_STAGING_BYTES}",
            hint="for example staging_bytes=1 << 30",
        )


def to_metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Metrics as plain floats, in their order.

    Numbers, and arrays or tensors that hold exactly one, are taken; NaN and infinities are kept. Raises InvalidMetric
    naming the metric and its type for anything else.
    """
    return {_name(name): _number(name, value) for name, value in values.items()}


def _name(name: object) -> str:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_METRIC_NAME or not name.isprintable():
        raise InvalidMetric(
            f"{name!r:.300} is no metric name", hint=f"use a printable string of at most {MAX_METRIC_NAME} characters"
        )
    return name


def _number(name: str, value: Any) -> float:
    plain = value
    if (
        not isinstance(value, numbers.Real)
        and getattr(value, "shape", None) == ()
        and callable(getattr(value, "item", None))
    ):
        try:
            plain = value.item()
        except (RuntimeError, TypeError) as error:  # of JAX: it was donated, or is only being traced
            raise InvalidMetric(
                f"metric {name} is a {type(value).__name__} without a value: {str(error).partition('.')[0]}",
                hint="log what the step returned, after it has returned",
            ) from error
    if isinstance(plain, numbers.Real) and not isinstance(plain, bool):
        with suppress(OverflowError):  # an integer beyond what a float can hold is none of our metrics
            return float(plain)
    shape = getattr(value, "shape", None)
    described = type(value).__name__ + (f" of shape {tuple(shape)}" if shape not in (None, ()) else "")
    raise InvalidMetric(
        f"metric {name} is {value!r:.60}, a {described}, not a number",
        hint="log a float; leave out a metric you do not have",
    )

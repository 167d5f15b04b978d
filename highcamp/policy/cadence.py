"""When a checkpoint is due."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Self

from highcamp.errors import InvalidArgument

MAX_OVERHEAD = 0.5  # beyond it a run would save more than it trains
START_SECONDS = 60.0  # the cadence of `overhead` until something is measured: at most a minute of work is at stake


@dataclass(frozen=True, slots=True)
class Every:
    """A checkpoint is due when any of the given amounts has passed since the last save.

    epochs, steps: positive integers. seconds: positive, finite. overhead: the share of training time that saving may cost,
    above 0 and at most 0.5; how often that allows is measured while training (see `highcamp.policy.pace`). At least one is
    given. Raises InvalidArgument in the constructor, never at the first save.
    """

    epochs: int | None = None
    steps: int | None = None
    seconds: float | None = None
    overhead: float | None = None

    @classmethod
    def auto(cls, overhead: float = 0.01) -> Self:
        """As often as `overhead`, a share of training time, allows; `Every(epochs=1, overhead=0.01)` adds the epochs' ends.

        Raises InvalidArgument for what is no share above 0 and at most 0.5.
        """
        return cls(overhead=overhead)

    def __post_init__(self) -> None:
        """Check every field and turn NumPy's numbers into Python's."""
        for name in ("epochs", "steps"):
            object.__setattr__(self, name, _checked_count(name, getattr(self, name)))
        object.__setattr__(self, "seconds", _checked_seconds(self.seconds))
        object.__setattr__(self, "overhead", _checked_overhead(self.overhead))
        if self.epochs is None and self.steps is None and self.seconds is None and self.overhead is None:
            raise InvalidArgument(
                "Every(): nothing given, a checkpoint would never be due",
                hint="for example Every(epochs=1), Every(steps=1000), Every(seconds=600) or Every.auto()",
            )

    @property
    def counts_only_epochs(self) -> bool:
        """Whether neither steps nor time make a checkpoint due."""
        return self.steps is None and self.seconds is None and self.overhead is None

    def is_due(self, *, epochs: int, steps: int, seconds: float, allowed: bool | None = None) -> bool:
        """Whether a checkpoint is due, given what has passed since the last save.

        allowed: whether `overhead` allows a save now, as measured; None where nothing measures, then a minute decides.
        """
        if self.overhead is not None and (seconds >= START_SECONDS if allowed is None else allowed):
            return True
        return (
            (self.epochs is not None and epochs >= self.epochs)
            or (self.steps is not None and steps >= self.steps)
            or (self.seconds is not None and seconds >= self.seconds)
        )

    def __str__(self) -> str:
        """In words, such as "every epoch", "every 100 steps or 60 s" or "as often as 1 % of the time allows"."""
        parts = [
            noun if count == 1 else f"{count} {noun}s"
            for count, noun in ((self.epochs, "epoch"), (self.steps, "step"))
            if count is not None
        ]
        if self.seconds is not None:
            parts.append(f"{self.seconds:.15g} s")
        share = "" if self.overhead is None else f"as often as {100 * self.overhead:.12g} % of the time allows"
        if not parts:
            return share
        *most, final = parts
        words = "every " + (f"{', '.join(most)} or {final}" if most else final)
        return f"{words}, or {share}" if share else words


def _checked_count(name: str, count: object) -> int | None:
    if count is None:
        return None
    # bool is an int in Python: Every(steps=True) would save at every step.
    if isinstance(count, numbers.Integral) and not isinstance(count, bool) and int(count) > 0:
        return int(count)
    raise InvalidArgument(
        f"Every({name}={count!r}): {name} is not a positive integer", hint=f"leave it out to not count {name}"
    )


def _checked_seconds(seconds: object) -> float | None:
    if seconds is None:
        return None
    if isinstance(seconds, numbers.Real) and not isinstance(seconds, bool):
        number = float(seconds)
        if math.isfinite(number) and number > 0:
            return number
    raise InvalidArgument(
        f"Every(seconds={seconds!r}): seconds is not a positive, finite number",
        hint="leave it out to not watch the clock",
    )


def _checked_overhead(overhead: object) -> float | None:
    if overhead is None:
        return None
    if isinstance(overhead, numbers.Real) and 0 < float(overhead) <= MAX_OVERHEAD:  # True is 1, and too much
        return float(overhead)
    raise InvalidArgument(
        f"Every.auto(overhead={overhead!r}): overhead is not a share of training time, above 0 and at most {MAX_OVERHEAD}",
        hint="1 % is Every.auto(overhead=0.01)",
    )

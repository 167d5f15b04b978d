"""When a checkpoint is due."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

from highcamp.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Every:
    """A checkpoint is due when any of the given amounts has passed since the last save.

    epochs, steps: positive integers. seconds: positive, finite. At least one is given.
    Raises InvalidArgument in the constructor, never at the first save.
    """

    epochs: int | None = None
    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        """Check every field and turn NumPy's numbers into Python's."""
        for name in ("epochs", "steps"):
            object.__setattr__(self, name, _checked_count(name, getattr(self, name)))
        object.__setattr__(self, "seconds", _checked_seconds(self.seconds))
        if self.epochs is None and self.steps is None and self.seconds is None:
            raise InvalidArgument(
                "Every(): nothing given, a checkpoint would never be due",
                hint="for example Every(epochs=1), Every(steps=1000) or Every(seconds=600)",
            )

    @property
    def counts_only_epochs(self) -> bool:
        """Whether neither steps nor time make a checkpoint due."""
        return self.steps is None and self.seconds is None

    def is_due(self, *, epochs: int, steps: int, seconds: float) -> bool:
        """Whether a checkpoint is due, given what has passed since the last save."""
        return (
            (self.epochs is not None and epochs >= self.epochs)
            or (self.steps is not None and steps >= self.steps)
            or (self.seconds is not None and seconds >= self.seconds)
        )

    def __str__(self) -> str:
        """In words, such as "every epoch" or "every 100 steps or 60 s"."""
        parts = [
            noun if count == 1 else f"{count} {noun}s"
            for count, noun in ((self.epochs, "epoch"), (self.steps, "step"))
            if count is not None
        ]
        if self.seconds is not None:
            parts.append(f"{self.seconds:.15g} s")
        *most, final = parts
        return "every " + (f"{', '.join(most)} or {final}" if most else final)


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

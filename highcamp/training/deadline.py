"""The deadline: when this process must be gone, as the environment tells it."""

from __future__ import annotations

import contextlib
import math
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from highcamp.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Mapping

DEADLINE = "HIGHCAMP_DEADLINE"
SLURM_END = "SLURM_JOB_END_TIME"  # seconds since the epoch; set by Slurm 22.05 and newer
EARLIEST = 1e9  # seconds since the epoch, in 2001; a smaller number is a duration by mistake
FAR_SECONDS = 10 * 365 * 86400.0  # what is further away means "never": Slurm's largest number is such a time


def deadline_of(environment: Mapping[str, str]) -> float | None:
    """When the process must be gone, in seconds since the epoch; None if it may stay.

    `HIGHCAMP_DEADLINE` as seconds since the epoch or an ISO time (local, if it names no zone), empty for no deadline;
    without it the end of the Slurm job. Raises InvalidArgument if it is no time.
    """
    given = environment.get(DEADLINE)
    if given is None:
        slurm = environment.get(SLURM_END, "")
        deadline = float(slurm) if slurm.isdecimal() else math.inf
    elif not given.strip():
        return None
    else:
        deadline = _parse(given.strip())
    return deadline if deadline < time.time() + FAR_SECONDS else None


def _parse(given: str) -> float:
    """A time as a person writes it; a number that can only be a duration is none."""
    found = math.nan
    with contextlib.suppress(ValueError, OverflowError):
        found = datetime.fromisoformat(given).timestamp() if "-" in given[1:] else float(given)
    if not found >= EARLIEST:
        example = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        raise InvalidArgument(
            f"{DEADLINE} is {given!r:.60}, not a time",
            hint=f'give seconds since the epoch, such as "$(($(date +%s) + 3600))", or an ISO time such as {example}',
        )
    return found


def deadline_words(left: float) -> str:
    """The reason, with what is left of the time in seconds."""
    return f"deadline in {left:.0f} s" if left >= 0 else f"deadline {-left:.0f} s ago"

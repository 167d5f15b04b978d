"""How values are spelled on a terminal: numbers that line up, sizes, ages, and names that cannot harm."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

MISSING = "-"
SIGNIFICANT_DIGITS = 4
MAX_DIGITS = 17  # that many tell any two float64 apart
_FIXED_RANGE = (1e-4, 1e6)  # outside of it, a column of fixed decimals is mostly zeros


def plain(text: str) -> str:
    """`text` on one line, with everything unprintable escaped: control codes, line ends, marks that reorder text."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text)


def size(size_bytes: int) -> str:
    """Bytes in decimal units: 812 B, 1.2 kB, 137 MB, 1.5 GB."""
    amount = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        # What would be rounded up to 1000 belongs to the next unit.
        if amount < 999.5:
            return f"{amount:.1f} {unit}" if unit != "B" and amount < 9.95 else f"{amount:.0f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def age(seconds: float) -> str:
    """How long ago, in one unit: 12 s, 6 min, 3 h, 2 d. A clock that went backwards gives 0 s."""
    seconds = max(0.0, seconds)
    for unit, length, limit in (("s", 1, 60), ("min", 60, 3600), ("h", 3600, 86400)):
        if seconds < limit:
            return f"{int(seconds / length)} {unit}"
    return f"{int(seconds / 86400)} d"


def duration(seconds: float) -> str:
    """A stretch of time as on a clock: 0:07, 12:30, 3:04:09."""
    whole = int(max(0.0, seconds))
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def timestamp(at: datetime) -> str:
    """RFC 3339 in UTC, such as 2026-01-31T08:00:00Z."""
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


def count(number: int, noun: str) -> str:
    """A number with its noun: 1 epoch, 2 epochs, 1,797 images."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def exact(value: float | None) -> str:
    """Every digit of a metric, for pipes; missing is "-"."""
    return MISSING if value is None else repr(float(value))


def numbers(values: Sequence[float | None]) -> list[str]:
    """One column of a metric: at least 4 significant digits, more where two different values would look equal.

    None is "-". All share their number of decimals, unless they are spread too widely for that.
    """
    finite = sorted({abs(value) for value in values if value is not None and math.isfinite(value)})
    distinct = {value for value in values if value is not None and math.isfinite(value)}
    nonzero = [value for value in finite if value]
    low, high = (nonzero[0], nonzero[-1]) if nonzero else (1.0, 1.0)
    is_fixed = _FIXED_RANGE[0] <= low and high < _FIXED_RANGE[1]
    # Fixed: four digits of the largest, and never less than two of the smallest.
    decimals = max(SIGNIFICANT_DIGITS - 1 - _exponent(high), 1 - _exponent(low), 0)
    start = decimals if is_fixed else SIGNIFICANT_DIGITS
    spelling = f".{start}f"
    for digits in range(start, MAX_DIGITS + 1):
        spelling = f".{digits}f" if is_fixed else f".{digits}g"
        if len({format(value, spelling) for value in distinct}) == len(distinct):
            break
    return [MISSING if value is None else format(value, spelling) for value in values]


def number(value: float | None) -> str:
    """One metric alone, with 4 significant digits."""
    return numbers([value])[0]


def _exponent(value: float) -> int:
    return math.floor(math.log10(value))

"""Figures in words: seconds and bytes with three digits and a unit."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.samples import Spread


def seconds(value: float | None) -> str:
    """`0.0123` as "12.3 ms"."""
    if value is None:
        return "–"
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if value * factor >= 1:
            return f"{_three(value * factor)} {unit}"
    return f"{_three(value * 1e6)} µs"


def size(value: float | None) -> str:
    """`1_490_000_000` as "1.49 GB"."""
    if value is None:
        return "–"
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= factor:
            return f"{_three(value / factor)} {unit}"
    return f"{value:.0f} B"


def times(value: float | None) -> str:
    """A ratio."""
    return "–" if value is None else f"{value:.2f} ×"


def ratio(one: float | None, other: float | None) -> float | None:
    """`one / other`; None without either."""
    return None if one is None or not other else one / other


def spread(found: Spread | None) -> str:
    """The median, and the least and the greatest figure."""
    if found is None:
        return "–"
    return f"{seconds(found.median)} ({seconds(found.low)} … {seconds(found.high)})"


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"

"""Samples: every figure that was measured, as it was, and their median and spread."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True)
class Sample:
    """One figure: in `session`, `who` took `value` seconds, or bytes where `what` ends so.

    round: 0 is the first, which allocates and warms up; it is listed apart. size_bytes, tensors: of the state.
    """

    session: str
    who: str
    what: str
    value: float
    round: int
    size_bytes: int = 0
    tensors: int = 0


@dataclass(frozen=True)
class Spread:
    """The median of `count` figures, their least and greatest, and the first, which is not among them."""

    median: float
    low: float
    high: float
    count: int
    first: float | None


@dataclass
class Samples:
    """All figures of a benchmark."""

    rows: list[Sample] = field(default_factory=list)

    def spread(self, session: str, who: str, what: str, **place: int) -> Spread | None:
        """Median and spread of a figure; None if it was not measured. place: size_bytes or tensors."""
        found = self.of(session, who, what, **place)
        values = [sample.value for sample in found if sample.round > 0] or [sample.value for sample in found]
        first = next((sample.value for sample in found if sample.round == 0), None)
        return Spread(statistics.median(values), min(values), max(values), len(values), first) if values else None

    def median(self, session: str, who: str, what: str, **place: int) -> float | None:
        """The median of a figure; None if it was not measured."""
        found = self.spread(session, who, what, **place)
        return found.median if found else None

    def of(self, session: str, who: str, what: str, **place: int) -> list[Sample]:
        """The samples of one figure in the order of their rounds."""
        return sorted(
            (
                sample
                for sample in self.rows
                if (sample.session, sample.who, sample.what) == (session, who, what)
                and all(getattr(sample, name) == value for name, value in place.items())
            ),
            key=lambda sample: sample.round,
        )

    def who(self, session: str) -> list[str]:
        """Everybody who took part in a session, in the order of their first figures."""
        return list(dict.fromkeys(sample.who for sample in self.rows if sample.session == session))

    def plain(self) -> list[dict[str, Any]]:
        """As JSON holds them."""
        return [asdict(sample) for sample in self.rows]

    @classmethod
    def of_plain(cls, rows: Iterable[dict[str, Any]]) -> Samples:
        """The reverse of `plain`."""
        return cls([Sample(**row) for row in rows])

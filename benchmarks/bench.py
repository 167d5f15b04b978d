"""The bench: what a benchmark runs on, and the rounds in which the contestants take turns."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks.limits import MAX_DRIFT, drift
from benchmarks.samples import Sample, Samples
from benchmarks.worker import Crew, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from benchmarks.scale import Scale

TRIES = 3  # of a session whose limits drift; the last one is told with a warning
LIMITS = "limits"
SEED = 2026


@dataclass(frozen=True)
class Contestant:
    """Somebody who takes turns. act: one turn; its figures by name. size_bytes, tensors: of its state."""

    who: str
    act: Callable[[], Mapping[str, float]]
    size_bytes: int = 0
    tensors: int = 0


@dataclass
class Bench:
    """Scale, place and results.

    scratch: a directory on the disk that is measured. facts: of the machine. notes: session, and what to know about it.
    seconds: that each session took.
    """

    scale: Scale
    repeats: int
    scratch: Path
    samples: Samples = field(default_factory=Samples)
    facts: dict[str, str] = field(default_factory=dict)
    notes: list[tuple[str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    _spare: list[Worker] = field(default_factory=list)
    _random: random.Random = field(default_factory=lambda: random.Random(SEED))  # noqa: S311  (an order, no secret)
    _places: Iterator[int] = field(default_factory=itertools.count)

    @contextlib.contextmanager
    def crew(self) -> Iterator[Crew]:
        """Processes for one session; what they have left on the disk is removed after it."""
        try:
            with Crew(self.scratch / "workers.log", self._spare if self.scale.is_tiny else None) as crew:
                yield crew
        finally:
            for path in self.scratch.glob("place-*"):
                shutil.rmtree(path)

    def close(self) -> None:
        """End the spare processes."""
        while self._spare:
            self._spare.pop().close()

    def place(self) -> str:
        """A new path on the disk that is measured."""
        return str(self.scratch / f"place-{next(self._places)}")

    def take_turns(
        self,
        session: str,
        contestants: Sequence[Contestant],
        *,
        repeats: int | None = None,
        before: Callable[[], object] = os.sync,
    ) -> None:
        """Rounds of turns in shuffled order: a first one, listed apart, and `repeats` more, by default the bench's.

        before: called before every turn, by default so that nothing is left for the disk to write. If what the limits
        give has drifted by more than `MAX_DRIFT`, all figures of the session but the first are thrown away and taken
        again, which is noted.
        """
        repeats = self.repeats if repeats is None else repeats
        self.say(f"{session}: {', '.join(dict.fromkeys(entry.who for entry in contestants))}")
        first = self._round(session, contestants, 0, before)
        for attempt in range(1, TRIES + 1):
            found = [row for turn in range(repeats) for row in self._round(session, contestants, turn + 1, before)]
            worst, name = _worst_drift(found)
            if worst <= MAX_DRIFT or self.scale.is_tiny:
                break
            moved = f"the limit {name} drifted by {100 * worst:.0f} %"
            thrown = (
                "thrown away and measured again"
                if attempt < TRIES
                else "kept, for it was the last try: trust its ratios less"
            )
            self.note(session, f"{moved} in try {attempt} of {TRIES}; {thrown}")
        self.samples.rows += [*first, *found]

    def _round(
        self, session: str, contestants: Sequence[Contestant], turn: int, before: Callable[[], object]
    ) -> list[Sample]:
        order = list(contestants)
        self._random.shuffle(order)
        rows = []
        for entry in order:
            before()
            rows += [
                Sample(session, entry.who, what, float(value), turn, entry.size_bytes, entry.tensors)
                for what, value in entry.act().items()
            ]
        return rows

    def add(self, session: str, who: str, found: Mapping[str, float], *, size_bytes: int = 0, tensors: int = 0) -> None:
        """Figures that are taken once."""
        self.samples.rows += [
            Sample(session, who, what, float(value), 1, size_bytes, tensors) for what, value in found.items()
        ]

    def note(self, session: str, text: str) -> None:
        """Something that a reader of the table has to know."""
        self.notes.append((session, text))
        self.say(f"{session}: {text}")

    def say(self, text: str) -> None:
        """Tell what is going on."""
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _worst_drift(rows: Sequence[Sample]) -> tuple[float, str]:
    """The limit that has moved most: by which share, and its name."""
    series: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        if row.who == LIMITS and row.what in ("copy", "write", "restore_warm", "restore_cold"):
            series.setdefault((row.what, row.size_bytes), []).append(row.value)
    moved = [(drift(values), f"{what} of {size / 1e6:.0f} MB") for (what, size), values in series.items()]
    return max(moved, default=(0.0, ""))

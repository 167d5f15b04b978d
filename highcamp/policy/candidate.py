"""What a policy knows of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Candidate:
    """The facts about one committed checkpoint that decisions are made from.

    name: unique in its run. step, epoch: optimizer steps and epochs done when the state was captured.
    sequence: counts the commits of the run, restarts included. metrics: may hold NaN and infinities.
    """

    name: str
    step: int
    sequence: int
    epoch: int
    metrics: Mapping[str, float]

    @property
    def order(self) -> tuple[int, int]:
        """Older before newer. Never the modification time: copying a run changes that."""
        return (self.step, self.sequence)

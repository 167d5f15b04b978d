"""What a policy knows of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping


class Candidate(NamedTuple):  # thousands are made for each question, a third as long as a frozen dataclass takes
    """The facts about one committed checkpoint that decisions are made from.

    name: unique in its run. step, epoch: optimizer steps and epochs done when the state was captured.
    sequence: counts the commits of the run, restarts included. metrics: may hold NaN and infinities. attempt: the one whose
    state it is. weights_of: of a checkpoint that holds weights alone, the sequence of the whole one they were taken from.
    is_divisible: whether it holds weights and more, and it is known which is which. is_healthy: whether no weight is NaN or
    infinite, None where that is not known.
    """

    name: str
    step: int
    sequence: int
    epoch: int
    metrics: Mapping[str, float]
    attempt: int = 0
    weights_of: int | None = None
    is_divisible: bool = False
    is_healthy: bool | None = None

    @property
    def order(self) -> tuple[int, int, int]:
        """Older before newer. Never the modification time: copying a run changes that."""
        return (self.step, self.sequence if self.weights_of is None else self.weights_of, self.sequence)

    @property
    def is_unhealthy(self) -> bool:
        """Whether it is known to have weights that are NaN or infinite; what is not known is not held against it."""
        return self.is_healthy is False

    @property
    def is_resumable(self) -> bool:
        """Whether training can go on from it."""
        return self.weights_of is None

    @property
    def state(self) -> tuple[int, int]:
        """Which state its weights are of: the same for a checkpoint and for what was taken from it."""
        return (self.attempt, self.sequence if self.weights_of is None else self.weights_of)

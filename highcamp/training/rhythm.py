"""The rhythm of a loop: how long its steps are, what its saves cost, and how often `Every.auto` saves therefore.

It measures, and `highcamp.policy.pace` decides. Every time is given by the caller; nothing here reads a clock.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import TYPE_CHECKING

from highcamp.policy import pace
from highcamp.policy.cadence import START_SECONDS
from highcamp.policy.pace import Course, Interval, Measured

if TYPE_CHECKING:
    from collections.abc import Iterable

    from highcamp.run.history import Attempt

SKIPPED_STEPS = 5  # compilation, caches and the first allocation are in them
PROFILED_STEPS = 20  # a median of 20 stands still to a few per cent, and 20 steps are soon done
RETIMED_SHARE = 0.2  # the median step has moved by more than this: another batch size, another load of the machine
MAX_MEANS = 20  # times 20 steps: what the mean is taken over
QUIET_SHARE = 0.05  # a save that lasts for less than this part of a step cannot be seen in it
SMOOTHING = 0.3  # the weight of the newest save in the averages over saves
MAX_JUMP = 4.0  # times the average: one save on a stalled disk must not speak for all


class Steps:
    """How long a step takes that overlaps no save: the median of 20, measured again when it has moved.

    seconds: that median, 0 until it is known. mean_seconds: the mean since it moved, with which steps beside a save are
    compared: half of all steps take longer than the median, and a hundred of them would be taken for the cost of the save.
    """

    def __init__(self) -> None:
        """Nothing is measured yet."""
        self.seconds = self.mean_seconds = 0.0
        self._to_skip = SKIPPED_STEPS
        self._fresh = self._means = 0
        self._window: deque[float] = deque(maxlen=PROFILED_STEPS)

    def took(self, seconds: float) -> bool:
        """One quiet step took this long; returns whether that has changed what a step takes."""
        if self._to_skip:
            self._to_skip -= 1
            return False
        self._window.append(seconds)
        self._fresh += 1
        return self._fresh >= PROFILED_STEPS and self._measure()

    def _measure(self) -> bool:
        self._fresh = 0
        median = statistics.median(self._window)
        has_moved = abs(median - self.seconds) > RETIMED_SHARE * self.seconds
        if has_moved:
            self.seconds, self._means = median, 0
        # Validation inside the loop or a stalled loader is no noise: one step counts for no more than twice the median.
        mean = statistics.fmean(min(each, 2 * self.seconds) for each in self._window)
        self._means = min(self._means + 1, MAX_MEANS)
        self.mean_seconds += (mean - self.mean_seconds) / self._means
        return has_moved


class Average:
    """An exponential average over saves.

    The first value is forgotten when the second comes: memory is set aside and touched in the first save. Later ones count
    for at most four times the average.
    """

    def __init__(self) -> None:
        """Nothing is known: the value is 0."""
        self.value = 0.0
        self._count = 0

    def add(self, value: float) -> None:
        """Take in the value of one more save; what is no finite number, 0 or more, is passed over."""
        if not 0 <= value < math.inf:
            return
        self._count += 1
        if self._count <= 2 or not self.value:
            self.value = value
        else:
            self.value += SMOOTHING * (min(value, MAX_JUMP * self.value) - self.value)


class Rhythm:
    """How often to save so that it costs at most `overhead`, None where that is not asked for.

    steps: how long they are. failure_seconds: the mean time between failures, see the function of that name.
    """

    def __init__(self, overhead: float | None, failure_seconds: float = pace.PRIOR_SECONDS) -> None:
        """Nothing is measured yet: until then saves are a minute apart, or further if the first ones were dear."""
        self.steps = Steps()
        self._overhead, self._failure_seconds = overhead, failure_seconds
        self._cost, self._durable, self._new_bytes = Average(), Average(), Average()
        self._interval: Interval | None = None
        self._course: Course | None = None

    @property
    def interval_steps(self) -> int | None:
        """Steps from save to save, None while a step or the first save is not measured."""
        return None if self._course is None else self._course.whole_steps

    def step_took(self, seconds: float) -> None:
        """One step that no save has slowed took this long."""
        before = self.steps.seconds
        if self.steps.took(seconds) and self._interval is not None:
            if self._course is not None:
                self._course = pace.retime(self._course, before, self.steps.seconds)
            self._decide()

    def save_took(
        self,
        cost_seconds: float,
        durable_seconds: float,
        new_bytes: float,
        *,
        stood_seconds: float,
        wall_seconds: float,
    ) -> None:
        """A save has ended well.

        cost_seconds: what it took from the loop, without waiting for the save before, which is no cost of its own.
        stood_seconds: with it. wall_seconds: since the save before; 0 for a save that did not come from this rhythm, and by
        which it cannot be steered.
        """
        self._cost.add(cost_seconds)
        self._durable.add(durable_seconds)
        self._new_bytes.add(new_bytes)
        self._decide()
        if self._course is None or self._interval is None or self._interval.steps is None or self._overhead is None:
            return
        self._course = pace.steer(
            self._course,
            self._interval.steps,
            self._overhead,
            cost_seconds=stood_seconds,
            wall_seconds=wall_seconds,
            limit=max(self._interval.steps, pace.MAX_SECONDS / self.steps.seconds),
        )

    def _decide(self) -> None:
        """Reckon anew from what is measured now."""
        if self._overhead is None:
            return
        measured = Measured(self.steps.seconds, self._cost.value, self._durable.value, self._new_bytes.value)
        self._interval = pace.interval(measured, self._overhead, failure_seconds=self._failure_seconds)
        if self._course is None and self._interval.steps is not None:
            self._course = Course(float(self._interval.steps))

    def is_due(self, steps: int, seconds: float) -> bool:
        """Whether a save is allowed, so many steps and seconds after the last one."""
        if self._overhead is None:
            return False
        if self._course is not None:
            return steps >= self._course.whole_steps
        return seconds >= max(START_SECONDS, self._interval.seconds if self._interval else 0.0)

    def facts(self) -> dict[str, float | int | str | None]:
        """What was chosen and why, as `highcamp.run.settings.PaceFacts` has it; {} while nothing is."""
        interval, course, overhead = self._interval, self._course, self._overhead
        if interval is None or course is None or overhead is None:
            return {}
        steps = course.whole_steps
        seconds = steps * self.steps.seconds
        is_raised = interval.steps is not None and steps > 2 * interval.steps
        return {
            "overhead": overhead,
            "steps": steps,
            "seconds": to_microseconds(seconds),
            "because": "share" if is_raised else interval.because,
            "step_seconds": to_microseconds(self.steps.seconds),
            "cost_seconds": to_microseconds(self._cost.value),
            "durable_seconds": to_microseconds(self._durable.value),
            "new_bytes": round(self._new_bytes.value),
            "share": None if course.share is None else to_microseconds(course.share),
            "expected_loss_seconds": to_microseconds(seconds / 2 + self._durable.value),
            "optimal_seconds": to_microseconds(interval.optimal_seconds),
            "failure_seconds": to_microseconds(self._failure_seconds),
        }


def failure_seconds(attempts: Iterable[Attempt], *, before: int) -> float:
    """The mean time between failures of a run, by its attempts with a number below `before`, the one under way.

    A failure is an attempt that was killed or ended by an error; one that a person interrupted ended as it should.
    """
    past = [attempt for attempt in attempts if attempt.number < before]
    seconds = sum(max(0.0, (each.last_at - each.started_at).total_seconds()) for each in past if each.last_at)
    return pace.failure_seconds(sum(each.ended in (None, "error") for each in past), seconds)


def to_microseconds(number: float) -> float:
    """With six decimals: what is written down is no more exact than that."""
    return round(number, 6)

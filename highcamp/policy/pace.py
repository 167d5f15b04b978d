"""The pace of `Every.auto`: from what saving costs to how often a share of training time allows it.

Pure functions; what they are given is measured by `highcamp.training.rhythm`. Letters are those of the formulas: t one step,
C the cost of a save, W from the call to the commit, B bytes written, p the share allowed, M the mean time between failures,
R what a restart takes, tau the time from save to save.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

WRITE_BUDGET = 50e6  # bytes/s on average, 4.3 TB a day: 1 GB every 2 s would be 43 TB, and wear a drive out in weeks
PIPE_MARGIN = 1.1  # a save takes 10 % longer now and then, and the next one must not wait for it
MAX_SECONDS = 86_400.0  # a measurement gone wrong must not end all saving: once a day, whatever it says
MAX_WALL_SECONDS = 1e9  # thirty years between two saves: a clock gone wrong
MAX_STEPS = 2**53  # what JSON holds exactly
ROUNDING = 1e-9  # of a float: 0.02 s / 1 % / 0.1 s are 20 steps, not 21
MIN_SAVES = 3  # one dear save is chance, three are a cost
APPROACH = 0.1  # of the way to the target, per save: what one save says is mostly noise
MAX_RISE = 4.0  # a process that was stopped for an hour inside a save would otherwise not save again for days
MEMORY = 0.75  # the weight of everything before, at each save: the measured share is that of the last few
PRIOR_FAILURES, PRIOR_SECONDS = 1, 86_400.0  # one failure in 24 hours, until a run has failures of its own
RESTART_SECONDS = 60.0  # to be started again, import a framework and restore

Because = Literal["cost", "pipe", "wear", "step", "share"]


@dataclass(frozen=True, slots=True)
class Measured:
    """What is known of a loop and its saves, in seconds and bytes; 0, or no finite number: not known.

    step_seconds: one step that overlaps no save. cost_seconds: what a save takes from the loop, its pause and the slowness
    of the steps it overlaps. durable_seconds: from the call to the commit. new_bytes: written anew, linked files left out.
    """

    step_seconds: float = 0.0
    cost_seconds: float = 0.0
    durable_seconds: float = 0.0
    new_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Interval:
    """How far apart saves should be.

    seconds: from save to save. steps: the same in steps, None while no step is measured. because: what decided; "cost": the
    share allowed, "pipe": one save at a time, "wear": bytes written, "step": one step suffices for all three.
    optimal_seconds: what Young and Daly would choose, for comparison. expected_loss_seconds: the work that a crash costs on
    average.
    """

    seconds: float
    steps: int | None
    because: Because
    optimal_seconds: float
    expected_loss_seconds: float


def interval(
    measured: Measured,
    overhead: float,
    *,
    failure_seconds: float = PRIOR_SECONDS,
    restart_seconds: float = RESTART_SECONDS,
    in_flight: int = 1,
) -> Interval:
    """The shortest interval at which saving costs at most `overhead`, waits for no save before, and spares the drive.

    It is no longer where failures are rare: the work that a crash loses is what people feel. failure_seconds: M.
    restart_seconds: R. in_flight: how many saves may be under way at once.
    """
    step, cost = _known(measured.step_seconds), _known(measured.cost_seconds)
    durable, new_bytes = _known(measured.durable_seconds), _known(measured.new_bytes)
    bounds: dict[Because, float] = {
        "cost": cost / overhead,
        "pipe": PIPE_MARGIN * durable / in_flight,
        "wear": new_bytes / WRITE_BUDGET,
    }
    because = max(bounds, key=lambda name: bounds[name])
    seconds = min(bounds[because], MAX_SECONDS)
    steps = None
    if step:
        steps = max(1, math.ceil(min(seconds / step, MAX_STEPS) * (1 - ROUNDING)))
        because = "step" if seconds <= step else because
        seconds = min(max(step, steps * step), max(step, MAX_SECONDS))
    loss = seconds / 2 + durable
    return Interval(seconds, steps, because, optimal_seconds(cost, failure_seconds, restart_seconds), loss)


def optimal_seconds(cost: float, failure_seconds: float, restart_seconds: float = RESTART_SECONDS) -> float:
    """The interval that makes a run with failures shortest, if nothing but its length counts: C + sqrt(2C(M + R) + C^2).

    It minimizes tau / (tau - C) * (1 + (tau / 2 + R) / M): what saving adds, times what is done twice. To first order that is
    sqrt(2CM): J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974; with the
    restart: J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), 2006.
    """
    cost, between, restart = _known(cost), _known(failure_seconds), _known(restart_seconds)
    return _known(cost + math.sqrt(2 * cost * (between + restart) + cost * cost))


def failure_seconds(failures: int, seconds: float) -> float:
    """The mean time between failures M of a run that has failed so often in so many seconds, and of the prior.

    The mean of a Poisson rate under a gamma prior of 1 failure in 24 hours, inverted.
    """
    return (PRIOR_SECONDS + _known(seconds)) / (PRIOR_FAILURES + max(0, failures))


@dataclass(frozen=True, slots=True)
class Course:
    """Where the controller is.

    steps: from save to save, at least 1, not rounded. saves: how many were measured since it was last raised. steps_done,
    cost_seconds, wall_seconds: how many steps those have followed, what they have cost, and in how much time; sums, in which
    older saves have less weight.
    """

    steps: float
    saves: int = 0
    steps_done: float = 0.0
    cost_seconds: float = 0.0
    wall_seconds: float = 0.0

    @property
    def whole_steps(self) -> int:
        """The steps from save to save as they can be counted."""
        return math.ceil(self.steps * (1 - ROUNDING))

    @property
    def share(self) -> float | None:
        """The measured share of time that saving has cost, None before the first save."""
        return self.cost_seconds / self.wall_seconds if self.wall_seconds > 0 else None

    def least_steps(self, overhead: float) -> float:
        """The steps from save to save at which what was measured would cost `overhead` and no more; 0 if it was nothing.

        A save costs c = cost / n, a step takes t = (wall - cost) / steps_done, and c / (k t + c) is to be `overhead`.
        """
        training = self.wall_seconds - self.cost_seconds
        if not self.saves or training <= 0:
            return 0.0
        weight = (1 - MEMORY**self.saves) / (1 - MEMORY)
        return self.steps_done / weight * (self.cost_seconds / training) * ((1 - overhead) / overhead)


def steer(
    course: Course,
    target: int,
    overhead: float,
    *,
    cost_seconds: float,
    wall_seconds: float,
    limit: float = MAX_STEPS,
) -> Course:
    """The course after one more save, which cost `cost_seconds` of the `wall_seconds` since the save before.

    If the share measured over the last saves is above `overhead`, the interval grows with it at once; otherwise it moves a
    tenth of the way to `target`, and down never further than that share allows. A save that could not be measured moves it
    all the same. The interval is never below one step, nor above `limit` steps.
    """
    if 0 < wall_seconds < MAX_WALL_SECONDS and 0 <= cost_seconds < math.inf:
        course = Course(
            course.steps,
            course.saves + 1,
            MEMORY * course.steps_done + course.whole_steps,
            MEMORY * course.cost_seconds + min(cost_seconds, wall_seconds),
            MEMORY * course.wall_seconds + wall_seconds,
        )
    share = course.share or 0.0
    if course.saves >= MIN_SAVES and share > overhead:
        return Course(_in_range(math.ceil(min(course.steps * min(share / overhead, MAX_RISE), limit)), limit))
    distance = target - course.steps
    steps = course.steps + math.copysign(max(APPROACH * abs(distance), min(1.0, abs(distance))), distance)  # it arrives
    if steps < course.steps:
        # A cost that no estimate has seen: without this, the interval would sink below what the share allows, again and again.
        steps = max(steps, min(course.steps, course.least_steps(overhead)))
    return replace(course, steps=_in_range(steps, limit))


def retime(course: Course, before: float, after: float) -> Course:
    """The same course in time when a step takes `after` seconds instead of `before`."""
    if not (_known(before) and _known(after)):
        return course
    ratio = _known(before / after) or 1.0
    return replace(course, steps=_in_range(course.steps * ratio), steps_done=course.steps_done * ratio)


def _known(value: float) -> float:
    """A finite number above 0, or 0 for everything that tells nothing."""
    return value if 0 < value < math.inf else 0.0


def _in_range(steps: float, limit: float = MAX_STEPS) -> float:
    return max(1.0, min(steps, limit, MAX_STEPS))

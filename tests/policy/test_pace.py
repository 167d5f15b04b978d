"""The pace of Every.auto: formulas and controller, without a clock."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from highcamp.policy import pace
from highcamp.policy.pace import Course, Measured

HOSTILE = st.one_of(
    st.sampled_from([0.0, -1.0, math.nan, math.inf, -math.inf, 5e-324, 1e308]), st.floats(allow_nan=True)
)
SHARES = st.floats(1e-300, 0.5)


def test_the_interval_of_a_gigabyte():
    """The example of the documents: wear decides, and a crash costs ten seconds."""
    found = pace.interval(Measured(0.1, 0.02, 0.6, 1e9), 0.01)

    assert (found.because, found.seconds, found.steps) == ("wear", pytest.approx(20.0), 200)
    assert found.expected_loss_seconds == pytest.approx(10.6)


@pytest.mark.parametrize(
    ("measured", "overhead", "because", "steps"),
    [
        (Measured(0.1, 0.02, 0.6, 1e6), 0.01, "cost", 20),
        (Measured(0.1, 0.02, 0.6, 1e6), 0.5, "pipe", 7),
        (Measured(0.1, 0.02, 0.6, 1e9), 0.01, "wear", 200),
        (Measured(60.0, 0.02, 0.6, 1e9), 0.01, "step", 1),
        (Measured(0.3, 0.02, 0.6, 1e6), 0.01, "cost", 7),  # 2 s are 6.67 steps, and 6 would be too often
    ],
)
def test_the_longest_of_three_bounds_decides(measured, overhead, because, steps):
    """People are told why; a save that waits for the one before, or a worn-out drive, is a cost that no share shows."""
    found = pace.interval(measured, overhead)

    assert (found.because, found.steps) == (because, steps)
    assert found.seconds == pytest.approx(steps * measured.step_seconds)


def test_without_a_measured_step_there_is_an_interval_in_seconds():
    """Epochs of an hour are measured late; saving must not wait for it."""
    found = pace.interval(Measured(0.0, 0.6, 0.6, 1e6), 0.01)

    assert (found.steps, found.seconds) == (None, pytest.approx(60.0))


def test_several_saves_in_flight_may_follow_closer():
    """The pipe is wider then."""
    assert pace.interval(Measured(0.1, 0.0, 1.0, 0.0), 0.01, in_flight=2).seconds == pytest.approx(0.6)


@given(HOSTILE, HOSTILE, HOSTILE, HOSTILE, SHARES, HOSTILE, HOSTILE)
def test_no_measurement_crashes_or_ends_saving(step, cost, durable, new_bytes, overhead, failure, restart):
    """A clock that jumps must not end the training, nor the saving."""
    found = pace.interval(
        Measured(step, cost, durable, new_bytes), overhead, failure_seconds=failure, restart_seconds=restart
    )

    assert 0 <= found.seconds < math.inf
    assert found.seconds <= max(pace.MAX_SECONDS, step if math.isfinite(step) else 0)
    assert (found.steps is None) == (not 0 < step < math.inf)
    assert found.steps is None or 1 <= found.steps <= pace.MAX_STEPS
    assert 0 <= found.optimal_seconds < math.inf


@given(st.floats(0.01, 100), st.floats(600, 1e7), st.floats(0, 600))
def test_the_optimal_interval_makes_a_run_with_failures_shortest(cost, failure, restart):
    """A comparison with a formula that was copied wrongly tells nothing."""
    best = pace.optimal_seconds(cost, failure, restart)

    def length(interval):
        return interval / (interval - cost) * (1 + (interval / 2 + restart) / failure)

    assert length(best) <= min(length(best * 1.01), length(cost + (best - cost) * 0.99))
    if cost + restart < failure / 1000:
        assert best == pytest.approx(math.sqrt(2 * cost * failure), rel=0.1)  # Young's first order


def test_failures_are_counted_from_a_prior():
    """A run that has not failed yet is no run that never will."""
    assert pace.failure_seconds(0, 0) == 86_400
    assert pace.failure_seconds(0, 86_400) == 2 * 86_400
    assert pace.failure_seconds(3, 0) == 86_400 / 4
    assert pace.failure_seconds(-1, math.nan) == 86_400


def _saved(course, target, overhead, *, step, cost, times=1):
    """So many saves at this course, each of which costs the same."""
    for _ in range(times):
        wall = course.whole_steps * step + cost
        course = pace.steer(course, target, overhead, cost_seconds=cost, wall_seconds=wall)
    return course


@given(st.floats(1e-3, 10), st.floats(1e-4, 10), st.floats(0.001, 0.5), st.integers(1, 100_000))
def test_the_share_converges_below_what_is_allowed(step, cost, overhead, start):
    """That is the promise of Every.auto(overhead=p); a first guess that was wrong must not break it for long."""
    target = pace.interval(Measured(step, cost), overhead).steps

    course = _saved(Course(float(start)), target, overhead, step=step, cost=cost, times=120)

    assert cost / (course.whole_steps * step + cost) <= overhead * (1 + 1e-9)
    assert course.steps <= 2 * target + 2  # and it saves as often as that allows


@given(st.floats(1e-3, 10), st.floats(1e-3, 1), st.floats(1.5, 20), st.floats(0.001, 0.4))
def test_a_cost_that_was_underestimated_is_met_by_the_measured_share(step, cost, factor, overhead):
    """The estimate sees the pause and the steps beside it; whatever else a save costs is in the share."""
    target = pace.interval(Measured(step, cost), overhead).steps

    course, shares = Course(float(target)), []
    for _ in range(100):
        wall = course.whole_steps * step + factor * cost
        shares.append(min(1.0, factor * cost / wall))
        course = pace.steer(course, target, overhead, cost_seconds=factor * cost, wall_seconds=wall)

    assert max(shares[50:]) <= overhead * (1 + 1e-9)


def test_the_interval_grows_at_once_and_shrinks_slowly():
    """Too often is a promise broken; too rarely is a few seconds of work at stake."""
    course = _saved(Course(10.0), 10, 0.01, step=1.0, cost=0.3, times=pace.MIN_SAVES)
    assert course.steps == 30

    course = _saved(Course(100.0), 10, 0.01, step=1.0, cost=0.0)
    assert course.steps == pytest.approx(91)
    assert _saved(course, 10, 0.01, step=1.0, cost=0.0, times=60).steps == 10


def test_one_dear_save_changes_little():
    """A process that was stopped by Ctrl-Z within a save would not save for hours afterwards."""
    course = _saved(Course(100.0), 100, 0.01, step=1.0, cost=0.5, times=5)
    course = pace.steer(course, 100, 0.01, cost_seconds=3600.0, wall_seconds=3700.0)
    assert course.steps <= 100 * pace.MAX_RISE

    course = _saved(course, 100, 0.01, step=1.0, cost=0.5, times=40)
    assert course.steps <= 110


@given(HOSTILE, HOSTILE, SHARES, st.integers(1, 10**9), st.floats(1, 1e12))
def test_the_course_is_never_below_one_step(cost, wall, overhead, target, start):
    """Zero steps would be a save at every look."""
    course = Course(start)
    for _ in range(5):
        course = pace.steer(course, target, overhead, cost_seconds=cost, wall_seconds=wall, limit=1e15)
        course = pace.retime(course, cost, wall)

        assert 1 <= course.steps <= pace.MAX_STEPS
        assert course.share is None or 0 <= course.share <= 1


def test_the_course_keeps_its_time_when_steps_change():
    """Steps of twice the length, half as many of them."""
    assert pace.retime(Course(100.0, 3, 250.0, 1.0, 25.0), 0.1, 0.2) == Course(50.0, 3, 125.0, 1.0, 25.0)
    assert pace.retime(Course(1.0), 0.1, 9.0).steps == 1


def test_a_limit_holds_whatever_was_measured():
    """Once a day, at least."""
    course = _saved(Course(1000.0), 10, 0.01, step=1.0, cost=500.0, times=2)

    course = pace.steer(course, 10, 0.01, cost_seconds=500.0, wall_seconds=1000.0, limit=1200)

    assert course.steps == 1200

from __future__ import annotations

import math

import numpy as np
import pytest

from highcamp.errors import InvalidArgument
from highcamp.policy.cadence import Every


@pytest.mark.parametrize("name", ["epochs", "steps"])
@pytest.mark.parametrize("count", [0, -1, True, False, 1.0, "1", math.nan, np.float64(2)])
def test_cadence_values_checked(name, count):
    """Elsewhere 0 and True are accepted and save at every batch."""
    with pytest.raises(InvalidArgument, match=f"{name} is not a positive integer") as caught:
        Every(**{name: count})

    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("seconds", [0, 0.0, -1, True, math.nan, math.inf, "60"])
def test_seconds_are_positive_and_finite(seconds):
    """An infinite or NaN cadence is never due: no checkpoint, and no word about it."""
    with pytest.raises(InvalidArgument, match="seconds is not a positive, finite number"):
        Every(seconds=seconds)


@pytest.mark.parametrize("overhead", [0, 0.0, -0.1, 0.51, 1, True, False, math.nan, math.inf, "1 %"])
def test_an_overhead_is_a_share(overhead):
    """1 was meant as 1 %, and training would do nothing but save."""
    with pytest.raises(InvalidArgument, match="overhead is not a share of training time, above 0 and at most 0.5"):
        Every.auto(overhead=overhead)


def test_nothing_given_is_an_error():
    """A cadence that is never due saves nothing."""
    with pytest.raises(InvalidArgument, match="never be due"):
        Every()


@pytest.mark.parametrize(
    ("every", "passed", "due"),
    [
        (Every(epochs=2), (1, 10**9, 1e9), False),
        (Every(epochs=2), (2, 0, 0.0), True),
        (Every(epochs=2), (3, 0, 0.0), True),
        (Every(steps=100), (9, 99, 1e9), False),
        (Every(steps=100), (0, 100, 0.0), True),
        (Every(steps=100), (0, 250, 0.0), True),
        (Every(seconds=60), (9, 10**9, 59.9), False),
        (Every(seconds=60), (0, 0, 60.0), True),
        (Every(epochs=1, steps=100), (0, 99, 1e9), False),
        (Every(epochs=1, steps=100), (1, 1, 0.0), True),
        (Every(epochs=1, steps=100, seconds=0.5), (0, 0, 0.5), True),
        (Every(epochs=1, steps=1, seconds=1), (0, 0, 0.0), False),
        (Every.auto(), (10**9, 10**9, 59.9), False),
        (Every.auto(), (0, 0, 60.0), True),
        (Every(epochs=1, overhead=0.01), (1, 1, 0.0), True),
    ],
)
def test_any_that_has_passed_is_due(every, passed, due):
    """Counted from the last save, so that a step count skipped over is still due."""
    epochs, steps, seconds = passed

    assert every.is_due(epochs=epochs, steps=steps, seconds=seconds) is due


@pytest.mark.parametrize(("allowed", "seconds"), [(True, 0.0), (False, 1e9)])
def test_what_is_measured_decides_rather_than_the_clock(allowed, seconds):
    """Nothing is saved every minute for ever when a second would do, or when an hour is what the share allows."""
    assert Every.auto().is_due(epochs=0, steps=0, seconds=seconds, allowed=allowed) is allowed
    assert Every(epochs=1, overhead=0.01).is_due(epochs=1, steps=0, seconds=0.0, allowed=allowed)


def test_a_cadence_without_a_share_does_not_ask_for_it():
    """`allowed` has no meaning there."""
    assert not Every(steps=2).is_due(epochs=9, steps=1, seconds=1e9, allowed=True)


def test_auto_is_told_by_steps_and_time():
    """Otherwise `save_if_due(state, step=…)` would ask for an epoch, which a JAX loop may not have."""
    assert not Every.auto().counts_only_epochs
    assert Every(epochs=1).counts_only_epochs


@pytest.mark.parametrize(
    ("every", "words"),
    [
        (Every(epochs=1), "every epoch"),
        (Every(epochs=3), "every 3 epochs"),
        (Every(steps=1), "every step"),
        (Every(steps=1_000_000), "every 1000000 steps"),
        (Every(seconds=60), "every 60 s"),
        (Every(seconds=1_234_567.5), "every 1234567.5 s"),
        (Every(steps=100, seconds=60), "every 100 steps or 60 s"),
        (Every(epochs=1, steps=100, seconds=0.5), "every epoch, 100 steps or 0.5 s"),
        (Every.auto(), "as often as 1 % of the time allows"),
        (Every.auto(0.07), "as often as 7 % of the time allows"),
        (Every.auto(overhead=0.0025), "as often as 0.25 % of the time allows"),
        (Every(epochs=1, overhead=0.02), "every epoch, or as often as 2 % of the time allows"),
    ],
)
def test_it_reads_as_words(every, words):
    """The table and the page show the cadence as people say it."""
    assert str(every) == words


def test_numbers_from_numpy_become_plain():
    """They end in run.json, which is JSON."""
    every = Every(steps=np.int64(5), seconds=np.float32(0.5), overhead=np.float64(0.25))

    assert every == Every(steps=5, seconds=0.5, overhead=0.25)
    assert [type(every.steps), type(every.seconds), type(every.overhead)] == [int, float, float]

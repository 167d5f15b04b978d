"""What saving costs, as it is measured, reported, warned about and steered by; a clock that only the tests move."""

from __future__ import annotations

import math
import threading
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from highcamp import Every
from highcamp.policy import pace
from highcamp.run.history import Attempt, SaveCost
from highcamp.run.settings import PaceFacts
from highcamp.training import messages
from highcamp.training.costs import MAX_WINDOW_SECONDS, Costs
from highcamp.training.rhythm import PROFILED_STEPS, SKIPPED_STEPS, Average, Rhythm, failure_seconds

NOW = datetime(2026, 1, 31, 8, tzinfo=UTC)


class Loop:
    """A training loop on a clock of its own, which saves whenever it is allowed to.

    step: how long one is. pause, write: of a save. slowness: a step beside a save takes 1 + slowness times as long.
    """

    def __init__(self, every=None, *, step=0.1, pause=0.002, write=0.05, new_bytes=1000, slowness=0.0):
        self.every = every or Every.auto()
        self.step, self.pause, self.write, self.new_bytes, self.slowness = step, pause, write, new_bytes, slowness
        self.now = 1000.0
        self.costs = Costs(self.every, self.now)
        self.begun = self.now
        self.under_way = None  # the save in the background, and when it ends
        self.saves = []  # (when, steps done by then)
        self.done = self.saved_at_step = 0
        self.saved_at = self.now
        self.lost = 0.0  # time that the loop would have gained without any save
        self.fails = False

    def train(self, steps):
        for _ in range(steps):
            beside = 0.0 if self.under_way is None else self.under_way[1] - self.now
            slowed = min(beside, self.step * (1 + self.slowness)) * self.slowness / (1 + self.slowness)
            self.lost += slowed
            self._pass(self.step + slowed)
            self.done += 1
            self.costs.step(self.now)
            allowed = self.costs.is_due(self.done - self.saved_at_step, self.now - self.saved_at)
            if self.every.is_due(epochs=0, steps=0, seconds=0.0, allowed=allowed):
                self.save()
        return self

    def save(self):
        began = self.now
        saving = self.costs.began(self.now)
        if self.under_way is not None:
            self._pass(max(0.0, self.under_way[1] - self.now))
        saving.waited(self.now)
        self._pass(self.pause)
        saving.returned(self.now)
        self.lost += self.now - began
        self.under_way = (saving, self.now + self.write)
        self.saves.append((self.now, self.done))
        if not self.fails:
            self.saved_at, self.saved_at_step = self.now, self.done

    def _pass(self, seconds):
        self.now += seconds
        if self.under_way is not None and self.now >= self.under_way[1]:
            saving, end = self.under_way
            if self.fails:
                saving.failed(end)
            else:
                saving.committed(end, new_bytes=self.new_bytes)
            self.under_way = None

    @property
    def gaps(self):
        """Steps from save to save."""
        return [after - before for (_, before), (_, after) in pairwise(self.saves)]


# What is due


def test_until_something_is_measured_a_minute_decides():
    """At most a minute of work is at stake while nothing is known."""
    loop = Loop(step=10.0, pause=0.1).train(12)

    assert [round(when - loop.begun) for when, _ in loop.saves] == [60, 120]


def test_a_dear_first_save_keeps_the_next_away():
    """A minute is too often where a save stops the loop for ten seconds, also before a step is measured."""
    loop = Loop(step=30.0, pause=10.0).train(10)

    assert len(loop.saves) == 1


def test_it_saves_as_often_as_the_share_allows():
    """That is all that Every.auto promises: here every 2 steps of 0.1 s, for a pause of 2 ms and a share of 1 %."""
    loop = Loop(step=0.1, pause=0.002, write=0.001).train(2000)

    assert set(loop.gaps[10:]) == {2}
    assert loop.lost / (loop.now - loop.begun) <= 0.01
    assert loop.costs.facts()["because"] == "cost"


@settings(max_examples=40, deadline=None)
@given(
    step=st.floats(1e-3, 5),
    pause=st.floats(0.001, 1),
    write=st.floats(0.01, 20),
    slowness=st.floats(0, 1),
    overhead=st.floats(0.01, 0.3),
)
def test_saving_costs_no_more_than_the_share_whatever_it_costs(step, pause, write, slowness, overhead):
    """Pause and slower steps together, once the first saves are measured; pause and write in steps."""
    loop = Loop(Every.auto(overhead), step=step, pause=step * pause, write=step * write, slowness=slowness)
    while len(loop.saves) < 15:
        loop.train(200)
    begin, before, count = loop.now, loop.lost, len(loop.saves)

    while len(loop.saves) < count + 40:
        loop.train(200)

    assert (loop.lost - before) / (loop.now - begin) <= overhead * 1.3
    assert min(loop.gaps) >= 1


def test_the_drive_is_spared():
    """A gigabyte every two seconds wears a drive out in weeks; every 20 s it does not."""
    loop = Loop(step=0.1, pause=0.02, write=0.6, new_bytes=10**9).train(5000)

    assert set(loop.gaps[5:]) == {200}
    assert loop.costs.facts()["because"] == "wear"


def test_no_save_waits_for_the_one_before():
    """A disk slower than the cadence would stop the loop at each save."""
    loop = Loop(step=0.1, pause=0.0001, write=5.0).train(3000)

    assert set(loop.gaps[5:]) == {56}  # 1.1 times 5.0001 s
    assert loop.costs.wait_seconds == 0
    assert loop.costs.facts()["because"] == "pipe"


def test_steps_that_a_save_slows_are_part_of_its_cost():
    """The loop stands still for a millisecond, and then runs at half its speed for a second: that is the price."""
    cheap = Loop(step=0.1, pause=0.001, write=1.0, slowness=0.0).train(4000)
    dear = Loop(step=0.1, pause=0.001, write=1.0, slowness=0.5).train(4000)

    assert set(cheap.gaps[5:]) == {12}  # 1.1 times 1.001 s
    assert min(dear.gaps[5:]) > 200
    assert dear.costs.facts()["cost_seconds"] == pytest.approx(0.35, abs=0.06)
    assert dear.costs.facts()["because"] == "cost"


def test_waiting_at_the_barrier_is_counted_once():
    """It is a pause, and it is in the step that waited."""
    costs = Costs(Every.auto(), 0.0)
    for n in range(1, 41):
        costs.step(n / 10)
    saving = costs.began(4.0)
    saving.returned(4.001)
    saving.committed(4.5, new_bytes=10, barrier_seconds=0.05)
    for n in range(6):
        costs.step(4.151 + n / 10)

    assert (costs.pause_seconds, costs.slowed_seconds) == (pytest.approx(0.051), pytest.approx(0.0))


def test_noise_is_no_cost_of_the_save():
    """Half of all steps take longer than the median; a save beside a hundred of them has not slowed those."""
    random = Random(0)
    loop = Loop(pause=0.001, write=10.0)
    for _ in range(6000):
        loop.step = random.gauss(0.1, 0.01)
        loop.train(1)

    assert loop.costs.facts()["because"] == "pipe"
    assert 105 <= loop.gaps[-1] <= 125


def test_validation_beside_a_save_is_no_cost_of_the_save():
    """Ten minutes of validation would be taken for slow steps, and nothing would be saved for a day."""
    loop = Loop(step=0.1, pause=0.001, write=0.5)
    for _ in range(300):
        loop.train(20)
        loop._pass(600.0)
        loop.costs.rest(loop.now)

    assert loop.costs.facts()["cost_seconds"] == pytest.approx(0.001)


def test_validation_within_a_step_counts_for_no_longer_than_the_save_lasts():
    """A loop that validates inside its body tells nobody."""
    loop = Loop(Every(epochs=1), step=0.1, pause=0.001, write=0.5).train(40)
    loop.save()
    loop._pass(600.0)
    loop.train(5)

    assert loop.costs.slowed_seconds == pytest.approx(0.5)


def test_validation_within_steps_does_not_hide_what_a_save_slows():
    """Were it part of the mean, every step beside a save would look fast."""
    loop = Loop(Every(epochs=1), step=0.1, pause=0.001, write=1.0, slowness=0.5)
    for _ in range(5):
        loop.train(20)
        loop._pass(600.0)
    loop.train(20)
    loop.save()
    loop.train(20)

    assert loop.costs.slowed_seconds == pytest.approx(0.33, abs=0.06)


def test_a_save_in_the_middle_of_a_step_is_no_part_of_it():
    """A call of save() in the body of the loop: the step is what comes before and after it."""
    costs = Costs(Every.auto(), 0.0)
    for n in range(1, 41):
        costs.step(n / 10)
    saving = costs.began(4.06)
    saving.returned(5.0)
    costs.step(5.05)
    saving.committed(5.1, new_bytes=10)
    costs.step(5.15)

    assert costs.slowed_seconds == pytest.approx(0.01)


def test_a_save_that_was_left_by_an_exception_ends_no_measuring():
    """The state cannot be saved, the script catches the error and trains on."""
    loop = Loop(Every(epochs=1)).train(3)
    loop.costs.began(loop.now)
    loop._pass(600.0)
    loop.train(30)

    assert loop.costs._rhythm.steps.seconds == pytest.approx(0.1)


def test_waiting_for_the_save_before_is_no_part_of_how_long_a_save_takes():
    """Saves would move apart because somebody else asked for many."""
    loop = Loop(step=0.1, pause=0.001, write=5.0).train(1000)
    for _ in range(5):
        loop.train(1)
        loop.save()
    loop.train(100)

    assert loop.costs.wait_seconds > 15
    assert loop.costs.facts()["durable_seconds"] == pytest.approx(5.001)


def test_a_share_above_what_is_allowed_is_given_as_the_reason():
    """The other reasons would be untrue: none of them asks for so many steps."""
    rhythm = Rhythm(0.01)
    for _ in range(40):
        rhythm.step_took(0.1)
    for _ in range(4):
        rhythm.save_took(0.001, 0.01, 10, stood_seconds=0.01, wall_seconds=0.11)

    facts = rhythm.facts()
    assert (facts["because"], facts["steps"]) == ("share", 4)


@pytest.mark.parametrize("factor", [0.2, 5.0])
def test_it_adapts_when_the_step_time_changes(factor):
    """Another batch size, another load of the machine: the share stays what was allowed."""
    loop = Loop(step=0.1, pause=0.02, write=0.01).train(2000)
    before = loop.gaps[-1]
    loop.step *= factor
    loop.train(60)
    at_once = loop.costs.facts()["steps"]
    loop.train(20_000 if factor < 1 else 2000)

    assert before == 20
    assert 1 / 1.6 < at_once / (20 / factor) < 1.6
    assert loop.gaps[-1] in (20 / factor, 20 / factor + 1)
    assert loop.costs.facts()["step_seconds"] == pytest.approx(0.1 * factor)


def test_one_long_step_changes_nothing():
    """Medians, not means: a stalled loader is not another step time."""
    loop = Loop(step=0.1, pause=0.02, write=0.01).train(1000)
    loop._pass(3600.0)
    loop.train(300)

    assert loop.gaps[-3:] == [20, 20, 20]


def test_epochs_count_as_steps_where_no_steps_are_told():
    """Keras by the epoch: `every=Every.auto()` has to mean something there as well."""
    loop = Loop(step=5.0, pause=0.2, write=1.0).train(400)

    assert set(loop.gaps[10:]) == {4}


def test_without_any_steps_seconds_decide():
    """A loop that calls only save_if_due now and then."""
    costs = Costs(Every.auto(), 0.0)
    saving = costs.began(60.0)
    saving.waited(60.0)
    saving.returned(61.0)
    saving.committed(62.0, new_bytes=10)
    costs.settle()

    assert not costs.is_due(5, 99.0)
    assert costs.is_due(5, 101.0)


def test_after_a_failed_save_the_next_try_is_as_far_as_the_next_save():
    """A full disk would otherwise stop the loop at every step, for nothing."""
    loop = Loop(step=0.1, pause=0.02, write=0.01).train(2000)
    assert loop.gaps[-1] == 20
    loop.fails = True
    count = len(loop.saves)
    loop.train(200)
    assert 9 <= len(loop.saves) - count <= 11

    loop.fails = False
    loop.train(200)
    assert loop.gaps[-5:] == [20] * 5
    assert loop.costs.count < len(loop.saves)


def test_nothing_is_due_while_a_save_is_under_way():
    """The loop would stand still until it has ended."""
    loop = Loop(step=0.1, pause=0.002, write=0.001).train(1000)
    saving = loop.costs.began(loop.now)
    saving.returned(loop.now)

    assert not loop.costs.is_due(10**6, 1e6)
    saving.committed(loop.now + 1, new_bytes=1)
    assert loop.costs.is_due(10**6, 1e6)


@pytest.mark.parametrize("every", [Every(epochs=1), Every(steps=1, seconds=1)])
def test_another_cadence_is_left_alone(every):
    """What was asked for is what is done."""
    loop = Loop(every)
    loop.save()
    loop.train(200)

    assert not loop.costs.is_due(10**9, 1e9)
    assert loop.costs.facts() == loop.costs.news() == {}


def test_saves_for_other_reasons_do_not_steer():
    """A save at each epoch's end costs more than the share by somebody's own wish; steps are not spread out for that."""
    loop = Loop(step=0.1, pause=0.02, write=0.01).train(1000)
    for _ in range(50):
        loop.train(3)
        loop.save()
    loop.train(100)

    assert loop.gaps[-2:] == [20, 20]


TIMES = st.one_of(st.sampled_from([0.0, -1.0, math.nan, math.inf, -math.inf, 1e308, 5e-324]), st.floats(0, 1e4))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["step", "began", "waited", "returned", "committed", "failed", "rest"]), TIMES),
        max_size=120,
    ),
    st.integers(0, 2**53),
)
def test_no_order_of_calls_and_no_clock_ends_the_training(calls, new_bytes):
    """Measuring must never be the reason why a run stops."""
    costs, saving = Costs(Every.auto(), 0.0), None
    for name, time in [("step", n / 10) for n in range(40)] + calls + [("step", n / 10) for n in range(60)]:
        if name == "began":
            saving = costs.began(time)
        elif name == "committed" and saving is not None:
            cost = saving.committed(time, new_bytes=new_bytes, write_seconds=time, barrier_seconds=time)
            assert all(value >= 0 and math.isfinite(value) for value in msgspec.structs.astuple(cost))
        elif name in ("step", "rest"):
            getattr(costs, name)(time)
        elif saving is not None and name != "committed":
            getattr(saving, name)(time)
        assert costs.is_due(10**6, 1e6) in (True, False)
        assert 0 <= costs.share(time) <= 1
        assert isinstance(costs.warning(time), str)
        steps = costs.facts().get("steps", 1)
        assert 1 <= steps <= pace.MAX_STEPS
    for value in costs.facts().values():
        assert value is None or isinstance(value, str) or math.isfinite(value)


# What is reported


def test_a_save_reports_what_it_has_cost():
    """Pause, wait, time until durable and bytes: each save for itself."""
    costs = Costs(Every(epochs=1), 100.0)
    saving = costs.began(110.0)
    saving.waited(110.5)
    saving.returned(110.6)

    cost = saving.committed(112.6, new_bytes=10**9, linked_bytes=500, barrier_seconds=0.025)

    assert cost == SaveCost(
        pause_seconds=0.125, wait_seconds=0.5, durable_seconds=2.6, write_seconds=2.0, interval_seconds=10.6,
        new_bytes=10**9, linked_bytes=500,
    )  # fmt: skip
    assert cost.bytes_per_second == 5e8
    assert cost.share == pytest.approx(0.625 / 10.6)


def test_a_save_that_is_durable_before_its_call_has_ended_reports_as_well():
    """Small states are written while the thread that saves them is still being started."""
    saving = Costs(Every(epochs=1), 0.0).began(10.0)
    saving.waited(10.0)

    cost = saving.committed(10.004, new_bytes=100)
    saving.returned(10.005)

    assert (cost.pause_seconds, cost.durable_seconds, cost.interval_seconds) == (0.004, 0.004, 10.004)


def test_the_writer_may_report_from_its_own_thread():
    """That is where a save ends."""
    costs = Costs(Every(epochs=1), 0.0)
    for n in range(1, 101):
        saving = costs.began(float(n))
        saving.returned(n + 0.01)
        thread = threading.Thread(target=saving.committed, args=(n + 0.5,), kwargs={"new_bytes": 10})
        thread.start()
        costs.step(n + 0.4)
        thread.join()
    costs.settle()

    assert (costs.count, costs.new_bytes) == (100, 1000)
    assert costs.pause_seconds == pytest.approx(1.0)


def test_totals_count_what_was_committed_and_the_share_counts_everything():
    """A failed save is no save, but it has stopped the loop all the same."""
    loop = Loop(Every(epochs=1), pause=0.5, write=0.1)
    loop.train(10)
    loop.save()
    loop.train(10)
    loop.fails = True
    loop.save()
    loop.train(10)

    assert (loop.costs.count, loop.costs.pause_seconds, loop.costs.new_bytes) == (1, pytest.approx(0.5), 1000)
    assert loop.costs.share(loop.now) == pytest.approx(1.0 / 4.0)


def test_facts_fit_the_place_where_they_are_kept():
    """`run.json` holds what was chosen, and `highcamp show` reads it from there."""
    loop = Loop(step=0.1, pause=0.02, write=0.6, new_bytes=10**9).train(5000)

    facts = PaceFacts(**loop.costs.facts())

    assert msgspec.convert(msgspec.json.decode(msgspec.json.encode(facts)), PaceFacts) == facts
    assert (facts.overhead, facts.steps, facts.seconds, facts.because) == (0.01, 200, 20.0, "wear")
    assert (facts.step_seconds, facts.cost_seconds, facts.durable_seconds) == (0.1, 0.02, 0.62)
    assert (facts.new_bytes, facts.expected_loss_seconds) == (10**9, 10.62)
    assert facts.share == pytest.approx(0.001, rel=0.01)
    assert facts.optimal_seconds == pytest.approx(58.8, rel=0.01)


def test_news_come_once_and_again_when_the_pace_has_changed():
    """`run.json` is made durable each time it is written, which must not happen with every save."""
    loop = Loop(step=0.1, pause=0.02, write=0.01)
    assert loop.costs.news() == {}
    loop.train(2000)

    first = loop.costs.news()
    assert first["steps"] == 20
    loop.train(1000)
    assert loop.costs.news() == {}
    loop.pause = 0.06
    loop.train(5000)
    assert loop.costs.news()["steps"] > 50


def test_a_step_is_profiled_after_the_first_ones():
    """Compilation in the first steps would make a step look ten times as long."""
    loop = Loop(step=50.0)
    loop.train(SKIPPED_STEPS)
    loop.step = 0.1
    loop.train(PROFILED_STEPS - 1)
    assert loop.costs._rhythm.steps.seconds == 0

    loop.train(2)  # one of them may be beside the save that the slow steps have made due
    assert loop.costs._rhythm.steps.seconds == pytest.approx(0.1)


def test_several_steps_told_at_once_are_several():
    """steps_per_execution=10 in Keras: the loop comes back after ten."""
    costs = Costs(Every.auto(), 0.0)
    for n in range(1, 41):
        costs.step(float(n), 10)
    assert costs._rhythm.steps.seconds == pytest.approx(0.1)

    costs.step(41.0, 0)  # an evaluation without a step


def test_an_average_forgets_the_first_and_believes_no_leap():
    """The first save sets memory aside; a stalled disk is no new cost."""
    average = Average()
    for value in (50.0, 1.0):
        average.add(value)
    assert average.value == 1.0

    average.add(1000.0)
    assert average.value == pytest.approx(1.9)
    for value in (math.nan, math.inf, -1.0):
        average.add(value)
    assert average.value == pytest.approx(1.9)


def _attempt(number, hours, ended):
    return Attempt(number, NOW, None, 0, 0, 0, ended, last_at=NOW + timedelta(hours=hours))


def test_failures_are_those_of_the_attempts_before():
    """The attempt under way has not ended either, and is no failure."""
    attempts = [
        _attempt(1, 10, None), _attempt(2, 5, "error"), _attempt(3, 1, "interrupted"), _attempt(4, 8, "complete"),
        _attempt(5, 0, None),
    ]  # fmt: skip

    assert failure_seconds(attempts, before=5) == pytest.approx((24 + 24) * 3600 / 3)
    assert failure_seconds([], before=1) == pace.PRIOR_SECONDS
    assert failure_seconds([_attempt(1, -9, "closed")], before=2) == pace.PRIOR_SECONDS


# What is said


def test_saving_that_is_dear_is_said_once():
    """Nobody looks for it; and nobody wants to read it at every save."""
    loop = Loop(Every(steps=1), step=1.0, pause=0.012, write=0.1)
    said = []
    for _ in range(200):
        loop.train(1)
        loop.write = 1.84
        loop.save()
        said.append(loop.costs.warning(loop.now))

    lines = [line for line in said if line]
    assert len(lines) == 1
    assert lines[0].startswith("Saving took 43.8 % of the last 1 minute (pause 12 ms, wait ")
    assert " ms per save); " in lines[0]
    assert lines[0].endswith("every=Every.auto() saves as often as 1 % of the time allows")


def test_cheap_saving_is_not_mentioned():
    """A warning about nothing hides the next one."""
    loop = Loop(Every(steps=1), step=1.0, pause=0.03, write=0.1)
    for _ in range(2000):
        loop.train(1)
        loop.save()
        assert loop.costs.warning(loop.now) == ""


def test_a_script_of_seconds_is_not_warned():
    """Its first save is half of its time, and that matters to nobody."""
    loop = Loop(Every(steps=1), step=0.01, pause=0.1, write=0.01)
    for _ in range(100):
        loop.train(1)
        loop.save()
        assert loop.costs.warning(loop.now) == ""


def test_what_was_long_ago_does_not_count():
    """A run of days that becomes dear today is told today; one that was dear at its start alone is not."""
    loop = Loop(Every(steps=1), step=10.0, pause=0.01, write=0.1)
    while loop.now - loop.begun < 10 * MAX_WINDOW_SECONDS:
        loop.train(1)
        loop.save()
        assert loop.costs.warning(loop.now) == ""
    loop.pause = 1.0
    begin = loop.now
    while not loop.costs.warning(loop.now):
        loop.train(1)
        loop.save()

    assert loop.now - begin < 3 * MAX_WINDOW_SECONDS


def test_who_asked_for_a_large_share_is_not_warned_of_it():
    """Every.auto(overhead=0.2) is no mistake."""
    loop = Loop(Every.auto(0.2), step=1.0, pause=0.5, write=0.1)
    for _ in range(1000):
        loop.train(1)
        assert loop.costs.warning(loop.now) == ""
    assert loop.costs.share(loop.now) > 0.1


AUTO = "every=Every.auto() saves as often as 1 % of the time allows"
OVERLAP = 'snapshot="overlap" shortens the pause'


@pytest.mark.parametrize(
    ("parts", "is_auto", "overlaps", "advice"),
    [
        ((0.8, 0.0, 0.0), False, False, f"{AUTO}, {OVERLAP}"),
        ((0.1, 0.8, 0.0), False, False, AUTO),
        ((0.8, 0.0, 0.0), True, False, OVERLAP),
        ((0.8, 0.0, 0.0), False, True, AUTO),
        ((0.8, 0.0, 0.0), True, True, "save less often"),
    ],
)
def test_the_warning_says_what_would_help(parts, is_auto, overlaps, advice):
    """Advice that is followed already is none."""
    line = messages.saving_is_dear(0.071, 600.0, *parts, is_auto=is_auto, overlaps=overlaps)

    assert line.startswith("Saving took 7.1 % of the last 10 minutes (pause ")
    assert line.endswith(f"; {advice}")


def test_a_save_and_a_run_are_summed_up_in_a_line():
    """Figures that people can compare with their disk."""
    cost = SaveCost(
        pause_seconds=0.0031, wait_seconds=0.84, durable_seconds=0.61, write_seconds=0.5, interval_seconds=200.0,
        new_bytes=600_000_000, linked_bytes=1_500_000_000,
    )  # fmt: skip

    assert messages.saved("step-00000450", cost) == (
        "saved step-00000450: pause 3.1 ms, waited 840 ms for the save before, durable after 610 ms, "
        "600 MB written, 1.5 GB linked, 1.2 GB/s"
    )
    assert messages.saved("step-00000450", SaveCost(durable_seconds=12.3)) == (
        "saved step-00000450: pause 0.0 ms, durable after 12 s, 0 B written"
    )
    assert messages.saves_words(12, 0.0031, 1.2e9, 0.004) == (
        "12 saves, pause 3.1 ms each, 1.2 GB/s, 0.4 % of training time"
    )
    assert messages.summary(None, 1, 0.004, "runs/a", pause_seconds=1.5) == (
        "1 save, pause 1.5 s, 0.4 % of training time · highcamp ls runs/a"
    )


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0, "0.0 ms"), (0.00994, "9.9 ms"), (0.00996, "10 ms"), (0.9994, "999 ms"), (0.9996, "1.0 s"), (9.96, "10 s")],
)
def test_times_have_a_fitting_unit(seconds, words):
    """1000 ms, or 0.0 s, is hard to read."""
    assert messages.seconds_words(seconds) == words


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 B"), (999, "999 B"), (999_600, "1.0 MB"), (1_200, "1.2 kB"), (137e6, "137 MB"), (5.4e12, "5400 GB")],
)
def test_sizes_have_a_fitting_unit(size, words):
    """As for times."""
    assert messages.size_words(size) == words

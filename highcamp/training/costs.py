"""What saving costs: the times of every save and of the steps beside it, for reports, for warnings and for `Every.auto`.

The loop tells of its steps and saves, the writer's thread of how a save ended; every time is given by the caller, in
seconds of one monotonic clock. Nothing is locked: what the two threads share is assigned once, and the loop does the sums.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from highcamp.policy.pace import MAX_WALL_SECONDS, PRIOR_SECONDS
from highcamp.run.history import SaveCost
from highcamp.training import messages
from highcamp.training.rhythm import QUIET_SHARE, Rhythm, to_microseconds

if TYPE_CHECKING:
    from highcamp.policy.cadence import Every

MAX_SHARE = 0.05  # of wall time; saving that costs more is said once
MIN_WINDOW_SECONDS = 60.0  # before that, a script of a few seconds would be told about its first save
MAX_WINDOW_SECONDS = 600.0  # costs of the last ten minutes are told, not those of yesterday
MIN_SAVES = 3  # the first save sets memory aside
RETOLD_SHARE = 0.2  # `run.json` is written again when the pace has changed by more than this


class Saving:
    """One save, from the call that makes it to its end.

    `waited` and `returned` belong to the loop, `committed` and `failed` to whoever finishes it.
    """

    def __init__(self, costs: Costs, began_at: float, previous_at: float, *, is_steered: bool) -> None:
        """previous_at: when the loop went on after the save before. is_steered: whether it came from the rhythm."""
        self.began_at, self.previous_at, self.is_steered = began_at, previous_at, is_steered
        self.returned_at: float | None = None
        self.ended_at: float | None = None
        self.cost: SaveCost | None = None
        self.call_seconds = self.barrier_seconds = self.wait_seconds = self.excess_seconds = 0.0
        self._costs = costs

    @property
    def slowed_seconds(self) -> float:
        """By how much the steps beside it have taken longer than usual; shorter ones count against it."""
        return max(0.0, self.excess_seconds - self.barrier_seconds)

    @property
    def pause_seconds(self) -> float:
        """How long the loop stood still for it, in the call and at the barrier."""
        return self.call_seconds + self.barrier_seconds

    def waited(self, now: float) -> None:
        """The save before has ended, and this one may begin."""
        self.wait_seconds = _span(self.began_at, now)

    def returned(self, now: float) -> None:
        """The loop goes on."""
        self.call_seconds = max(0.0, _span(self.began_at, now) - self.wait_seconds)
        self.returned_at = now
        self._costs._returned(self, now)  # noqa: SLF001  (two halves of one thing)

    def committed(
        self,
        now: float,
        *,
        new_bytes: int,
        linked_bytes: int = 0,
        barrier_seconds: float = 0.0,
        write_seconds: float | None = None,
    ) -> SaveCost:
        """It is durable; returns what it has cost, for the history.

        barrier_seconds: how long an optimizer's step has waited for an overlapped snapshot. write_seconds: of the writing
        alone; by default everything since the loop went on.
        """
        self.barrier_seconds = _span(0.0, barrier_seconds)
        durable = _span(self.began_at, now)
        pause, returned = self.pause_seconds, self.returned_at
        if returned is None:  # a small state may be durable before the call has ended
            pause, returned = pause + max(0.0, durable - self.wait_seconds), now
        if write_seconds is None:
            write_seconds = _span(returned, now) or durable
        self.cost = SaveCost(
            pause_seconds=to_microseconds(pause),
            wait_seconds=to_microseconds(self.wait_seconds),
            durable_seconds=to_microseconds(durable),
            write_seconds=to_microseconds(_span(0.0, write_seconds)),
            interval_seconds=to_microseconds(_span(self.previous_at, returned)),
            new_bytes=new_bytes,
            linked_bytes=linked_bytes,
        )
        self.ended_at = now  # last: the loop takes it for the sign that all the rest is there
        return self.cost

    def failed(self, now: float) -> None:
        """It has failed, in the loop or in the background."""
        self.ended_at = now


class Costs:
    """The costs of one attempt's saves.

    count, pause_seconds, wait_seconds, slowed_seconds, new_bytes, write_seconds: of the saves that have ended well.
    slowed_seconds: by how much the steps beside them were longer than others.
    """

    def __init__(self, every: Every, now: float, *, failure_seconds: float = PRIOR_SECONDS) -> None:
        """The attempt begins. failure_seconds: see `highcamp.training.rhythm.failure_seconds`."""
        self.count = self.new_bytes = 0
        self.pause_seconds = self.wait_seconds = self.slowed_seconds = self.write_seconds = 0.0
        self._overhead = every.overhead
        self._rhythm = Rhythm(every.overhead, failure_seconds)
        self._began_at = self._previous_at = self._mark = now
        self._carried = 0.0  # of the step under way, before a save in its middle
        self._steps = 0  # since the last save was begun, whether it worked or not
        self._calling: Saving | None = None  # a save that the loop stands still for
        self._saving: Saving | None = None  # one in the background
        self._has_failed = False
        self._spent = 0.0  # by saves that have failed as well
        self._window = (now, 0, 0.0, 0.0, 0.0)  # since when, saves, pause, wait, slowed
        self._has_warned = False
        self._told: dict[str, float | int | str | None] = {}

    # The loop

    def step(self, now: float, count: int = 1) -> None:
        """`count` steps have been done since the last call; an epoch of which no step is counted is one."""
        if count <= 0:
            return
        seconds = now - self._mark + self._carried
        mark, self._mark, self._carried = self._mark, now, 0.0
        self._steps += count
        saving = self._saving
        if self._calling is not None:
            self._calling = None  # it was left by an exception: how long it took is not known
        elif saving is not None:
            self._beside(saving, mark, now, seconds, count)
        elif 0 <= seconds < math.inf:
            self._rhythm.step_took(seconds / count)

    def rest(self, now: float) -> None:
        """What has passed since the last step was no part of one: validation, or the time between two epochs."""
        self._mark, self._carried = now, 0.0

    def is_due(self, steps: int, seconds: float) -> bool:
        """Whether `Every.auto` allows a save, so many steps and seconds after the last one that worked.

        After a failed one it is as far to the next try as to the next save, lest a full disk stop the loop at every step.
        """
        saving = self._saving
        if self._overhead is None or (saving is not None and saving.ended_at is None):
            return False
        has_failed = self._has_failed if saving is None else saving.cost is None
        if has_failed and self._steps:
            steps, seconds = min(steps, self._steps), min(seconds, _span(self._previous_at, self._mark))
        return self._rhythm.is_due(steps, seconds)

    def began(self, now: float) -> Saving:
        """A save begins: the loop stands still until its `returned`."""
        if self._calling is None:
            self._carried += now - self._mark
        interval = self._rhythm.interval_steps
        is_steered = interval is not None and self._steps >= interval
        self._calling = saving = Saving(self, now, self._previous_at, is_steered=is_steered)
        return saving

    def settle(self) -> None:
        """Nothing is under way any more: the last save is counted in."""
        self._close()

    def _returned(self, saving: Saving, now: float) -> None:
        self._close()  # one save at a time: the one before has ended
        self._calling, self._saving = None, saving
        self._steps = 0
        self._mark = self._previous_at = now

    def _beside(self, saving: Saving, mark: float, now: float, seconds: float, count: int) -> None:
        """Steps while a save was under way: what they took longer than others, as far as the save lasted."""
        ended = saving.ended_at
        overlap = _span(mark, now if ended is None else min(ended, now))
        usual = self._rhythm.steps
        if 0 <= seconds < math.inf:
            if usual.seconds:
                # A save slows the loop for no longer than it lasts: a step with validation in it does not count for more.
                saving.excess_seconds += min(seconds - count * usual.mean_seconds, overlap)
            if overlap <= QUIET_SHARE * seconds:
                self._rhythm.step_took(seconds / count)
        if ended is not None:
            self._close()

    def _close(self) -> None:
        """Count a save in that has ended."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        stood = saving.pause_seconds + saving.wait_seconds
        slowed, cost = saving.slowed_seconds, saving.cost
        began, saves, pause, wait, slow = self._window
        self._window = (
            began, saves + 1, pause + saving.pause_seconds, wait + saving.wait_seconds, slow + slowed,
        )  # fmt: skip
        self._spent += stood + slowed
        self._has_failed = cost is None
        if cost is None:
            return
        self.count += 1
        self.pause_seconds += saving.pause_seconds
        self.wait_seconds += saving.wait_seconds
        self.slowed_seconds += slowed
        self.new_bytes += cost.new_bytes
        self.write_seconds += cost.write_seconds
        self._rhythm.save_took(
            saving.pause_seconds + slowed,
            cost.durable_seconds - cost.wait_seconds,
            cost.new_bytes,
            stood_seconds=stood + slowed,
            wall_seconds=cost.interval_seconds if saving.is_steered else 0.0,
        )

    # What has come of it

    def share(self, now: float) -> float:
        """The share of the attempt's time that saving has cost, slower steps included."""
        elapsed = _span(self._began_at, now)
        return min(1.0, self._spent / elapsed) if elapsed else 0.0

    def warning(self, now: float, *, overlaps: bool = False) -> str:
        """The line that says that saving is dear, once, if it is; "" otherwise. overlaps: whether snapshots do already."""
        since, saves, pause, wait, slowed = self._window
        elapsed = _span(since, now)
        if self._has_warned or saves < MIN_SAVES or elapsed < MIN_WINDOW_SECONDS:
            return ""
        share = (pause + wait + slowed) / elapsed
        if share > max(MAX_SHARE, 2 * (self._overhead or 0.0)):
            self._has_warned = True
            return messages.saving_is_dear(
                share, elapsed, pause / saves, wait / saves, slowed / saves,
                is_auto=self._overhead is not None, overlaps=overlaps,
            )  # fmt: skip
        if elapsed > MAX_WINDOW_SECONDS:
            self._window = (now, 0, 0.0, 0.0, 0.0)
        return ""

    def facts(self) -> dict[str, float | int | str | None]:
        """What `Every.auto` has chosen and why; {} for another cadence, and while nothing is chosen."""
        return self._rhythm.facts()

    def news(self) -> dict[str, float | int | str | None]:
        """The facts, if they are worth writing down anew: chosen for the first time, or clearly changed; {} otherwise."""
        facts, told = self.facts(), self._told
        if not facts:
            return {}
        if told and told["because"] == facts["because"]:
            before, after = float(told["steps"] or 0), float(facts["steps"] or 0)
            if abs(after - before) <= RETOLD_SHARE * before:
                return {}
        self._told = facts
        return facts


def _span(begin: float, end: float) -> float:
    """The time between two readings of a clock; 0 for what is no time."""
    seconds = end - begin
    return seconds if 0 < seconds < MAX_WALL_SECONDS else 0.0

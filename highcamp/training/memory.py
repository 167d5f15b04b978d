"""The memory of an attempt: its newest snapshot, kept in shared memory beside the checkpoints on disk."""

from __future__ import annotations

import atexit
import weakref
from typing import TYPE_CHECKING, Any

from highcamp.errors import HighcampError, StorageError
from highcamp.run.attempt import local_directory
from highcamp.training import messages, tier
from highcamp.training.slot import SlotFile
from highcamp.training.tier import Tier
from highcamp.training.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from highcamp.policy.cadence import Every
    from highcamp.run.attempt import OngoingAttempt
    from highcamp.run.checkpoint import Checkpoint
    from highcamp.training.messages import Voice
    from highcamp.training.progress import Progress
    from highcamp.training.slot import Slot
    from highcamp.training.snapshot import Shot


QUICK_BYTES = 4 << 20
"""Up to here a snapshot is completed at once: hashing it takes less than half a millisecond, a thread begins hardly sooner."""
QUICK_TENSORS = 1000
"""More take as long to be written down."""


class Memory:
    """Snapshots in shared memory, beside the checkpoints on disk. `every`: None is off."""

    def __init__(self, every: Every | None, voice: Voice) -> None:
        """Nothing is allocated yet."""
        self._every, self._voice = every, voice
        self._tier: Tier | None = None
        self._sealer = Writer()
        self._slot: Slot | None = None
        self._kept = (0, 0, 0)
        self._kept_at = 0.0
        self._newest_step = self._durable_step = -1
        self._failure: HighcampError | None = None  # of completing a snapshot, which the loop is to be told of
        self.count, self.pause_seconds = 0, 0.0

    def open(self, attempt: OngoingAttempt, progress: Progress, now: float) -> None:
        """The attempt has begun; what was left by others is in its checkpoints now, or is of no use."""
        store = attempt.run.store
        place = local_directory(store)
        try:
            for path in tier.sweep(attempt.run_id, place=place):
                self._voice.say(f"removed {path}", level=2)
        except HighcampError as error:
            self._voice.say(str(error), level=0)
        self._kept, self._kept_at, self._durable_step = progress.key, now, progress.step
        if self._every is None:
            return
        try:
            if store.url.startswith("memory://"):
                raise StorageError(
                    f"{store.url} ends with this process, and there would be no run to go on with",
                    path=store.url,
                    hint="leave memory_every out, or keep the run on a disk",
                )
            self._tier = Tier(attempt.run_id, attempt.number, place=place)
        except HighcampError as error:
            self._turn_off(error)
        else:
            atexit.register(_let_go, weakref.ref(self))  # a program that is done need not have called `close`

    @property
    def is_on(self) -> bool:
        """Whether snapshots are kept in shared memory."""
        return self._tier is not None

    def is_due(self, progress: Progress, now: float) -> bool:
        """Whether a snapshot is due at this place."""
        if self._tier is None or self._every is None:
            return False
        epoch, _, step = self._kept
        return self._every.is_due(
            epochs=progress.epoch - epoch, steps=progress.step - step, seconds=now - self._kept_at
        )

    def block(self, needed: int, wait: Callable[[Slot], None]) -> memoryview | None:
        """Memory for the next shot, in the slot that does not hold the newest snapshot; None if there is none.

        No snapshot may be under way. wait: waits for whoever still reads the slot, and raises what has gone wrong there.
        """
        if self._tier is None:
            return None
        try:
            slot = self._tier.slot(max(needed, 1))
        except StorageError as error:
            self._turn_off(error)
            return None
        wait(slot)
        slot.begin()
        self._slot = slot
        return slot.view

    def take_slot(self) -> Slot | None:
        """The slot that `block` has given out since this was last asked."""
        slot, self._slot = self._slot, None
        return slot

    def drain(self) -> BaseException | None:
        """Wait until the snapshot under way is complete; returns an error of the state that nobody has been told of yet."""
        if not self._sealer.is_of_this_process:
            return None  # what is under way belongs to the process from which this one was forked
        error = self._sealer.drain()
        failure, self._failure = self._failure, None
        if failure is not None and self._tier is not None:
            self._turn_off(failure)
        return error

    def keep(self, slot: Slot, shot: Shot, facts: Mapping[str, Any], confirm: Callable[[], None] | None) -> None:
        """Complete a snapshot, in the background if that takes long. Raises what its copy has raised."""

        def seal(_: Callable[[Checkpoint], None]) -> None:
            try:
                self.seal(slot, shot, facts, confirm)
            finally:
                shot.close()

        try:
            if self.seal_quickly(slot, shot, facts, confirm):
                shot.close()
                return
        except BaseException:
            shot.close()
            raise
        self._sealer.start(f"step-{facts['step']:08d} in memory", seal)

    def seal_quickly(
        self, slot: Slot, shot: Shot, facts: Mapping[str, Any], confirm: Callable[[], None] | None
    ) -> bool:
        """Make the snapshot in `slot` complete if that takes no time worth a thread; whether it was."""
        count = sum(len(each.layout.entries) for part in shot.parts for each in part.files)
        if confirm is not None or shot.stream.size > QUICK_BYTES or count > QUICK_TENSORS:
            return False
        self.seal(slot, shot, facts, confirm)
        return True

    def seal(self, slot: Slot, shot: Shot, facts: Mapping[str, Any], confirm: Callable[[], None] | None) -> None:
        """Make the snapshot in `slot` complete. Raises Torn; a failure of the memory is for the next `drain` to tell."""
        shot.stream.wait_filled(late=False)
        if confirm is not None:
            confirm()
        places = shot.places()
        files = [each for part in shot.parts for each in part.files if each.same is None]
        try:
            slot.seal(facts, [SlotFile(each.name, each.layout, places[each.name]) for each in files])
        except HighcampError as error:
            self._failure = error
        else:
            self._newest_step = facts["step"]

    def note(self, progress: Progress, now: float, pause_seconds: float | None = None) -> None:
        """A snapshot of this place was taken. pause_seconds: what it has cost the loop, if it was for memory alone."""
        self._kept, self._kept_at = progress.key, now
        if pause_seconds is not None:
            self.count += 1
            self.pause_seconds += pause_seconds

    def outlive(self, step: int) -> None:
        """The checkpoint of `step` is durable: no snapshot up to there is needed any more."""
        self._durable_step = max(self._durable_step, step)

    def rewind(self, progress: Progress, now: float) -> None:
        """The loop went back: what was kept of the steps that it has left is void."""
        self._sealer.drain()  # an error of a snapshot that is not wanted any more
        while self._tier is not None and (slot := self._tier.newest) is not None:
            slot.begin()
        self._kept, self._kept_at = progress.key, now
        self._newest_step, self._durable_step = -1, progress.step

    def _turn_off(self, error: HighcampError) -> None:
        """Once: training goes on with checkpoints on disk alone."""
        self._voice.say(messages.no_memory_tier(error), level=0)
        self._give_back(keep=False)

    def close(self, *, keep: bool) -> None:
        """Give the memory back. keep: leave the newest snapshot for the next attempt, if it is newer than what is durable."""
        if self._sealer.is_of_this_process:
            self._sealer.drain()  # what goes wrong with it has been told, or is the lesser news
            self._give_back(keep=keep and self._newest_step > self._durable_step)

    def _give_back(self, *, keep: bool) -> None:
        held, self._tier = self._tier, None
        if held is not None:
            try:
                held.close(keep=keep)
            except HighcampError as error:
                self._voice.say(str(error), level=0)


def _let_go(reference: weakref.ref[Memory]) -> None:
    memory = reference()
    if memory is not None:
        memory.close(keep=True)

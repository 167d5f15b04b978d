"""The source: how the live state becomes a shot that can be written, at the least cost to the loop."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from highcamp.errors import HighcampError
from highcamp.run import live
from highcamp.training.overlap import Overlap
from highcamp.training.recall import Recall
from highcamp.training.snapshot import Snapshot
from highcamp.training.stream import Cuts
from highcamp.training.unchanged import Unchanged

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from highcamp.core.tree import Flat
    from highcamp.run.checkpoint import Checkpoint
    from highcamp.run.live import Flatten
    from highcamp.storage.store import Store
    from highcamp.training.overlap import Late
    from highcamp.training.snapshot import Shot


class Source:
    """The state of one attempt: tracked objects, or what is passed to each save. One shot at a time."""

    def __init__(
        self,
        store: Store,
        *,
        overlaps: bool,
        staging_bytes: int | None,
        tell: Callable[[str], object] = lambda _: None,
    ) -> None:
        """overlaps: whether what tracked optimizers write to is copied while the loop goes on.

        staging_bytes, tell: see `Snapshot`.
        """
        self._recall, self._has_tracked = Recall(), False
        self._cuts = Cuts(self._recall.holds)
        self._unchanged = Unchanged(store)
        self._snapshot = Snapshot(staging_bytes, tell=tell)
        self._overlap = Overlap() if overlaps else None
        self._late: Late = {}

    def open(self, tracked: Mapping[str, object], flats: Mapping[str, Flat], resumed_from: Checkpoint | None) -> None:
        """The attempt begins. flats: the state of the tracked objects, for which memory is set aside."""
        if self._overlap is not None:
            self._overlap.watch(tracked)
        self._has_tracked = bool(tracked)
        self._snapshot.prepare(flats, overlaps=self._overlap is not None)
        if resumed_from is not None:
            self.go_on_from(resumed_from)

    def go_on_from(self, checkpoint: Checkpoint) -> None:
        """The state was restored: what is saved next may share files with this checkpoint, and with no other."""
        # Without it the next checkpoint is written whole. What is wrong with it has been told when it was restored.
        with suppress(HighcampError):
            self._unchanged.learn_from_disk(checkpoint)

    def shoot(
        self, capture: Callable[[Flatten], dict[str, Flat]], *, block: Callable[[int], memoryview | None] | None = None
    ) -> Shot:
        """Plan the copy of the state; `expose` makes it.

        The shot before must have been written, or have failed, unless this one has memory of its own.

        capture: gives the flattened objects; their arrays may be live. block: gives memory to copy to, so many bytes,
        instead of the source's own; None if it has none. Raises InvalidState, MemoryError.
        """
        if self._overlap is not None:
            self._overlap.wait()  # for a snapshot in other memory, whose copy may still be under way
        # A state that is passed is not the same again, and not ours to keep alive.
        flats = capture(self._recall if self._has_tracked else live.flat)
        arrays = {name: flat.arrays for name, flat in flats.items()}
        groups = self._unchanged.groups(arrays)
        self._late = self._overlap.late(self._recall, arrays) if self._overlap is not None else {}
        return self._snapshot.take(flats, groups, late=frozenset(self._late), cuts=self._cuts, block=block)

    def expose(self, shot: Shot) -> Callable[[], None] | None:
        """Copy what cannot wait, and begin to copy what can; the state may then change as the loop changes it.

        Returns what raises Torn if the state has changed otherwise. Of a ring, `Shot.fill` is for when somebody reads.
        """
        if not shot.stream.is_ring:
            shot.fill()
        late, self._late = self._late, {}
        return self._overlap.arm(shot, late) if self._overlap is not None else None

    @property
    def size_bytes(self) -> int:
        """The staging memory held."""
        return self._snapshot.size_bytes

    @property
    def overlaps(self) -> bool:
        """Whether what optimizers write to is copied while the loop goes on."""
        return self._overlap is not None

    def take_waited(self) -> float:
        """Seconds that the barrier in front of the optimizers' steps has cost the loop since this was last asked."""
        return self._overlap.take_waited() if self._overlap is not None else 0.0

    def learn(self, checkpoint: Checkpoint, shot: Shot, digests: Mapping[str, Sequence[str]]) -> None:
        """The shot was committed. digests: of the tensors of each file."""
        self._unchanged.learn(checkpoint, shot.tables(digests), could_link=shot.could_link)

    def close(self) -> None:
        """Let go of hooks, files and memory."""
        if self._overlap is not None:
            self._overlap.close()
        self._snapshot, self._recall, self._cuts, self._late = Snapshot(), Recall(), Cuts(), {}

"""Progress: where the loop is, as it is counted, saved and restored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from highcamp.core.tree import flatten
from highcamp.errors import Damaged, InvalidArgument, Mismatch
from highcamp.run import live, passed
from highcamp.run.reading import Reading
from highcamp.training import batches
from highcamp.training.rng import check_random_state, random_state, set_random_state

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from highcamp.core.tree import Flat
    from highcamp.run.checkpoint import Checkpoint
    from highcamp.training.batches import Place

PROGRESS = "progress"
"""The object that holds all this in a checkpoint."""


@dataclass
class Progress:
    """Where the loop is.

    epoch, step: done. batch: batches done in the epoch under way. place: how the iteration over the batches began.
    is_iterating: whether a batch is at hand. is_counted: whether that batch is counted already. rest: the random states as
    the batches ended, where a framework module knows: what is measured since draws from them, and does so again after a
    restart. length: batches in the epoch that was iterated over last, None if nobody knows. length_before: that of the run
    before it was resumed, until it is iterated over again.
    """

    epoch: int = 0
    step: int = 0
    batch: int = 0
    place: Place | None = None
    in_epoch: bool = False
    is_iterating: bool = False
    is_counted: bool = False
    is_logged: bool = False
    rest: dict[str, Any] | None = field(default=None, repr=False)
    length: int | None = None
    length_before: int | None = None
    _first_step: int = 0
    _resumed: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def key(self) -> tuple[int, int, int]:
        """Tells two places apart: (epoch, batch, step)."""
        return (self.epoch, self.batch, self.step)

    @property
    def at_boundary(self) -> bool:
        """Whether the batches of the epoch under way are done, so that what is measured belongs to its end."""
        return self.in_epoch and not self.is_iterating

    @property
    def boundary_step(self) -> int:
        """The step that metrics measured now belong to: the one under way while a batch is at hand.

        An epoch without counted batches is one step.
        """
        if self.is_iterating:
            return self.step + (0 if self.is_counted else 1)
        return self.step + (1 if self.at_boundary and self.step == self._first_step else 0)

    @property
    def boundary_epoch(self) -> int:
        """The epoch that metrics measured now belong to: the one just done, or those done before a running one."""
        return self.epoch + (1 if self.at_boundary else 0)

    @property
    def boundary_batch(self) -> int:
        """The batch that metrics measured now belong to, 0 between epochs."""
        return self.batch + (0 if self.is_counted else 1) if self.is_iterating else 0

    @property
    def is_unknown(self) -> bool:
        """Whether an epoch is under way of which nothing is counted: it may have begun just now, or be all but done."""
        return self.at_boundary and self.batch == 0 and self.step == self._first_step

    def begin_epoch(self) -> None:
        """An epoch begins, or goes on where it was."""
        if self._resumed is None:
            self.batch, self.place = 0, None  # the one before may have been left by `break`
        self.in_epoch, self.is_logged, self.is_iterating, self.rest = True, False, False, None
        # After a resume in its middle, an epoch has steps behind it already.
        self._first_step = self.step if self._resumed is None else -1

    def next_batch(self) -> None:
        """A batch is at hand."""
        self.is_iterating, self.is_counted = True, False

    def count_batch(self) -> None:
        """The batch at hand is done; counted once, however often this is said."""
        if self.is_iterating and not self.is_counted:
            self.batch, self.step, self.is_counted = self.batch + 1, self.step + 1, True

    def hand_over(self) -> None:
        """A framework module goes on with the epoch that was resumed in its middle; `batches` is not needed for it."""
        self._resumed = None

    def end_epoch(self, where: str) -> None:
        """An epoch is done. Raises Mismatch if it was resumed in its middle and not gone on with."""
        if self._resumed is not None:
            raise Mismatch(
                f"{where} was resumed after {self.batch} batches of epoch {self.epoch + 1}, but batches() was not called",
                path=where,
                hint="iterate over checkpointer.batches(loader), as when it was saved",
            )
        self.step = self.boundary_step
        self.epoch, self.batch, self.place, self.rest = self.epoch + 1, 0, None, None
        self.in_epoch = False

    def iterate(self, loader: Iterable[Any], where: str) -> tuple[Iterator[Any], Place]:
        """The batches still to do in this epoch."""
        if self.place is not None:
            raise InvalidArgument(
                f"batches() was called twice in epoch {self.epoch + 1}, so a restart could not tell where to go on",
                hint="iterate once in each epoch: chain the loaders, or count each pass as an epoch",
            )
        saved, self._resumed = self._resumed, None
        self.is_logged = False  # what was logged before the batches is not the end of the epoch
        if saved is None:
            found = batches.begin(loader)
        else:
            found = batches.resume(loader, saved["place"], self.batch, where=where)
            set_random_state(saved["random"], where=where)
        self.length = found[1].length
        return found

    def move(self, step: int | None, epoch: int | None) -> None:
        """The caller counts by itself. Raises InvalidArgument for what is no count."""
        for name, value in (("step", step), ("epoch", epoch)):
            if value is not None and (isinstance(value, bool) or not hasattr(value, "__index__") or int(value) < 0):
                raise InvalidArgument(
                    f"{name} is {value!r}, not a count", hint=f"pass how many {name}s are done, an int"
                )
        self.step = self.step if step is None else int(step)
        self.epoch = self.epoch if epoch is None else int(epoch)

    def capture(self) -> Flat:
        """What is saved of it: the counters, the random states now, and, in the middle of an epoch, how it began."""
        place = self.place.tree() if self.place is not None and self.batch else None
        counters = {"epoch": self.epoch, "step": self.step, "batch": self.batch, "length": self.length}
        state = random_state() if self.rest is None else self.rest
        return flatten({**counters, "random": state, "place": place}, live.as_array, where=PROGRESS)

    def restore(self, checkpoint: Checkpoint, objects: Mapping[str, object]) -> None:
        """Put a checkpoint into the tracked objects, and take its counters and random states over.

        Raises Mismatch; before that nothing is changed. Raises Damaged; before that no counter and no random state is
        changed, but the objects may be overwritten in part.
        """
        with Reading(checkpoint) as reading:
            saved = self._read(reading, checkpoint)
            reading.restore(objects)
        self._take(saved, checkpoint.path)

    def restore_like(self, checkpoint: Checkpoint, like: object) -> Any:
        """A checkpoint as a tree with the structure of `like`; its counters and random states are taken over."""
        with Reading(checkpoint) as reading:
            saved = self._read(reading, checkpoint)
            objects = [name for name in checkpoint.objects if name != PROGRESS]
            tree = passed.fill(like, reading.saved, objects, where=checkpoint.path)
        self._take(saved, checkpoint.path)
        return tree

    def _read(self, reading: Reading, checkpoint: Checkpoint) -> dict[str, Any]:
        saved = reading.state(PROGRESS)
        counters = ("epoch", "step", "batch")
        if (
            not isinstance(saved, dict)
            or not all(type(saved.get(name)) is int for name in counters)
            or type(saved.get("length", 0)) not in (int, type(None))
            or "random" not in saved
        ):
            raise Damaged(f"{checkpoint.name}: its progress is malformed", path=checkpoint.path)
        check_random_state(saved["random"], where=checkpoint.path)
        return cast("dict[str, Any]", saved)

    def _take(self, saved: dict[str, Any], where: str) -> None:
        self.epoch, self.step, self.batch = saved["epoch"], saved["step"], saved["batch"]
        self.in_epoch, self.is_iterating, self.is_logged, self.place, self.rest = False, False, False, None, None
        self._resumed = saved if self.batch else None
        self.length = self.length_before = saved.get("length")
        set_random_state(saved["random"], where=where)  # last: restoring objects may have drawn numbers

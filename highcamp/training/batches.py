"""Batches: an iteration over training data that knows how far it is, and can go on from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from highcamp.errors import Mismatch
from highcamp.run import live
from highcamp.training.rng import random_state, set_random_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from highcamp.training.progress import Progress


T = TypeVar("T")

_SAME_DATA = "use the same data and batch size as when it was saved"


@dataclass
class Place:
    """Where an epoch's iteration stands, as it is saved.

    before: every global random state before the iteration began, because that decides its order. order: the loader's own
    state then (a generator's), None where only the global ones decide. loader: the live loader, if it can tell its
    position itself. length: batches in the epoch, None if nobody knows.
    """

    before: dict[str, Any]
    order: object | None = None
    loader: object | None = field(default=None, repr=False)
    length: int | None = None

    def tree(self) -> dict[str, Any]:
        """What is saved."""
        position = live.loader_position(self.loader) if self.loader is not None else None
        return {"before": self.before, "order": self.order, "position": position, "length": self.length}


def begin(loader: Iterable[Any]) -> tuple[Iterator[Any], Place]:
    """Start a fresh epoch over `loader`. The states are taken before `iter()`, which may draw from them already."""
    place = Place(random_state(), live.loader_order(loader), loader, length(loader))
    return iter(loader), place


def resume(loader: Iterable[Any], saved: dict[str, Any], skip: int, *, where: str) -> tuple[Iterator[Any], Place]:
    """Go on with an epoch of which `skip` batches are done; the batches that follow are those that would have followed.

    saved: a `Place.tree()`. Loaders that can are moved there at once; sequences skip by index; anything else is read and
    thrown away. The caller sets the random states of the save afterwards. Raises Mismatch if the data end before `skip`, or
    make another number of batches than in `saved`: then the first ones were not those that would be skipped.
    """
    before, now = saved.get("length"), length(loader)
    if None not in (before, now) and before != now:
        raise Mismatch(
            f"{where} was saved after {skip} of {before} batches of its epoch, the loader given to batches() has {now}",
            path=where,
            hint=_SAME_DATA,
        )
    set_random_state(saved["before"], where=where)
    place = Place(saved["before"], saved["order"], loader, now)
    batches = live.loader_resume(loader, saved["order"], saved["position"], skip)
    if batches is None:
        count = length(loader)
        if count is not None and _is_read_by_index(loader):
            if count < skip:
                raise _too_short(skip, count, where)
            batches = (loader[at] for at in range(skip, count))  # type: ignore[index]
        else:
            batches = iter(loader)
            for done in range(skip):
                if next(batches, batches) is batches:
                    raise _too_short(skip, done, where)
    return batches, place


def count(
    loader: Iterable[T],
    progress: Progress,
    end_step: Callable[..., None],
    stop_if_asked: Callable[[], None],
    say: Callable[..., None],
    *,
    where: str,
) -> Iterator[T]:
    """Yield the batches of the epoch under way that are still to do; each is a step, done when the next one is asked for.

    end_step: called when one is done, as `Checkpointer.end_step` is. stop_if_asked: called when a batch cannot be had, for
    what asks this process to stop may have ended the workers of the loader first. say: called with a line and a level, if
    the data have another length than before the run was resumed.
    """
    before, progress.length_before = progress.length_before, None
    iterator, progress.place = progress.iterate(loader, where)
    if None not in (before, progress.length) and before != progress.length:
        words = f"{where} was saved with {before} training batches in an epoch, here are {progress.length}"
        say(f"{words}: the run goes on, but is another one from here", level=0)
    iterator, last = iter(iterator), length(loader)
    try:
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                break
            except Exception:
                if progress.batch:
                    stop_if_asked()
                raise
            progress.next_batch()
            yield batch
            progress.count_batch()
            end_step(0, is_last=progress.batch == last)
    finally:
        progress.is_iterating = False  # after `break` as well


def _is_read_by_index(loader: Iterable[Any]) -> bool:
    """Whether iterating over it means reading item 0, 1, 2, …; an `__iter__` of its own may shuffle, and draw for it."""
    return isinstance(loader, Sequence) or (hasattr(loader, "__getitem__") and not hasattr(type(loader), "__iter__"))


def _too_short(skip: int, found: int, where: str) -> Mismatch:
    return Mismatch(
        f"{where} was saved after {skip} batches of its epoch, the loader given to batches() has only {found}",
        path=where,
        hint=_SAME_DATA,
    )


def length(loader: Any) -> int | None:
    """How many batches an epoch has, None if that cannot be told."""
    try:
        return len(loader)
    except TypeError:
        return None

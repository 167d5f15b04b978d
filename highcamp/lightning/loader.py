"""The training data: how an epoch over them began, where it stands, and how it goes on there after a restart.

Lightning lets users return a CombinedLoader, so the one it would make itself is replaced by one that tells when an epoch
begins and when a batch is asked for. The latter is the one moment at which all that belongs to the batch before is done,
hooks, validation and schedulers included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.utilities import CombinedLoader

from highcamp.errors import Mismatch, Refused
from highcamp.run import live
from highcamp.training import batches
from highcamp.training.rng import random_state, set_random_state

if TYPE_CHECKING:
    from collections.abc import Iterator


class Watcher(Protocol):
    """Who is told of the data."""

    @property
    def is_waiting(self) -> bool:
        """The run was resumed, and the random states of its checkpoint are not set yet: nothing may be drawn for an epoch."""

    @property
    def is_capturing(self) -> bool:
        """The loaders' states are saved elsewhere."""

    def ask(self, loader: TrackedLoader) -> None:
        """A batch is asked for; it has not been read."""


class TrackedLoader(CombinedLoader):
    """A CombinedLoader that can go on in the middle of an epoch."""

    def __init__(self, iterables: Any, mode: Any, watcher: Watcher) -> None:
        """iterables, mode: see CombinedLoader."""
        super().__init__(iterables, mode)
        self._watcher = watcher
        self._place: dict[str, Any] | None = None
        self._turns: list[Any] = []
        self._known_turns: list[Any] = []
        self._where = ""
        self.is_read = False

    def __iter__(self) -> Self:
        """Begin an epoch; if that is to wait, the loaders are asked for nothing but their lengths."""
        if self._watcher.is_waiting:
            self.is_read = False
            return self._over([_Rest(each, iter(())) for each in self.flattened])
        return self._begin()

    def __next__(self) -> Any:
        """The next batch, with its number and that of its loader."""
        self._watcher.ask(self)
        if not self.is_read:
            self._begin()
        return super().__next__()

    @property
    def length(self) -> int | None:
        """Batches in an epoch; None if a loader cannot tell, so that Lightning reads one batch ahead."""
        try:
            return max(len(each) for each in self.flattened)
        except (TypeError, NotImplementedError):
            return None

    def place(self) -> dict[str, Any]:
        """Where the epoch stands, as it is saved: how it began, and the state of a loader that knows its position."""
        loaders = self.flattened
        position = live.loader_position(loaders[0]) if len(loaders) == 1 else None
        return {**(self._place or {}), "turns": list(self._turns), "position": position}

    def turn(self) -> None:
        """A loader that has ended begins anew within the epoch, because another one is longer."""
        if self._known_turns:
            set_random_state(self._known_turns.pop(0), where=self._where)
        self._turns.append(random_state())

    def go_on(self, place: dict[str, Any], done: int, *, where: str) -> None:
        """Go on with an epoch of which `done` batches are trained on. place: saved then. Sets random states.

        One DataLoader is moved there at once; several are read again. Raises Mismatch if they end before.
        """
        loaders = self.flattened
        self._place, self.is_read = {"before": place["before"], "orders": place["orders"]}, True
        self._turns, self._known_turns, self._where = [], list(place["turns"]), where
        if len(loaders) != len(place["orders"]):
            raise Mismatch(
                f"{where} was saved with {len(place['orders'])} training loaders, here are {len(loaders)}",
                path=where,
                hint="use the same data as when it was saved",
            )
        if len(loaders) == 1:
            saved = {"before": place["before"], "order": place["orders"][0], "position": place["position"]}
            rest, _ = batches.resume(loaders[0], saved, done, where=where)
            self._over([_Rest(loaders[0], rest)])
            vars(self._iterator)["_idx"] = done
            return
        set_random_state(place["before"], where=where)
        for loader, order in zip(loaders, place["orders"], strict=True):
            if order is not None:
                live.framework("torch").restore(loader, live.arrays_of("torch", order))
        self._over([_Turning(each, self) for each in loaders])
        for count in range(done):
            try:
                super().__next__()
            except StopIteration:
                raise Mismatch(
                    f"{where} was saved after {done} batches of its epoch, the loaders have only {count}",
                    path=where,
                    hint="use the same data and batch sizes as when it was saved",
                ) from None

    def _begin(self) -> Self:
        # Before `iter`, which may draw, and with workers draws the whole order.
        self._place = {"before": random_state(), "orders": [live.loader_order(each) for each in self.flattened]}
        self._turns, self._known_turns = [], []
        self.is_read = True
        if len(self.flattened) > 1:
            return self._over([_Turning(each, self) for each in self.flattened])
        super().__iter__()
        return self

    def _over(self, loaders: list[Any]) -> Self:
        """Iterate over others in the place of the loaders."""
        own = self.flattened
        self.flattened = loaders
        try:
            super().__iter__()
        finally:
            self.flattened = own
        return self

    def _state_dicts(self) -> list[dict[str, Any]]:
        """Lightning asks for the states of loaders that have one; some draw random numbers to answer."""
        found: list[dict[str, Any]] = [] if self._watcher.is_capturing else super()._state_dicts()
        return found


class _Rest:
    """An iterator in the place of the loader that it goes on for."""

    def __init__(self, loader: Any, rest: Iterator[Any]) -> None:
        self.loader, self.rest = loader, rest

    def __iter__(self) -> Iterator[Any]:
        return self.rest

    def __len__(self) -> int:
        return len(self.loader)  # a TypeError for one without a length, as if it were asked itself


class _Turning:
    """A loader that tells when it is iterated over for a second time."""

    def __init__(self, loader: Any, whole: TrackedLoader) -> None:
        self.loader, self.whole = loader, whole
        self.is_begun = False

    def __iter__(self) -> Iterator[Any]:
        if self.is_begun:
            self.whole.turn()
        self.is_begun = True
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)


@dataclass
class TrackedSource(_DataLoaderSource):
    """Where a Trainer's training loaders come from, tracked."""

    watcher: Watcher

    def dataloader(self) -> TrackedLoader:
        """The loaders. Raises Refused for a kind of CombinedLoader that is not Lightning's own."""
        found = super().dataloader()
        if not isinstance(found, CombinedLoader):
            return TrackedLoader(found, "max_size_cycle", self.watcher)  # what Lightning makes of it as well
        if type(found) not in (CombinedLoader, TrackedLoader):
            raise Refused(
                f"the training data are a {type(found).__name__}; how a class derived from CombinedLoader iterates is "
                "not known, so an epoch could not go on after a restart",
                hint="return the loaders themselves, or a CombinedLoader",
            )
        return TrackedLoader(found.iterables, found._mode, self.watcher)  # noqa: SLF001

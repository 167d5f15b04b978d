"""Recall: the captures before, so that a tracked object that is made of the same tensors is not taken apart again."""

from __future__ import annotations

from operator import is_
from typing import TYPE_CHECKING, NamedTuple

from highcamp.core.trace import Trace, trace
from highcamp.core.tree import Flat
from highcamp.run import live

if TYPE_CHECKING:
    from collections.abc import Hashable

    from highcamp.core.array import HostArray


class _Known(NamedTuple):
    """What one object was like. places: where the bytes of its tensors lie, and how. arrays: of each tensor, by its `id`."""

    trace: Trace
    tensors: list[object]
    places: list[Hashable]
    arrays: dict[int, HostArray]
    flat: Flat


class Recall:
    """Flattens as `live.flat` does, and remembers; the tensors of the last capture are held.

    version: grows when an object is no longer what it was.
    """

    def __init__(self) -> None:
        """Nothing has been seen."""
        self.version = 0
        self._known: dict[str, _Known] = {}
        self._array_of: dict[int, HostArray] = {}
        self._held: frozenset[int] = frozenset()

    def __call__(self, tree: object, where: str) -> Flat:
        """The flattened tree of the object `where`; the same arrays as long as its tensors lie where they lay."""
        known = self._known.get(where)
        if known is not None:
            tensors: list[object] = []
            found = known.trace.again(tree, tensors)
            if found is not None and _are_same(tensors, known):
                if found is not known.trace:
                    known = known._replace(trace=found, flat=Flat(found.skeleton, known.flat.arrays))
                    self._known[where] = known
                return known.flat
        return self._anew(tree, where)

    def _anew(self, tree: object, where: str) -> Flat:
        self._known.pop(where, None)
        self.version += 1
        flat = live.flat(tree, where)
        pairs: list[tuple[str, object]] = []
        # What is no framework's tensor is an array that was made to be looked at, and will be another one next time.
        made = trace(tree, flat.skeleton, pairs) if all(array.kind for array in flat.arrays.values()) else None
        tensors = [leaf for _, leaf in pairs]
        places = live.places(tensors)
        if made is not None and places is not None:
            arrays = {id(leaf): flat.arrays[name] for name, leaf in pairs}
            self._known[where] = _Known(made, tensors, places, arrays, flat)
        self._array_of = {key: array for known in self._known.values() for key, array in known.arrays.items()}
        self._held = frozenset(map(id, self._array_of.values()))
        return flat

    def holds(self, array: HostArray) -> bool:
        """Whether it is an array of the last capture that the next one will give again."""
        return id(array) in self._held

    def of(self, leaf: object) -> HostArray | None:
        """The array of a tensor that the last capture has seen."""
        return self._array_of.get(id(leaf))  # as long as it is held, nobody else has its number


def _are_same(tensors: list[object], known: _Known) -> bool:
    return (
        len(tensors) == len(known.tensors)
        and all(map(is_, tensors, known.tensors))
        and live.are_at(tensors, known.places)
    )

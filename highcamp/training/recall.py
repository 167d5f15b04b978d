"""Recall: the arrays of the capture before, so that a tensor that is still where it was is not looked at again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from highcamp.run import live

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from highcamp.core.array import HostArray


class Recall:
    """An `AsArray` that remembers. A capture is a `with` block: what it has not seen is let go at its end."""

    def __init__(self) -> None:
        """Nothing has been seen."""
        self._place_of: dict[type, Callable[[Any], Hashable] | None] = {}
        self._before: dict[int, tuple[object, Hashable, HostArray]] = {}
        self._now: dict[int, tuple[object, Hashable, HostArray]] = {}

    def __enter__(self) -> Self:
        """A capture begins."""
        self._before, self._now = self._now, {}
        return self

    def __exit__(self, *_: object) -> None:
        """It has ended."""
        self._before = {}

    def __call__(self, leaf: object) -> HostArray | None:
        """The array of a leaf, see `live.as_array`."""
        kind = type(leaf)
        if kind not in self._place_of:
            self._place_of[kind] = live.place_of(kind)
        place_of = self._place_of[kind]
        place = place_of(leaf) if place_of is not None else None
        if place is None:
            return live.as_array(leaf)
        known = self._now.get(id(leaf)) or self._before.get(id(leaf))
        if known is None or known[0] is not leaf or known[1] != place:
            array = live.as_array(leaf)
            if array is None:
                return None
            known = (leaf, place, array)
        self._now[id(leaf)] = known
        return known[2]

    def of(self, leaf: object) -> HostArray | None:
        """The array of a leaf that the last capture has seen."""
        known = self._now.get(id(leaf))
        return known[2] if known is not None and known[0] is leaf else None

"""Tracked: the objects whose state makes up a checkpoint, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from highcamp.core.names import check_name
from highcamp.errors import InvalidArgument
from highcamp.run import live
from highcamp.training.progress import PROGRESS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from highcamp.core.tree import Flat
    from highcamp.run.live import Flatten


class Tracked(dict[str, object]):
    """Name -> live object, in the order in which they were named."""

    def add(self, objects: Mapping[str, object]) -> None:
        """Name further ones. Raises InvalidArgument for a name, InvalidState for an object that has no state."""
        for name, obj in objects.items():
            check_name(name, "tracked object")
            if name.lower() in {PROGRESS, *(other.lower() for other in self)}:
                raise InvalidArgument(
                    f"an object named {name!r} is tracked already, or the name is highcamp's own",
                    hint="choose another name",
                )
            live.check_trackable(name, obj)
            self[name] = obj

    def require(self, call: str, instead: str = "") -> None:
        """Whether there is anything. Raises InvalidArgument naming `call`; instead: what could be passed to it."""
        if not self:
            hint = "call track(model=…, optimizer=…) first" + (f", or pass {instead}" if instead else "")
            raise InvalidArgument(f"{call} has nothing to save or restore: no object is tracked", hint=hint)

    def capture(self, flat: Flatten) -> dict[str, Flat]:
        """Their state; flat: takes a tree apart."""
        return {name: live.capture(name, obj, flat) for name, obj in self.items()}

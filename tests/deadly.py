"""A local store whose process dies at a chosen moment; shared by the trainings that are killed and run again."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

from highcamp.storage.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

CHANGES = ("append", "replace", "link", "draft", "publish", "withdraw", "remove")


class Deadly(LocalStore):
    """Counts events: what is told to `event`, and each change of the store. At number `fuse` the process dies.

    deaths: a file to which the place of death is added. asking: events at which, if the number is odd, the process is asked
    to stop instead.
    """

    def __init__(self, path: Path, fuse: int, *, deaths: Path, asking: Collection[str] = ()) -> None:
        super().__init__(path)
        self.fuse, self.deaths, self.asking = fuse, deaths, asking
        self.count = 0

    def event(self, what: str) -> None:
        """Something happens; the N-th time it is the last thing that does, or the process is asked to stop."""
        self.count += 1
        if self.count == self.fuse:
            with self.deaths.open("a") as deaths:
                deaths.write(what + "\n")
            is_asked = what in self.asking and self.fuse % 2
            os.kill(os.getpid(), signal.SIGTERM if is_asked else signal.SIGKILL)

    def create(self, path: str, chunks: Any) -> None:
        """Die before, after, or when half of a piece is written."""
        self.event(f"before create {path}")

        def torn() -> Any:
            for chunk in chunks:
                half = len(chunk) // 2
                yield chunk[:half]
                self.event(f"within create {path}")
                yield chunk[half:]

        super().create(path, torn())
        self.event(f"after create {path}")


def _watched(name: str) -> Any:
    def change(self: Deadly, *arguments: Any, **options: Any) -> Any:
        self.event(f"before {name}")
        result = getattr(LocalStore, name)(self, *arguments, **options)
        self.event(f"after {name}")
        return result

    return change


for change_name in CHANGES:
    setattr(Deadly, change_name, _watched(change_name))

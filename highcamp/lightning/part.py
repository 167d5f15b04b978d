"""Part: one object of a checkpoint, which Lightning puts in its place when it restores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


class Part:
    """One object of a checkpoint; what is restored is only kept, for Lightning to put it in its place."""

    def __init__(self, give: Callable[[], Any], *, is_weights: bool = False) -> None:
        """give: its state now."""
        self._give = give
        self.is_weights = is_weights
        self.saved: Any = None

    def state_dict(self) -> Any:
        """The state now."""
        return self._give()

    def load_state_dict(self, saved: Any) -> None:
        """The state that was saved."""
        self.saved = saved

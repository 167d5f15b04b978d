"""What this project tests its stores with, for those who test their own: a contract suite and a store that fails."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from highcamp.testing.faults import FaultyStore

if TYPE_CHECKING:
    from highcamp.testing.contract import StoreContract

__all__ = ["FaultyStore", "StoreContract"]


def __getattr__(name: str) -> Any:
    """`StoreContract` is imported when it is asked for: it needs pytest, the rest does not."""
    if name == "StoreContract":
        from highcamp.testing.contract import StoreContract

        return StoreContract
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

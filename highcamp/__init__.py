"""highcamp keeps the best model you have trained, and never loses more than moments of work.

    from highcamp import Checkpointer, Every, Keep, Monitor      # while training
    run = highcamp.open("runs/digits")                           # afterwards, without any framework

Each name is imported when it is first used: `import highcamp` loads no framework, no NumPy and no command line.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from highcamp.errors import (
        CheckpointNotFound,
        Damaged,
        HighcampError,
        InvalidArgument,
        InvalidMetric,
        InvalidState,
        Mismatch,
        MissingExtra,
        Refused,
        RunLocked,
        RunNotFound,
        StorageError,
        Taken,
        Torn,
        Unreadable,
    )
    from highcamp.policy.cadence import Every
    from highcamp.policy.monitor import Monitor
    from highcamp.policy.retention import Keep
    from highcamp.run.checkpoint import Checkpoint
    from highcamp.run.history import History
    from highcamp.run.run import Run
    from highcamp.run.run import open_run as open
    from highcamp.training.checkpointer import Checkpointer

__version__: Final = "0.1.0"

__all__ = [
    "Checkpoint",
    "CheckpointNotFound",
    "Checkpointer",
    "Damaged",
    "Every",
    "HighcampError",
    "History",
    "InvalidArgument",
    "InvalidMetric",
    "InvalidState",
    "Keep",
    "Mismatch",
    "MissingExtra",
    "Monitor",
    "Refused",
    "Run",
    "RunLocked",
    "RunNotFound",
    "StorageError",
    "Taken",
    "Torn",
    "Unreadable",
    "__version__",
    "open",
]

# Where the names live that are not errors: public name -> (module, its name there).
_HOMES: Final = {
    "Checkpoint": ("highcamp.run.checkpoint", "Checkpoint"),
    "Checkpointer": ("highcamp.training.checkpointer", "Checkpointer"),
    "Every": ("highcamp.policy.cadence", "Every"),
    "History": ("highcamp.run.history", "History"),
    "Keep": ("highcamp.policy.retention", "Keep"),
    "Monitor": ("highcamp.policy.monitor", "Monitor"),
    "Run": ("highcamp.run.run", "Run"),
    "open": ("highcamp.run.run", "open_run"),
}


def __getattr__(name: str) -> object:
    """The public name, imported now; kept, so that the next look is a plain one."""
    if name not in __all__:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    module, name_there = _HOMES.get(name, ("highcamp.errors", name))
    value: object = getattr(importlib.import_module(module), name_there)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return __all__

"""The global random state of Python, NumPy and every framework that is loaded."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from highcamp.errors import Mismatch
from highcamp.run import live

_FRAMEWORKS = ("torch",)
"""Frameworks with a global generator of their own. JAX has none, and Keras's are captured with a Keras model."""


def random_state() -> dict[str, Any]:
    """The state of every global generator in use; a tree that `flatten` takes."""
    state: dict[str, Any] = {"python": live.python_random_state()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state["numpy"] = numpy.random.get_state(legacy=False)
    for name in _FRAMEWORKS:
        if name in live.loaded_frameworks():
            state[name] = live.framework(name).random_state()
    return state


def check_random_state(state: dict[str, Any], *, where: str) -> None:
    """Whether every generator in use now has a saved state. Raises Mismatch naming those that have none."""
    in_use = {"python", "numpy", *(name for name in _FRAMEWORKS if name in live.loaded_frameworks())}
    missing = sorted(in_use - set(state))
    if missing:
        raise Mismatch(
            f"{where} holds no random state of {', '.join(missing)}, so the run would go on with other random numbers",
            path=where,
            hint="import the same frameworks before the Checkpointer restores as when it saved",
        )


def set_random_state(state: dict[str, Any], *, where: str) -> None:
    """The reverse of `random_state`. Raises Mismatch as `check_random_state` does."""
    check_random_state(state, where=where)
    live.set_python_random_state(None, state["python"])
    sys.modules["numpy"].random.set_state(state["numpy"])
    for name in sorted(set(state) - {"python", "numpy"}):
        if name in live.loaded_frameworks():
            live.framework(name).set_random_state(live.arrays_of(name, state[name]))
        else:
            warnings.warn(
                f"{where} holds a random state of {name}, which is not imported: it was not restored", stacklevel=2
            )

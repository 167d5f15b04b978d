"""Modules of Flax NNX: objects that change in place, and may hold one variable at several places."""

from __future__ import annotations

import sys
from typing import Any

from highcamp.jax import supported


def is_module(node: object) -> bool:
    """Whether it is a module, optimizer, random stream or metric of NNX."""
    nnx = _nnx()
    return nnx is not None and isinstance(
        node, getattr(nnx, "Pytree", nnx.Module)
    )  # in an old one, which `state` refuses


def is_model(node: object) -> bool:
    """Whether it is a module of NNX, whose state is weights; an optimizer, a random stream and a metric are none."""
    nnx = _nnx()
    return nnx is not None and isinstance(node, nnx.Module)


def is_variable(node: object) -> bool:
    """Whether it is what a module holds an array in."""
    nnx = _nnx()
    return nnx is not None and isinstance(node, nnx.Variable)


def state(module: object) -> Any:
    """Return the variables and arrays of a module as a pytree; one that is at several places is in it once."""
    supported.require("flax")
    return _nnx().state(module)


def with_state(module: object, new: Any) -> Any:
    """Return a new module: all that is no state is that of `module`, and what was shared is shared."""
    nnx = _nnx()
    return nnx.merge(nnx.graphdef(module), new)


def update(module: object, new: Any) -> None:
    """Put a state into a module; its variables keep their identity."""
    _nnx().update(module, new)


def _nnx() -> Any:
    """NNX if it is loaded: nobody has a module of it otherwise."""
    return sys.modules.get("flax.nnx")

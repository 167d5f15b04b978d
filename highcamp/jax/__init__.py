"""JAX translation: arrays, random keys and any registered pytree to plain trees and back.

Nothing is decided and nothing is stored here. JAX state is a value that is passed: a state becomes a plain tree
(`to_tree`), and comes back in the structure of another one (`from_tree`). Two kinds of objects change in place and can be
tracked: modules of Flax NNX, their optimizers, metrics and random streams; and a dict or list that holds a state, whose
entries the loop replaces.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from highcamp.errors import InvalidState
from highcamp.jax import modules
from highcamp.jax.arrays import from_host, tie, to_host
from highcamp.jax.trees import KEPT, Tensor, fit, from_tree, has_arrays, is_ours, to_tree

if TYPE_CHECKING:
    from collections.abc import Mapping

    from highcamp.jax.trees import Tree

__all__ = [
    "KEPT", "Tensor", "can_restore", "capture", "check", "fit", "from_host", "from_tree", "has_arrays", "is_ours", "is_weights",
    "random_state", "restore", "set_random_state", "template", "tie", "to_host", "to_tree",
]  # fmt: skip


def can_restore(obj: object) -> bool:
    """Whether an object can be tracked, because its state can be put into it."""
    return modules.is_module(obj) or (isinstance(obj, dict | list) and has_arrays(obj))


def is_weights(obj: object) -> bool:
    """Whether it is a model."""
    return modules.is_model(obj)


def capture(obj: object) -> Tree | None:
    """Return the state tree of a module of Flax NNX, or of a dict or list that holds a state; None for anything else."""
    return to_tree(obj) if can_restore(obj) else None


def template(obj: object) -> Tree | None:  # noqa: ARG001  # the same question is put to every framework
    """Return None: `check` compares more than arrays."""
    return None


def check(obj: object, tree: Tree) -> list[str]:
    """Return every difference between a saved state and the object; nothing is changed."""
    return fit(tree, obj)[0] if can_restore(obj) else []


def restore(obj: Any, tree: Tree) -> None:
    """Put a saved state into an object; its arrays are new ones, placed like those that they replace.

    A module keeps its identity and that of its variables. Of a dict or list that holds a state the entries are replaced,
    except such modules. Raises Mismatch, and InvalidState for what is immutable.
    """
    if not can_restore(obj):
        raise InvalidState(
            f"a {type(obj).__name__} cannot be restored in place", hint="state = checkpointer.restore(like=state)"
        )
    new = from_tree(tree, obj, in_place=True)
    if isinstance(obj, dict):
        obj.clear()
        obj.update(new)
    elif isinstance(obj, list):
        obj[:] = new


def random_state() -> dict[str, Any]:
    """Return {}: JAX has no global generator; keys are part of the state."""
    return {}


def set_random_state(tree: Mapping[str, Any]) -> None:
    """Do nothing, as there is nothing to set."""

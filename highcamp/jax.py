"""JAX translation: arrays, random keys and any registered pytree to plain trees and back.

Nothing is decided and nothing is stored here. JAX state is a value that is passed, so there are no objects to restore
into: a state becomes a plain tree (`to_tree`), and comes back in the structure of another one (`from_tree`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from highcamp.core.array import HostArray
from highcamp.core.plain import MAX_DEPTH
from highcamp.errors import InvalidState, Mismatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Tree: TypeAlias = Any
"""Nested dicts, lists and tuples with arrays and plain values as leaves."""

_KEY_FIELDS = {"key_data", "key_impl"}
_PYTHON_SCALARS = {"i": int, "f": float, "c": complex}


# --- arrays --------------------------------------------------------------------------------------------------------


def to_host(leaf: object) -> HostArray | None:
    """Return the bytes of a JAX array, read-only, or None if `leaf` is none.

    On CPU the memory is the array's own: copy it and let it go before the next step, because a live view turns donation
    off without a word. Arrays that are the same buffer have equal `tie`s. Raises InvalidState for deleted (donated)
    arrays, tracers, random keys (see `to_tree`), arrays with shards on other hosts, and dtypes that tensor files do not
    have (int4, uint4, float4, complex128).
    """
    if not isinstance(leaf, jax.Array):
        return None
    what = f"a JAX array of shape {leaf.shape} and dtype {leaf.dtype}"
    if isinstance(leaf, jax.core.Tracer):
        raise InvalidState(f"{what} is being traced and has no bytes", hint="save outside of jit, grad and scan")
    if leaf.is_deleted():
        raise InvalidState(
            f"{what} was donated and is deleted", hint="save what the step returned, not what it was given"
        )
    if _is_key(leaf):
        raise InvalidState(f"{what} is a random key", hint="translate the state with highcamp.jax.to_tree first")
    if not leaf.is_fully_addressable:
        raise InvalidState(f"{what} has shards on other hosts", hint="use highcamp.distributed, or gather it first")
    is_single = len(leaf.sharding.device_set) == 1
    # an array of one device is its buffer; a sharded one is put together on the host, and known by the object
    tie = ("jax", str(leaf.device), leaf.unsafe_buffer_pointer()) if is_single else ("jax", id(leaf))
    host = HostArray.from_numpy(np.asarray(leaf), tie if leaf.size else None)
    return HostArray(host.dtype, host.shape, host.data.toreadonly(), host.tie, "jax", is_immutable=True)


def from_host(array: HostArray, like: object | None) -> jax.Array:
    """Return a new array that owns its memory and can be donated, with the device, sharding and weak type of `like`.

    like: an array or ShapeDtypeStruct; None or any other object means the default device. The bytes of `array` may be
    reused when this returns. Raises InvalidState where JAX would narrow a 64-bit dtype.
    """
    source = array.numpy()
    if jax.dtypes.canonicalize_dtype(source.dtype) != source.dtype:
        hint = 'jax.config.update("jax_enable_x64", True), or read it without JAX: checkpoint.load()'
        raise InvalidState(f"JAX would narrow {array.dtype} of shape {array.shape} to 32 bits", hint=hint)
    sharding = getattr(like, "sharding", None)
    new = _new_weak if getattr(like, "weak_type", False) else _new
    # device_put may share the memory of an aligned NumPy array (even with may_alias=False on CPU), and shared memory is
    # neither ours nor reused by donation; the output of a compiled identity is a buffer of its own
    compiled: Callable[[Any], jax.Array] = jax.jit(new, out_shardings=sharding)
    return compiled(jax.device_put(source, sharding)).block_until_ready()


def _new(array: jax.Array) -> jax.Array:
    return array


def _new_weak(array: jax.Array) -> jax.Array:
    """Return the values with the dtype of a Python number: it gives way to the other operand's in arithmetic."""
    return jnp.full(array.shape, _PYTHON_SCALARS[array.dtype.kind]()).at[...].set(array)


def _is_key(leaf: object) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


# --- trees ---------------------------------------------------------------------------------------------------------


def is_ours(state: object, depth: int = 0) -> bool:
    """Whether a state has arrays of JAX, or nodes that only JAX can take apart (named tuples, modules, dataclasses)."""
    if type(state) in (dict, list, tuple):  # walked here: JAX sorts keys, which numbers beside text do not allow
        parts = state.values() if isinstance(state, dict) else state
        return depth <= MAX_DEPTH and any(is_ours(part, depth + 1) for part in parts)  # type: ignore[attr-defined]
    if state is None or isinstance(state, jax.Array | jax.ShapeDtypeStruct):
        return state is not None
    return not jax.tree_util.all_leaves([state])


def to_tree(state: object) -> Tree:
    """Return a pytree as plain nested dicts, lists and tuples; leaves are the live arrays and plain values.

    dict, list and tuple stay what they are, dict keys included. Every other registered node (named tuples, dataclasses,
    flax and equinox modules) becomes a dict by field name, or by position where it has no names; what it holds outside
    of its leaves comes from `like` again. A random key becomes {"key_data": uint32 array, "key_impl": name}. A function
    that is a leaf is code, not state: None here, and `like`'s own in `from_tree`.
    """
    if _is_key(state):
        return {"key_data": jax.random.key_data(state), "key_impl": _key_impl(state)}  # type: ignore[arg-type]
    children = _children(state)
    if children is None:
        return None if _is_code(state) else state
    if type(state) in (list, tuple):
        return type(state)(to_tree(child) for _, child in children)  # type: ignore[call-arg]
    return {name: to_tree(child) for name, child in children}


def from_tree(tree: Tree, like: object) -> Any:
    """Return `tree` in the structure of `like`: same node types, same static parts, random keys as keys.

    Arrays are taken from `tree` as they are; `from_host` puts them on the devices of `like`'s leaves.
    Raises Mismatch with every difference in names, shapes, dtypes and key implementations at once.
    """
    differences = list(_differences(tree, like, ""))
    if differences:
        message = f"the checkpoint does not fit `like`: {'; '.join(differences)}"
        raise Mismatch(message, hint="build the state as it was built when it was saved")
    return _rebuild(tree, like)


def _children(node: object) -> list[tuple[Any, Any]] | None:
    """Return (name, child) of a pytree node, one level deep; None for a leaf."""
    if node is None or jax.tree_util.all_leaves([node]):
        return None
    if isinstance(node, dict):
        return list(node.items())  # in its own order: JAX flattens by sorted key
    pairs, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda part: part is not node)
    return [(_name(path[0]), child) for path, child in pairs]


def _name(key: object) -> Any:
    match key:
        case GetAttrKey(name=name):
            return name
        case DictKey(key=name):
            return name
        case SequenceKey(idx=index) | FlattenedIndexKey(key=index):
            return str(index)
        case _:
            return str(key)


def _rebuild(tree: Tree, like: object) -> Any:
    if _is_key(like):
        return jax.random.wrap_key_data(tree["key_data"], impl=tree["key_impl"])
    children = _children(like)
    if children is None:
        return like if _is_code(like) else tree
    parts = tree if type(like) in (list, tuple) else [tree[name] for name, _ in children]
    rebuilt = {name: _rebuild(part, child) for part, (name, child) in zip(parts, children, strict=True)}
    if type(like) is dict:
        return rebuilt  # in its own order
    pairs, structure = jax.tree_util.tree_flatten_with_path(like, is_leaf=lambda part: part is not like)
    return jax.tree_util.tree_unflatten(structure, [rebuilt[_name(path[0])] for path, _ in pairs])


def _differences(tree: Tree, like: object, where: str) -> Iterator[str]:
    """Yield one line for every place where `tree` cannot take the structure of `like`."""
    here = where or "the state"
    children = _children(like)
    if _is_key(like):
        if not isinstance(tree, Mapping) or tree.keys() != _KEY_FIELDS:
            yield f"{here}: {type(tree).__name__} in the checkpoint, a random key here"
        elif tree["key_impl"] != _key_impl(like):
            yield f"{here}: a {tree['key_impl']} key in the checkpoint, {_key_impl(like)} here"
        else:
            yield from _differences(tree["key_data"], jax.random.key_data(like), f"{where}/key_data".lstrip("/"))  # type: ignore[arg-type]
    elif children is None:
        yield from _leaf_differences(tree, like, here)
    elif type(like) in (list, tuple):
        if not isinstance(tree, (list, tuple)) or len(tree) != len(children):
            found = f"{len(tree)} items" if isinstance(tree, (list, tuple)) else type(tree).__name__
            yield f"{here}: {found} in the checkpoint, {type(like).__name__} of {len(children)} here"
            return
        for index, (child, (_, like_child)) in enumerate(zip(tree, children, strict=True)):
            yield from _differences(child, like_child, f"{where}/{index}".lstrip("/"))
    elif not isinstance(tree, Mapping):
        yield f"{here}: {type(tree).__name__} in the checkpoint, {type(like).__name__} here"
    else:
        names = [name for name, _ in children]
        yield from (f"{where}/{name}: only in the checkpoint".lstrip("/") for name in tree if name not in names)
        yield from (f"{where}/{name}: only here".lstrip("/") for name in names if name not in tree)
        for name, like_child in children:
            if name in tree:
                yield from _differences(tree[name], like_child, f"{where}/{name}".lstrip("/"))


def _leaf_differences(tree: Tree, like: object, here: str) -> Iterator[str]:
    if _is_code(like):
        return
    saved, live = _look(tree), _look(like)
    if isinstance(saved, tuple) and isinstance(live, tuple):
        for name, old, new in zip(("dtype", "shape"), saved, live, strict=True):
            if old != new:
                yield f"{here}: {name} {old} in the checkpoint, {new} here"
    elif saved in (("int32", ()), ("int64", ())) and live == "int":
        return  # a counter begins as a Python number, and is an array after the first compiled step
    elif saved != live:
        yield f"{here}: {_said(saved)} in the checkpoint, {_said(live)} here"


def _look(leaf: object) -> tuple[str, tuple[int, ...]] | str:
    """Return (dtype, shape) of anything that has them, the type's name of a plain value."""
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
        return str(leaf.dtype), tuple(leaf.shape)
    return type(leaf).__name__


def _said(look: tuple[str, tuple[int, ...]] | str) -> str:
    return look if isinstance(look, str) else f"array of {look[0]} {look[1]}"


def _is_code(leaf: object) -> bool:
    return callable(leaf) and not hasattr(leaf, "dtype")


def _key_impl(key: object) -> str:
    return str(jax.random.key_impl(key))  # type: ignore[arg-type]


# --- what every framework module answers ----------------------------------------------------------------------------


def capture(obj: object) -> Tree | None:  # noqa: ARG001  # the same question is put to every framework
    """Return None: JAX has no objects that are restored in place; state is passed and comes back through `like`."""
    return None


def template(obj: object) -> Tree | None:  # noqa: ARG001
    """Return None, as `capture`."""
    return None


def check(obj: object, tree: Tree) -> list[str]:  # noqa: ARG001
    """Return []; what does not fit is found by `from_tree`."""
    return []


def restore(obj: object, tree: Tree) -> None:  # noqa: ARG001
    """Raise InvalidState: JAX state is immutable."""
    raise InvalidState(
        f"a {type(obj).__name__} cannot be restored in place", hint="state = checkpointer.restore(like=state)"
    )


def random_state() -> dict[str, Any]:
    """Return {}: JAX has no global generator; keys are part of the state."""
    return {}


def set_random_state(tree: Mapping[str, Any]) -> None:
    """Do nothing, as there is nothing to set."""

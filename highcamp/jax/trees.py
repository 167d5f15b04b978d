"""States of JAX as plain trees, and back in the structure of another state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from highcamp.core.array import HostArray, numpy_dtype
from highcamp.core.plain import MAX_DEPTH
from highcamp.errors import InvalidState, Mismatch
from highcamp.jax import modules, supported
from highcamp.jax.arrays import abstract, from_host, is_key, key_data, key_impl, sharding_of, tie

if TYPE_CHECKING:
    from collections.abc import Iterator

    from highcamp.core.array import Spec

Tree: TypeAlias = Any
"""Nested dicts, lists and tuples with arrays and plain values as leaves."""

KEPT = object()
"""Stands in a tree for a part that is not in the checkpoint: it is that of `like`."""

_KEY_FIELDS = {"key_data", "key_impl"}


class Tensor(NamedTuple):
    """Stands in a tree for an array that is still to be read. name: in its file."""

    name: str
    spec: Spec

    @property
    def dtype(self) -> np.dtype[Any]:
        """As NumPy has it."""
        return numpy_dtype(self.spec[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes."""
        return self.spec[1]


def is_ours(state: object, depth: int = 0) -> bool:
    """Whether a state has arrays of JAX, or nodes that only JAX can take apart (modules, dataclasses)."""
    if isinstance(state, dict | list | tuple):  # walked here: JAX sorts keys, which numbers beside text do not allow
        parts = state.values() if isinstance(state, dict) else state
        return depth <= MAX_DEPTH and any(is_ours(part, depth + 1) for part in parts)
    if state is None:
        return False
    return _is_array(state) or modules.is_module(state) or not jax.tree_util.all_leaves([state])


def has_arrays(state: object, depth: int = 0) -> bool:
    """Whether a state has arrays of JAX, in nodes of whatever kind."""
    if _is_array(state) or modules.is_module(state) or modules.is_variable(state):
        return True
    children = _children(state) if depth <= MAX_DEPTH else None
    return any(has_arrays(child, depth + 1) for _, child in children or ())


def to_tree(state: object) -> Tree:
    """Return a pytree as plain nested dicts, lists and tuples; leaves are the live arrays and plain values.

    dict, list and tuple stay what they are, dict keys included. Every other registered node (named tuples, dataclasses,
    modules of Equinox) becomes a dict by field name, or by position where it has no names; what it holds outside of its
    leaves comes from `like` again. A module of Flax NNX becomes a dict of its variables' values. A random key becomes
    {"key_data": uint32 array, "key_impl": name}. A function that is a leaf is code, not state: None here, and `like`'s own
    in `from_tree`. Raises MissingExtra for versions that are not supported.
    """
    supported.require()
    return _to_tree(state)


def _to_tree(state: Any) -> Tree:
    if is_key(state):
        if isinstance(state, jax.ShapeDtypeStruct):
            return {"key_data": key_data(state), "key_impl": key_impl(state)}
        # one that was donated stays what it is: `to_host` says so, and where
        return {
            "key_data": state if state.is_deleted() else jax.random.key_data(state), "key_impl": key_impl(state)
        }  # fmt: skip
    if modules.is_module(state):
        return _to_tree(modules.state(state))
    children = _children(state)
    if children is None:
        return None if _is_code(state) else state
    if modules.is_variable(state):
        return _to_tree(children[0][1])
    if type(state) in (list, tuple):
        return type(state)(_to_tree(child) for _, child in children)
    return {name: _to_tree(child) for name, child in children}


def fit(tree: Tree, like: object) -> tuple[list[str], dict[int, object]]:
    """Compare a saved tree with the state whose structure it is to take; nothing is read or changed.

    tree: as `to_tree` made it, a `Tensor` for every array. Returns every difference as a line, and by the `id` of each
    Tensor what its array is to be like, for `from_host`. Raises MissingExtra for versions that are not supported.
    """
    supported.require()
    fitting = _Fitting()
    fitting.visit(tree, like, "")
    return fitting.lines, fitting.likes


def from_tree(tree: Tree, like: object, *, in_place: bool = False) -> Any:
    """Return `tree` in the structure of `like`: same node types, same static parts, random keys as keys.

    JAX arrays are taken from `tree` as they are; NumPy's, where `like` has JAX's, become arrays on its devices. in_place:
    modules of Flax NNX are updated and stay the objects that they are. Raises Mismatch with every difference in names,
    shapes, dtypes and key implementations at once, before anything is changed.
    """
    lines, _ = fit(tree, like)
    if lines:
        message = f"the checkpoint does not fit `like`: {'; '.join(lines)}"
        raise Mismatch(message, hint="build the state as it was built when it was saved")
    return _Building(in_place=in_place).build(tree, like)


# --- nodes ---------------------------------------------------------------------------------------------------------


def _children(node: Any) -> list[tuple[Any, Any]] | None:
    """Return (name, child) of a pytree node, one level deep; None for a leaf."""
    if node is None or isinstance(node, Tensor) or jax.tree_util.all_leaves([node]):
        return None
    if isinstance(node, dict):
        return list(node.items())  # in its own order: JAX flattens by sorted key
    pairs, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda part: part is not node)
    named = [(_name(path[0]), child) for path, child in pairs]
    if len({name for name, _ in named}) < len(named):
        raise InvalidState(
            f"a {type(node).__name__} gives one name to two of its parts, so that they cannot be told apart",
            hint="register it with keys of its own: jax.tree_util.register_pytree_with_keys",
        )
    return named


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


class _Building:
    """Builds one state out of a tree that fits."""

    def __init__(self, *, in_place: bool) -> None:
        self._in_place = in_place
        self._made: dict[object, tuple[object, jax.Array]] = {}

    def build(self, tree: Tree, like: Any) -> Any:
        """Return `tree` in the structure of `like`."""
        if tree is KEPT:
            return like
        if is_key(like):
            return jax.random.wrap_key_data(self._array(tree["key_data"], key_data(like)), impl=tree["key_impl"])
        if modules.is_module(like):
            new = self.build(tree, modules.state(like))
            if not self._in_place:
                return modules.with_state(like, new)
            modules.update(like, new)
            return like
        children = _children(like)
        if children is None:
            return self._leaf(tree, like)
        if modules.is_variable(like):
            parts = [tree]
        else:
            parts = tree if type(like) in (list, tuple) else [tree[name] for name, _ in children]
        built = {name: self.build(part, child) for part, (name, child) in zip(parts, children, strict=True)}
        if type(like) is dict:
            return built  # in its own order
        pairs, structure = jax.tree_util.tree_flatten_with_path(like, is_leaf=lambda part: part is not like)
        return jax.tree_util.tree_unflatten(structure, [built[_name(path[0])] for path, _ in pairs])

    def _leaf(self, tree: Tree, like: Any) -> Any:
        if _is_code(like):
            return like
        if _is_array(like):
            return self._array(tree, like)
        if isinstance(tree, np.ndarray) and isinstance(like, np.generic):
            return tree[()]
        if isinstance(tree, np.ndarray) and not isinstance(like, np.ndarray) and _is_wide_enough(tree.dtype):
            return self._array(tree, abstract((), tree.dtype, weak_type=True))  # `like` is a number
        return tree

    def _array(self, saved: Any, like: Any) -> Any:
        """Return an array or number as an array of JAX; what was tied, and is tied in `like`, stays so."""
        if isinstance(saved, jax.Array):
            return saved
        place = (id(saved), tie(like) if tie(like) is not None else id(like))
        if place not in self._made:
            array = HostArray.from_numpy(np.asarray(saved, None if hasattr(saved, "dtype") else like.dtype))
            self._made[place] = (saved, from_host(array, like))  # `saved` is kept, so that its id stays its own
        return self._made[place][1]


# --- differences ---------------------------------------------------------------------------------------------------


class _Fitting:
    """One comparison. lines: the differences. likes: by the `id` of each Tensor what its array is to be like."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.likes: dict[int, object] = {}

    def visit(self, tree: Tree, like: Any, where: str) -> None:
        """Compare what is at a place, and below it."""
        here = where or "the state"
        if tree is KEPT:
            return
        if is_key(like):
            if not isinstance(tree, Mapping) or tree.keys() != _KEY_FIELDS:
                self.lines.append(f"{here}: {_said(tree)} in the checkpoint, a random key here")
            elif tree["key_impl"] != key_impl(like):
                self.lines.append(f"{here}: a {tree['key_impl']} key in the checkpoint, {key_impl(like)} here")
            else:
                self._leaf(tree["key_data"], key_data(like), _below(where, "key_data"))
            return
        if modules.is_module(like):
            self.visit(tree, modules.state(like), where)
            return
        children = _children(like)
        if children is None:
            self._leaf(tree, like, here)
        elif modules.is_variable(like):
            self.visit(tree, children[0][1], where)
        elif type(like) in (list, tuple):
            if not _is_sequence(tree) or len(tree) != len(children):
                found = f"{len(tree)} items" if _is_sequence(tree) else _said(tree)
                self.lines.append(f"{here}: {found} in the checkpoint, {type(like).__name__} of {len(children)} here")
                return
            for index, (child, (_, like_child)) in enumerate(zip(tree, children, strict=True)):
                self.visit(child, like_child, _below(where, index))
        elif not isinstance(tree, Mapping):
            self.lines.append(f"{here}: {_said(tree)} in the checkpoint, {type(like).__name__} here")
        else:
            names = dict(children)
            self.lines += [
                f"{each}: only in the checkpoint"
                for name in tree
                if name not in names
                for each in _paths(tree[name], _below(where, name))
            ]
            self.lines += [
                f"{each}: only here"
                for name in names
                if name not in tree
                for each in _paths(names[name], _below(where, name))
            ]
            for name, like_child in children:
                if name in tree:
                    self.visit(tree[name], like_child, _below(where, name))

    def _leaf(self, tree: Tree, like: Any, here: str) -> None:
        if _is_code(like):
            return
        saved, live = _look(tree), _look(like)
        if isinstance(saved, tuple) and isinstance(live, tuple):
            for name, old, new in zip(("dtype", "shape"), saved, live, strict=True):
                if old != new:
                    self.lines.append(f"{here}: {name} {old} in the checkpoint, {new} here")
            if saved == live:
                self._place(tree, like, here)
        elif not _are_one_number(saved, live):
            if saved != live:
                self.lines.append(f"{here}: {_said(tree)} in the checkpoint, {_said(like)} here")
        elif isinstance(tree, int) and not isinstance(tree, bool) and not _holds(like.dtype, tree):
            self.lines.append(f"{here}: {tree} in the checkpoint, too large for {like.dtype} here")
        elif isinstance(tree, Tensor) and _is_wide_enough(tree.dtype):
            self.likes[id(tree)] = abstract((), tree.dtype, weak_type=True)

    def _place(self, tree: Tree, like: Any, here: str) -> None:
        """Look whether the array can be where that of `like` is."""
        sharding = sharding_of(like) if _is_array(like) else None
        if sharding is not None:
            if not sharding.is_fully_addressable:
                self.lines.append(
                    f"{here}: has shards in other processes here; only the devices of one are supported yet"
                )
            try:
                sharding.shard_shape(tuple(like.shape))
            except ValueError as error:
                self.lines.append(f"{here}: cannot be spread as here: {error}")
        if isinstance(tree, Tensor):
            self.likes[id(tree)] = like


def _below(where: str, name: object) -> str:
    return f"{where}/{name}" if where else str(name)


def _paths(node: Any, where: str) -> Iterator[str]:
    """Yield the path of every leaf of a saved or a live tree; of a node that has none, its own."""
    if is_key(node):
        yield where
        return
    if modules.is_module(node):
        node = modules.state(node)
    children = _children(node)
    if children and modules.is_variable(node):
        yield from _paths(children[0][1], where)
    elif children:
        for name, child in children:
            yield from _paths(child, _below(where, name))
    else:
        yield where


def _is_sequence(tree: Tree) -> bool:
    return isinstance(tree, list | tuple) and not isinstance(tree, Tensor)


def _look(leaf: Any) -> tuple[str, tuple[int, ...]] | str:
    """Return (dtype, shape) of anything that has them, the type's name of a plain value."""
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
        return str(leaf.dtype).removeprefix("torch."), tuple(leaf.shape)
    return type(leaf).__name__


_KINDS = {
    "int": jax.numpy.integer,
    "float": jax.numpy.floating,
    "complex": jax.numpy.complexfloating,
    "bool": jax.numpy.bool_,
}


def _are_one_number(saved: tuple[str, tuple[int, ...]] | str, live: tuple[str, tuple[int, ...]] | str) -> bool:
    """Whether one is a Python number and the other an array of one.

    A counter begins as a number, and is an array after the first compiled step.
    """
    plain, array = (saved, live) if isinstance(saved, str) else (live, saved)
    if not isinstance(plain, str) or not isinstance(array, tuple) or plain not in _KINDS or array[1]:
        return False
    return bool(jax.numpy.issubdtype(jax.numpy.dtype(array[0]), _KINDS[plain]))


def _is_wide_enough(dtype: Any) -> bool:
    """Whether JAX has arrays of a dtype as it is set now."""
    return bool(jax.dtypes.canonicalize_dtype(dtype) == dtype)


def _holds(dtype: Any, number: int) -> bool:
    limits = jax.numpy.iinfo(dtype)  # type: ignore[no-untyped-call]
    return int(limits.min) <= number <= int(limits.max)


def _said(leaf: Any) -> str:
    look = _look(leaf)
    return look if isinstance(look, str) else f"array of {look[0]} {look[1]}"


def _is_array(leaf: object) -> bool:
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)


def _is_code(leaf: object) -> bool:
    return isinstance(leaf, type) or (callable(leaf) and not hasattr(leaf, "dtype"))

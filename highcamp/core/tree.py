"""Nested state to {name: array} and a JSON skeleton, and back; comparison with a template.

The skeleton is the state tree with each tensor replaced by {"$tensor": name}. Containers are lists, objects (dicts
whose keys are all text without a leading "$"), {"$tuple": […]}, {"$namedtuple": ["Type", {field: …}]}, and for every
other dict {"$items": [[key, value], …]}. Plain values are in `highcamp.core.plain`, names in `highcamp.core.paths`.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

from highcamp.core.paths import UniqueNames, join, key_text
from highcamp.core.plain import (
    MAX_DEPTH,
    Json,
    decode,
    decode_items,
    encode,
    encode_key,
    malformed,
    refusal,
    strict_text,
    tag_of,
)
from highcamp.errors import InvalidState, Mismatch

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping

    from highcamp.core.array import HostArray, Spec

AsArray: TypeAlias = "Callable[[object], HostArray | None]"
"""Turns an array of any kind into a HostArray, and everything else into None."""

_SIMPLE = frozenset({type(None), bool, int, float, str, bytes, complex})  # never a tensor: not worth asking for


class Shaped(Protocol):
    """What a template's leaf must tell of itself; a HostArray does."""

    @property
    def spec(self) -> Spec:
        """Dtype as safetensors spells it, and shape."""


@dataclass(frozen=True, slots=True)
class Flat:
    """A state tree taken apart."""

    skeleton: Json
    """The tree as JSON, tensors replaced by their names."""
    arrays: dict[str, HostArray]
    """The tensors by name, in the order of the tree; tied ones once."""
    weights: bool = False
    """Whether it is the state of a model, or weights by another name; for whoever captures it to say."""
    trained: frozenset[str] = frozenset()
    """Those of its tensors that are known to be trained; for whoever captures it to say, and for weights alone."""


def flatten(tree: object, as_array: AsArray, *, where: str) -> Flat:
    """Take a state tree apart into JSON and named arrays; nothing is copied or changed.

    as_array: turns an array of any kind into a HostArray, and everything else into None. where: the tracked object's
    name, for errors and for a tree that is one tensor. Names are paths, printable, unique, at most 512 bytes.
    Raises InvalidState, naming the path, for what files cannot hold: enums, functions, objects, a tree within itself.
    """
    walk = _Flattening(as_array, where)
    skeleton = walk.visit(tree, "", 0)
    return Flat(skeleton, walk.arrays)


def unflatten(skeleton: object, leaf: Callable[[str], object]) -> object:
    """Build the tree of a skeleton; `leaf` gives the array of a tensor name.

    Named tuples come back as dicts of their fields: without a template there is no class, and none is imported by name.
    Raises Damaged for a malformed skeleton.
    """
    return _unflatten(skeleton, "", 0, leaf)


def _unflatten(skeleton: object, path: str, depth: int, leaf: Callable[[str], object]) -> object:
    # Not a function within `unflatten`: one that calls itself keeps itself, and all tensors with it, until the collector runs.
    node = _open(skeleton, path, depth)
    if node.kind == "tensor":
        return leaf(node.name)
    if node.kind == "plain":
        return decode(skeleton, path)
    children = [_unflatten(child, join(path, key), depth + 1, leaf) for key, child in node.children]
    match node.kind:
        case "list":
            return children
        case "tuple":
            return tuple(children)
        case _:
            return dict(zip((key for key, _ in node.children), children, strict=True))


def names(skeleton: object) -> dict[str, str]:
    """Return every tensor's path with the name of its tensor in the file, in the order of the tree.

    A tied alias has a path of its own and the name of the one that was written.
    Raises Damaged for a malformed skeleton.
    """
    found: dict[str, str] = {}
    unique = UniqueNames()
    for path, name in _tensors(skeleton, "", 0):
        found[unique.take(path or name)] = name
    return found


def fill(
    like: object,
    skeleton: object,
    leaf: Callable[[str, object], object],
    as_array: Callable[[object], Shaped | None],
    *,
    specs: Mapping[str, Spec],
) -> object:
    """Build a new tree with the structure and container types of `like` and the values of the skeleton.

    leaf: gives the array for a tensor name and the leaf of `like` in its place; called only when everything fits.
    as_array: tells the spec of a leaf of `like`, None if it is no array. specs: (dtype, shape) by tensor name, as in
    the file. Sequences fit by position and length, dicts and named tuples by key; plain values are the skeleton's.
    `like` stays as it is.
    Raises Mismatch with every difference by path, Damaged for a malformed skeleton.
    """
    lines: list[str] = []
    _compare(like, skeleton, "", 0, _Comparison(as_array, specs, lines))
    if lines:
        listed = "".join(f"\n  {line}" for line in sorted(lines))
        raise Mismatch(
            f"the checkpoint does not fit ({len(lines)} differences, nothing was changed):{listed}\n",
            hint="build the state as it was when it was saved, or load its arrays and choose among them",
        )
    return _build(like, skeleton, "", 0, leaf)


def differences(saved: Mapping[str, Spec], live: Mapping[str, Spec]) -> list[str]:
    """Compare (dtype, shape) by path; return one line for each difference, sorted by path, none if all fits."""
    lines: list[str] = []
    for path in sorted(saved.keys() | live.keys()):
        if path not in live:
            lines.append(f"{path}: only in the checkpoint")
        elif path not in saved:
            lines.append(f"{path}: only here")
        else:
            lines += _spec_differences(path, saved[path], live[path])
    return lines


class _Flattening:
    """One walk over a live tree."""

    __slots__ = ("_as_array", "_open", "_tied", "_unique", "_where", "arrays")

    def __init__(self, as_array: AsArray, where: str) -> None:
        self._as_array = as_array
        self._where = where
        self._unique = UniqueNames()
        self._tied: dict[Hashable, str] = {}
        self._open: set[int] = set()  # identities of the containers around the current value
        self.arrays: dict[str, HostArray] = {}

    def visit(self, value: object, path: str, depth: int) -> Json:
        """Return the skeleton of a value and keep its arrays."""
        kind = type(value)
        if kind in _SIMPLE:
            return encode(value, self._full(path))
        if kind is dict or kind is list or kind is tuple:
            return self._container(value, path, depth)
        try:
            array = self._as_array(value)
        except InvalidState as error:
            full = self._full(path)
            raise InvalidState(f"{full}: {error.message}", path=full, hint=error.hint) from error
        if array is not None:
            return {"$tensor": self._tensor(array, path)}
        if isinstance(value, (dict, list, tuple)) and not isinstance(value, (Counter, Enum)):
            return self._container(value, path, depth)
        return encode(value, self._full(path), depth)

    def _tensor(self, array: HostArray, path: str) -> str:
        # A tied alias uses up its path though nothing is written under it, so that `names` numbers the others alike.
        name = self._unique.take(path or self._where.rpartition("/")[2])
        if array.tie is not None:
            first = self._tied.setdefault((array.tie, array.dtype, array.shape), name)
            if first != name:
                return first
        self.arrays[name] = array
        return name

    def _container(self, value: Any, path: str, depth: int) -> Json:
        if id(value) in self._open:
            raise refusal(self._full(path), "contains itself", "a state must be a tree")
        if depth >= MAX_DEPTH:
            raise refusal(self._full(path), f"is nested deeper than {MAX_DEPTH} levels", "flatten the state")
        self._open.add(id(value))
        visit = self.visit
        depth += 1
        prefix = f"{path}/" if path else ""
        result: Json
        if isinstance(value, dict):
            result = self._mapping(value, path, depth)
        elif (fields := getattr(value, "_fields", None)) is not None and isinstance(value, tuple):
            content: dict[str, Json] = {
                field: visit(child, prefix + field, depth) for field, child in zip(fields, value, strict=True)
            }
            result = {"$namedtuple": [type(value).__name__, content]}
        else:
            children = [visit(child, f"{prefix}{index}", depth) for index, child in enumerate(value)]
            result = {"$tuple": children} if isinstance(value, tuple) else children
        self._open.discard(id(value))
        return result

    def _mapping(self, value: dict[Any, Any], path: str, depth: int) -> Json:
        visit = self.visit
        prefix = f"{path}/" if path else ""
        if all(type(key) is str and key[:1] != "$" for key in value):
            for key in value:
                if not key.isascii():
                    encode(key, self._full(prefix + key))  # refuses half a surrogate pair
            return {key: visit(child, prefix + key, depth) for key, child in value.items()}
        items: list[Json] = []
        for key, child in value.items():
            skeleton = encode_key(key, f"{self._full(path)}: its key {strict_text(key)}", depth)
            items.append([skeleton, visit(child, prefix + key_text(key), depth)])
        return {"$items": items}

    def _full(self, path: str) -> str:
        return f"{self._where}/{path}" if path else self._where


class _Node(NamedTuple):
    """One level of a skeleton, checked."""

    kind: Literal["tensor", "plain", "list", "tuple", "namedtuple", "dict"]
    name: str = ""
    """The tensor's name in the file."""
    children: tuple[tuple[Any, object], ...] = ()
    """(key, skeleton) of what a container holds; the key of a sequence is the position."""


_PLAIN = _Node("plain")


def _open(skeleton: object, path: str, depth: int) -> _Node:
    """Look at one level of a skeleton. Raises Damaged for everything that `flatten` would not have written."""
    if depth > MAX_DEPTH:
        raise malformed(path, f"it is nested deeper than {MAX_DEPTH} levels")
    if isinstance(skeleton, list):
        return _Node("list", children=tuple(enumerate(skeleton)))
    if not isinstance(skeleton, dict):
        return _PLAIN
    if not any(str(key)[:1] == "$" for key in skeleton):
        return _Node("dict", children=tuple(skeleton.items()))
    tag, content = tag_of(skeleton, path)
    match tag, content:
        case "$tensor", str() as name:
            return _Node("tensor", name)
        case "$tuple", list():
            return _Node("tuple", children=tuple(enumerate(content)))
        case "$namedtuple", [str(), dict() as fields]:
            return _Node("namedtuple", children=tuple(fields.items()))
        case "$items", list():
            return _Node("dict", children=tuple(decode_items(content, path).items()))
        case (("$int" | "$float" | "$complex" | "$bytes" | "$scalar" | "$set" | "$frozenset" | "$counter"), _):
            return _PLAIN
    raise malformed(path, f"{tag[:40]} cannot hold {strict_text(content)}")


def _tensors(skeleton: object, path: str, depth: int) -> Iterable[tuple[str, str]]:
    """Yield path and name of every tensor."""
    node = _open(skeleton, path, depth)
    if node.kind == "tensor":
        yield path, node.name
    for key, child in node.children:
        yield from _tensors(child, join(path, key), depth + 1)


class _Comparison(NamedTuple):
    """What a comparison needs at every level, and where it puts what it finds."""

    as_array: Callable[[object], Shaped | None]
    specs: Mapping[str, Spec]
    lines: list[str]


def _compare(like: object, skeleton: object, path: str, depth: int, comparison: _Comparison) -> None:
    """Collect every difference of a live tree and a skeleton; decode plain values too, so that building cannot fail."""
    node = _open(skeleton, path, depth)
    shown = path or "the state itself"
    shaped = None if _is_exact_container(like) else comparison.as_array(like)
    found = "tensor" if shaped is not None else _kind(like)
    if node.kind == "plain":
        decode(skeleton, path, depth)
    if shaped is not None and node.kind == "tensor":
        if node.name not in comparison.specs:
            raise malformed(path, f"its tensor {node.name[:100]!r} is in no file")
        comparison.lines.extend(_spec_differences(shown, comparison.specs[node.name], shaped.spec))
        return
    saved = _aligned(like, node) if found in _CONTAINERS and node.kind in _CONTAINERS else None
    if saved is None:
        if found != node.kind:
            comparison.lines.append(f"{shown}: a {_WORDS[node.kind]} in the checkpoint, a {_WORDS[found]} here")
        return
    live = _children(like)
    for key, child in live.items():
        below = join(path, key)
        if key in saved:
            _compare(child, saved[key], below, depth + 1, comparison)
        else:
            paths = list(_live_tensors(child, below, depth + 1, comparison.as_array)) or [below]
            comparison.lines.extend(f"{each}: only here" for each in paths)
    for key, child in saved.items():
        if key not in live:
            below = join(path, key)
            paths = [each for each, _ in _tensors(child, below, depth + 1)] or [below]
            comparison.lines.extend(f"{each}: only in the checkpoint" for each in paths)


def _build(like: Any, skeleton: object, path: str, depth: int, leaf: Callable[[str, object], object]) -> object:
    """Build the new tree; `_compare` has found no difference."""
    node = _open(skeleton, path, depth)
    if node.kind == "tensor":
        return leaf(node.name, like)
    if node.kind == "plain":
        return decode(skeleton, path, depth)
    saved = _aligned(like, node) or {}
    values = {
        key: _build(child, saved[key], join(path, key), depth + 1, leaf) for key, child in _children(like).items()
    }
    kind = type(like)
    if kind is dict:
        return values
    if isinstance(like, tuple):
        made = getattr(kind, "_make", kind)  # torch.Size and its like take the values as one argument
        return made(values.values())
    if kind is list:
        return list(values.values())
    result = copy.copy(like)  # keeps what subclasses carry: the factory of a defaultdict, attributes
    for key, value in values.items():
        result[key] = value
    return result


_CONTAINERS = frozenset({"list", "tuple", "namedtuple", "dict"})
_WORDS = {"namedtuple": "named tuple", "plain": "plain value"} | {
    kind: kind for kind in ("tensor", "list", "tuple", "dict")
}


def _is_exact_container(value: object) -> bool:
    return type(value) in (dict, list, tuple)


def _kind(value: object) -> str:
    """Return the word of `_Node.kind` for a live value that is no array."""
    if isinstance(value, (Counter, Enum)):
        return "plain"
    if isinstance(value, tuple):
        return "namedtuple" if hasattr(value, "_fields") else "tuple"
    return "dict" if isinstance(value, dict) else "list" if isinstance(value, list) else "plain"


def _children(like: Any) -> dict[Any, object]:
    """Return what a live container holds, by key, field or position."""
    if isinstance(like, dict):
        return dict(like)
    return dict(zip(getattr(like, "_fields", range(len(like))), like, strict=True))


def _aligned(like: Any, node: _Node) -> dict[Any, object] | None:
    """Return what a node holds under the keys of `like`; None where one has keys and the other positions."""
    live, saved = _kind(like), node.kind
    if {live, saved} <= {"dict", "namedtuple"}:
        return dict(node.children)
    if "dict" in (live, saved):
        return None
    fields = list(_children(like))
    values = [child for _, child in node.children]
    return {fields[index] if index < len(fields) else index: child for index, child in enumerate(values)}


def _live_tensors(value: object, path: str, depth: int, as_array: Callable[[object], Shaped | None]) -> Iterable[str]:
    """Yield the path of every array in a live value."""
    if not _is_exact_container(value) and as_array(value) is not None:
        yield path
    elif _kind(value) in _CONTAINERS and depth <= MAX_DEPTH:
        for key, child in _children(value).items():
            yield from _live_tensors(child, join(path, key), depth + 1, as_array)


def _spec_differences(path: str, saved: Spec, live: Spec) -> list[str]:
    lines = []
    if saved[0] != live[0]:
        lines.append(f"{path}: dtype {saved[0]} in the checkpoint, {live[0]} here")
    if saved[1] != live[1]:
        lines.append(f"{path}: shape {saved[1]} in the checkpoint, {live[1]} here")
    return lines

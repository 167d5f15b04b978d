"""The trace: how a state tree was taken apart, so that the same tree is not taken apart again.

Between two saves a training state hardly ever changes its structure: the same containers hold the same tensors, and a few
numbers have moved on. A trace tells whether that is so in a fraction of the time that flattening takes.
"""

from __future__ import annotations

from collections import Counter
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from highcamp.core.plain import encode
from highcamp.errors import InvalidState

if TYPE_CHECKING:
    from collections.abc import Iterable

    from highcamp.core.plain import Json

_UNCHANGING = frozenset({type(None), bool, int, float, str, bytes, complex})
"""What is the same value as long as it is the same object."""
_TENSOR: Final = object()
_Keys: TypeAlias = tuple[tuple[Any, ...], tuple[type, ...]]
"""The keys of a dict in order, and their types: 1, 1.0 and True are equal."""


class Trace:
    """One container of a tree, and those below it. skeleton: its JSON, as `tree.flatten` gives it."""

    __slots__ = ("_children", "_keys", "_kind", "skeleton")

    def __init__(self, kind: type, keys: _Keys | None, children: list[object], skeleton: Any) -> None:
        """children: a trace, a plain value, or the mark of a tensor for each. keys: of a dict."""
        self._kind: Any = kind
        self._keys, self._children = keys, children
        self.skeleton: Json = skeleton

    def again(self, value: Any, tensors: list[object]) -> Trace | None:
        """The trace of another tree: this very one if nothing is different; None if the structure is, as far as is seen.

        tensors: the leaves that are in the places of tensors are added to it, in the order of the tree; whether they are
        the same ones is for the caller to see.
        """
        if type(value) is not self._kind:
            return None
        children = self._children
        values: Iterable[Any]
        if self._keys is not None:
            if (tuple(value), tuple(map(type, value))) != self._keys:
                return None
            values = value.values()
        elif len(value) != len(children):
            return None
        else:
            values = value
        moved: dict[int, tuple[object, Json]] = {}
        for place, (old, new) in enumerate(zip(children, values, strict=True)):
            if old is _TENSOR:
                tensors.append(new)
            elif type(old) is Trace:
                below = old.again(new, tensors)
                if below is None:
                    return None
                if below is not old:
                    moved[place] = (below, below.skeleton)
            elif new is not old or type(new) not in _UNCHANGING:
                if type(new) is not type(old):
                    return None
                try:
                    moved[place] = (new, encode(new, ""))
                except InvalidState:
                    return None  # flattening says where it is
        return self._moved(moved) if moved else self

    def _moved(self, moved: dict[int, tuple[object, Json]]) -> Trace:
        children, parts = self._children.copy(), _parts(self.skeleton)
        for place, (child, part) in moved.items():
            children[place], parts[place] = child, part
        return Trace(self._kind, self._keys, children, _whole(self.skeleton, parts))


def trace(value: Any, skeleton: Any, tensors: list[tuple[str, object]]) -> Trace | None:
    """The trace of a tree that was flattened to a skeleton; None if its root is no container.

    tensors: the name and the leaf of each tensor are added to it, in the order of the tree.
    """
    if not isinstance(value, dict | list | tuple) or isinstance(value, Counter | Enum) or _tag(skeleton) == "$tensor":
        return None
    values = value.values() if isinstance(value, dict) else value
    children: list[object] = []
    for child, part in zip(values, _parts(skeleton), strict=True):
        if type(child) in _UNCHANGING:
            children.append(child)
        elif _tag(part) == "$tensor":
            tensors.append((part["$tensor"], child))
            children.append(_TENSOR)
        else:
            children.append(trace(child, part, tensors) or child)
    keys = (tuple(value), tuple(map(type, value))) if isinstance(value, dict) else None
    return Trace(type(value), keys, children, skeleton)


def _tag(skeleton: Any) -> str:
    """The mark of a JSON object that stands for something else, see `tree`; empty if it has none."""
    key = next(iter(skeleton), "") if type(skeleton) is dict else ""
    return key if key[:1] == "$" else ""


def _parts(skeleton: Any) -> list[Any]:
    """The JSON of what a container holds, in order."""
    match _tag(skeleton):
        case "":
            return list(skeleton.values()) if isinstance(skeleton, dict) else list(skeleton)
        case "$items":
            return [part for _, part in skeleton["$items"]]
        case "$namedtuple":
            return list(skeleton["$namedtuple"][1].values())
        case tag:
            return list(skeleton[tag])


def _whole(skeleton: Any, parts: list[Json]) -> Json:
    """The same container around other parts."""
    match _tag(skeleton):
        case "":
            return dict(zip(skeleton, parts, strict=True)) if isinstance(skeleton, dict) else parts
        case "$items":
            return {"$items": [[key, part] for (key, _), part in zip(skeleton["$items"], parts, strict=True)]}
        case "$namedtuple":
            name, fields = skeleton["$namedtuple"]
            return {"$namedtuple": [name, dict(zip(fields, parts, strict=True))]}
        case tag:
            return {tag: parts}

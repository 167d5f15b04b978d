"""A state that is passed, on its way back: a new one is built of what was saved, in the structure of another.

The way there is `live.capture_state`.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from highcamp.core import tree
from highcamp.core.plain import malformed
from highcamp.errors import Mismatch
from highcamp.run import live

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator

    from highcamp.run.tensors import Saved


def fill(
    like: object, saved: Callable[[str], Saved], objects: Iterable[str], *, where: str, is_stripped: bool = False
) -> Any:
    """A new tree with the structure of `like`. saved: gives the saved state of one of `objects`.

    is_stripped: the parts of `like` that are no weights have not been saved, and come back as they are. Raises Mismatch
    listing every difference, Damaged.
    """
    if live.is_jax_state(like):
        return _fill_jax(like, saved, objects, where=where, is_stripped=is_stripped)
    parts = live.parts_of(like)
    problems = [f"{name}: only in the checkpoint" for name in objects if name not in parts]
    given_back = {name for name in parts if name not in objects and is_stripped and not live.is_name_of_weights(name)}
    problems += [f"{name}: only here" for name in parts if name not in objects and name not in given_back]
    found = {name: saved(name) for name in parts if name in objects}
    leaves: dict[str, list[tuple[str, object]]] = {}
    for name, entry in found.items():
        try:
            leaves[name] = _leaves(parts[name], entry)
        except Mismatch as error:
            problems += [f"{name}/{line.strip()}" for line in error.message.splitlines()[1:] if line.strip()]
    if problems:
        for entry in found.values():
            entry.verify()  # a difference that is due to an altered file is damage
        raise live.mismatch(problems, where)
    filled = {
        name: part if name in given_back else _filled(part, found[name], leaves[name]) for name, part in parts.items()
    }
    return filled if live.is_dict_of_parts(like) else filled[live.WHOLE]


def _fill_jax(
    like: object, saved: Callable[[str], Saved], objects: Iterable[str], *, where: str, is_stripped: bool
) -> Any:
    """`fill` for JAX, whose module knows what fits: of `like` only shapes are needed, it may have been donated."""
    jax, entries = live.framework("jax"), {name: saved(name) for name in objects}
    # Which parts are objects of their own was decided when it was saved: a counter is a number first, and an array later.
    is_whole = entries.keys() == {live.WHOLE} and not _is_only_part(like)
    trees, tensors_of = dict[str, Any](), dict[str, list[Any]]()
    for name, entry in entries.items():
        found: list[Any] = []
        tensors_of[name] = found

        def stand_in(tensor: str, entry: Saved = entry, found: list[Any] = found) -> object:
            if tensor not in entry.specs:
                raise malformed(where, f"its tensor {tensor[:100]!r} is in no file")
            found.append(jax.Tensor(tensor, entry.specs[tensor]))
            return found[-1]

        trees[name] = tree.unflatten(entry.skeleton, stand_in)
    plain = jax.to_tree(like) if is_stripped else {}
    kept = {name: jax.KEPT for name in plain if name not in entries and not live.is_name_of_weights(name)}
    problems, likes = jax.fit(trees[live.WHOLE] if is_whole else {**trees, **kept}, like)
    if problems:
        for entry in entries.values():
            entry.verify()  # a difference that is due to an altered file is damage
        raise live.mismatch(sorted(problems), where)
    for name, entry in entries.items():
        arrays = _arrays_like([(each.name, likes.get(id(each))) for each in tensors_of[name]], entry)
        trees[name] = tree.unflatten(entry.skeleton, lambda _, arrays=arrays: next(arrays))  # type: ignore[misc]
    return jax.from_tree(trees[live.WHOLE] if is_whole else {**trees, **kept}, like)


def _is_only_part(like: object) -> bool:
    """Whether a state is a dict whose one entry has the name that a state without parts gets."""
    return type(like) is dict and like.keys() == {live.WHOLE} and live.is_dict_of_parts(live.plain(like))


def _leaves(like: object, saved: Saved) -> list[tuple[str, object]]:
    """For each place in the tree (tensor name, live leaf). Raises Mismatch."""
    found: list[tuple[str, object]] = []
    tree.fill(like, saved.skeleton, lambda name, leaf: found.append((name, leaf)), live.as_array, specs=saved.specs)
    return found


def _filled(like: object, saved: Saved, leaves: list[tuple[str, object]]) -> object:
    """A new tree with the structure of `like`, its tensors read and verified."""
    arrays = _arrays_like(leaves, saved)
    return tree.fill(like, saved.skeleton, lambda *_: next(arrays), live.as_array, specs=saved.specs)


def _arrays_like(leaves: list[tuple[str, object]], saved: Saved) -> Iterator[object]:
    """For each (tensor name, live leaf) the saved tensor as an array of the leaf's kind; leaves that are tied stay tied."""
    specs = saved.specs
    count = Counter(name for name, _ in leaves)
    made: dict[tuple[str, Hashable], tuple[str, Any, memoryview]] = {}
    keys = []
    for at, (name, like) in enumerate(leaves):
        tie = _tie(like) if count[name] > 1 else None
        key = (name, at if tie is None else tie)
        if key not in made:
            kind = (*live.frameworks_of(like), "")[0]
            made[key] = (kind, *live.fresh(kind, specs[name]))
        keys.append(key)
    _read(saved, [(name, memory) for (name, _), (_, _, memory) in made.items()])
    left = Counter(keys)
    copied: dict[tuple[str, Hashable], object] = {}  # of kinds that take no memory over
    for key, (_, like) in zip(keys, leaves, strict=True):
        left[key] -= 1
        kind, array, _ = made[key] if left[key] else made.pop(key)  # one that is copied once more is let go of at once
        if kind == "jax" and key in copied:
            yield copied[key] if left[key] else copied.pop(key)
            continue
        found = live.adopt(kind, array, like)
        if kind == "jax" and left[key]:
            copied[key] = found
        yield found


def _tie(leaf: object) -> Hashable | None:
    """What is equal for arrays over the same memory."""
    if "jax" in live.frameworks_of(leaf):
        tie: Hashable | None = live.framework("jax").tie(leaf)
        return tie
    array = live.as_array(leaf)
    return None if array is None else array.tie


def _read(saved: Saved, places: list[tuple[str, memoryview]]) -> None:
    """Read the tensors into their first place each, and copy them into the others."""
    first = dict(reversed(places))
    saved.read(first)
    for name, memory in places:
        if memory is not first[name]:
            memory[:] = first[name]

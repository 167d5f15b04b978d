"""Restoring: saved states back into live objects, their bytes read straight into the memory that the objects have.

Everything is compared before the first byte is read. Then all bytes of all objects are read and verified, then what is no
tensor follows: a damaged checkpoint is found when arrays are overwritten, and before anything else is.
"""

from __future__ import annotations

import functools
import random
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from highcamp.core.array import HostArray
from highcamp.core.tree import differences, flatten, unflatten
from highcamp.errors import Damaged, HighcampError, InvalidState, Mismatch
from highcamp.run import live

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy as np

    from highcamp.core.array import Spec
    from highcamp.run.tensors import Saved


class Overwritten(Damaged):
    """Damage that was found when live objects had been overwritten in part: they are undefined now."""


class _Place(NamedTuple):
    """A live array that has a path. memory: its bytes, writable, None if they cannot be read into. start: their address."""

    spec: Spec
    leaf: Any
    memory: memoryview | None = None
    start: int = 0


@dataclass
class _Target:
    """One live object, and where the tensors of its saved state go.

    live: tensor name -> the live arrays in its places, the first of which takes the bytes; at the others the object copies
    them itself. fresh: tensor name -> kind, new array and its memory, for all other tensors. tree: the saved state.
    """

    name: str
    obj: object
    saved: Saved
    live: dict[str, list[_Place]] = field(default_factory=dict)
    fresh: dict[str, tuple[str, Any, memoryview]] = field(default_factory=dict)
    tree: Any = None

    def build(self) -> None:
        """Build the tree over memory whose bytes are still to be read."""
        roots = live.translators_of(self.obj)
        loaded = live.loaded_frameworks()
        for tensor, spec in self.saved.specs.items():
            if tensor not in self.live:
                kind = roots[0] if roots else self.saved.kinds.get(tensor, "")
                # JAX's module places arrays itself, like those that they replace, and needs the bytes for that.
                kind = kind if kind in loaded and "jax" not in roots[:1] else ""
                self.fresh[tensor] = (kind, *live.fresh(kind, spec))

        def leaf(tensor: str) -> object:
            if tensor in self.live:
                return self.live[tensor][0].leaf
            array = self.fresh[tensor][1]
            return array.numpy() if isinstance(array, HostArray) else array

        self.tree = unflatten(self.saved.skeleton, leaf)

    def read(self) -> None:
        """Read and verify the tensors. Raises Damaged when bytes have landed already."""
        places = {tensor: memory for tensor, (_, _, memory) in self.fresh.items()}
        places |= {tensor: found[0].memory for tensor, found in self.live.items() if found[0].memory is not None}
        self.saved.read(places)

    def put(self) -> None:
        """Put the state into the object, and let go of it."""
        tree, self.tree = self.tree, None
        if any(kind == "jax" for kind, _, _ in self.fresh.values()):  # which copies, so it had to wait for the bytes
            tree = None
            arrays: dict[str, Any] = {tensor: found[0].leaf for tensor, found in self.live.items()}
            while self.fresh:
                tensor, (kind, array, _) = self.fresh.popitem()
                arrays[tensor] = live.adopt(kind, array, None)
            tree = unflatten(self.saved.skeleton, arrays.__getitem__)
        self.fresh.clear()
        _put(self.obj, tree)


def restore_objects(pairs: Mapping[str, tuple[object, Saved]], *, where: str) -> None:
    """Put saved states into live objects, after all of them have been compared: name -> (object, its saved state).

    Raises Mismatch listing every difference; then nothing has been changed. Raises Overwritten if a file turns out to be
    damaged: then arrays have been overwritten, and nothing else.
    """
    targets = [_Target(name, obj, saved) for name, (obj, saved) in pairs.items()]
    try:
        problems = _compare(targets)
    except HighcampError:
        _verify(targets)
        raise
    if problems:
        _verify(targets)
        raise live.mismatch(problems, where)
    touched: list[str] = []
    for target in targets:
        touched += [target.name] if target.live else []
        try:
            target.read()
        except HighcampError as error:
            raise _undefined(error, touched) from error
    for target in targets:
        try:
            target.put()
        except HighcampError:
            raise
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise Mismatch(
                f"{where}: {target.name} refused its saved state: {error}",
                path=where,
                hint=f"{_listed(pairs)} undefined now; build the objects as they were when it was saved, and restore again",
            ) from error


def _compare(targets: list[_Target]) -> list[str]:
    """Every difference between the targets and their saved states, as lines; the trees are built on the way."""
    problems: list[str] = []
    for target in targets:
        live.check_trackable(target.name, target.obj)
        saved = target.saved
        template, destinations = _template(target.obj)
        places: dict[str, _Place] = {}
        if template is not None:
            places = _places(target.name, template)
            specs = {path: saved.specs[tensor] for path, tensor in saved.paths.items()}
            here = {path: place.spec for path, place in places.items()}
            problems += [f"{target.name}/{line}" for line in differences(specs, here)]
        if destinations is not template:
            try:
                places = _places(target.name, destinations)
            except InvalidState:  # it has something that could not be saved, beside what was
                places = {}
        target.live = _fitting(places, saved)
    _part_overlapping(targets)
    for target in targets:
        target.build()
        for name in live.translators_of(target.obj)[:1]:
            problems += [f"{target.name}/{line}" for line in live.framework(name).check(target.obj, target.tree)]
    return problems


def _verify(targets: Iterable[_Target]) -> None:
    """A difference that is due to an altered file is damage, and the next checkpoint may be whole. Raises Damaged."""
    for target in targets:
        target.saved.verify()


def _undefined(error: HighcampError, touched: list[str]) -> HighcampError:
    """The error that says of live objects that they are undefined."""
    if not touched:
        return error
    told = f"{_listed(touched)} undefined now: restore another checkpoint; where they must survive, call verify() first"
    hint = f"{error.hint}; {told}" if error.hint else told
    if isinstance(error, Damaged):
        return Overwritten(error.message, path=error.path, hint=hint)
    error.hint = hint
    return error


def _listed(objects: Iterable[str]) -> str:
    words = ", ".join(objects)
    return f"{words} {'are' if ',' in words else 'is'}"


def _template(obj: object) -> tuple[object, object]:
    """The live tree that a saved state must fit, and the one whose arrays may take its bytes; None for no such tree."""
    for name in live.translators_of(obj):
        module = live.framework(name)
        template = module.template(obj)
        return template, module.destinations(obj, template) if name == "torch" else None
    numpy = sys.modules.get("numpy")
    is_container = isinstance(obj, dict | list) or (numpy is not None and isinstance(obj, numpy.ndarray))
    return (obj, obj) if is_container else (None, None)


_UNTIED = HostArray("U8", (0,), memoryview(b""))  # in place of any array: each path has an entry of its own


def _places(name: str, tree: object) -> dict[str, _Place]:
    """The arrays of a live tree by path. Raises InvalidState for one that files cannot hold."""
    found: list[_Place] = []

    def look(leaf: object) -> HostArray | None:
        place = _place(leaf)
        if place is None:
            return None
        found.append(place)
        return _UNTIED

    flat = flatten(tree, look, where=name)
    return dict(zip(flat.arrays, found, strict=True))


def _place(leaf: Any) -> _Place | None:
    """Where a live array lies; None for what is no array. Its bytes can be taken if they are its very memory, in its order."""
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    # A subclass of theirs may change what writing means.
    if torch is not None and type(leaf) in (torch.Tensor, torch.nn.Parameter):
        lying = live.framework("torch").lying(leaf)
        if lying is not None:
            return _Place(lying[0], leaf, *lying[1:])
    if numpy is not None and type(leaf) is numpy.ndarray and leaf.flags.c_contiguous and leaf.flags.writeable:
        spelling = _spelling(leaf.dtype)
        if spelling and leaf.size:
            memory = memoryview(leaf.reshape(-1).view(numpy.uint8))
            return _Place((spelling, leaf.shape), leaf, memory, leaf.ctypes.data)
    array = live.as_array(leaf)
    return None if array is None else _Place(array.spec, leaf)


@functools.cache
def _spelling(dtype: np.dtype[Any]) -> str:
    """How tensor files spell a data type of NumPy; "" for one that they do not hold, or hold in another byte order."""
    if sys.byteorder == "big" or dtype.byteorder == ">":
        return ""
    import numpy as np

    try:
        return HostArray.from_numpy(np.empty(0, dtype)).dtype
    except InvalidState:  # said where it is looked at in earnest
        return ""


def _fitting(here: Mapping[str, _Place], saved: Saved) -> dict[str, list[_Place]]:
    """The live arrays in the places of a saved tensor that are like it, where the first of them can take its bytes."""
    specs = saved.specs
    fitting: dict[str, list[_Place]] = {}
    for path, tensor in saved.paths.items():
        place = here.get(path)
        if place is not None and place.spec == specs[tensor]:
            fitting.setdefault(tensor, []).append(place)
    return {tensor: found for tensor, found in fitting.items() if _can_take(found)}


def _can_take(places: list[_Place]) -> bool:
    first = places[0]
    if first.memory is None and 0 not in first.spec[1]:
        return False
    return len(places) == 1 or len({type(place.leaf) for place in places}) == 1


def _part_overlapping(targets: list[_Target]) -> None:
    """Let live arrays that share memory with others, in another way than tied ones do, take their bytes by a copy.

    What the objects make of them then depends on the order in which they copy, not on the order in the files.
    """
    spans = [
        (place.start, place.start + len(place.memory), (at, tensor))
        for at, target in enumerate(targets)
        for tensor, found in target.live.items()
        for place in found
        if place.memory is not None
    ]
    spans.sort()
    cluster: set[tuple[int, int, tuple[int, str]]] = set()
    reach = 0
    for span in [*spans, (sys.maxsize, sys.maxsize, (0, ""))]:
        if span[0] >= reach:
            if len(cluster) > 1:
                for _, _, (at, tensor) in cluster:
                    targets[at].live.pop(tensor, None)
            cluster = set()
        cluster.add(span)
        reach = max(reach, span[1])


def _put(obj: object, tree: Any) -> None:
    for name in live.translators_of(obj):
        live.framework(name).restore(obj, tree)
        return
    numpy = sys.modules.get("numpy")
    if isinstance(obj, random.Random):
        live.set_python_random_state(obj, tree)
    elif numpy is not None and isinstance(obj, numpy.random.Generator):
        obj.bit_generator.state = tree["bit_generator"]
    elif numpy is not None and isinstance(obj, numpy.random.RandomState):
        obj.set_state(tree["legacy"])
    elif live.is_stateful(obj):
        cast("Any", obj).load_state_dict(tree)
    else:
        _put_in_place(obj, tree)


def _put_in_place(here: Any, saved: Any) -> None:
    """Containers of arrays: arrays that can keep their identity and take the saved bytes, all else is replaced."""
    numpy = sys.modules["numpy"]
    if isinstance(here, numpy.ndarray):
        if here is not saved:  # else its bytes have been read into it
            here[...] = saved
        return
    if _is_torch_tensor(here):
        live.framework("torch").assign(here, saved)
        return
    if isinstance(here, dict):
        for key in [key for key in here if key not in saved]:
            del here[key]
        places = list(saved)
    else:
        here[len(saved) :] = []
        here += saved[len(here) :]
        places = list(range(len(saved)))
    for key in places:
        before = here.get(key) if isinstance(here, dict) else here[key]
        saved_one = saved[key]
        is_container = isinstance(before, dict | list | numpy.ndarray) and type(before) is type(saved_one)
        if is_container or (_is_torch_tensor(before) and _is_torch_tensor(saved_one)):
            _put_in_place(before, saved_one)
        else:
            here[key] = saved_one


def _is_torch_tensor(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)

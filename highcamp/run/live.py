"""Live objects: what their state is, as a tree of arrays and plain values; and the state that is passed.

Here is the one door to the framework modules: an object or array of PyTorch, JAX or Keras is handed to the module that
bears its framework's name, which is imported only then, so only where the framework is in use already.
"""

from __future__ import annotations

import functools
import random
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, cast

from highcamp.core.array import HostArray
from highcamp.core.names import is_file_name
from highcamp.core.tree import flatten
from highcamp.errors import InvalidState, Mismatch, MissingExtra
from highcamp.run import tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
    from pathlib import Path

    from highcamp.core.array import Spec
    from highcamp.core.tree import Flat

    Flatten = Callable[[object, str], Flat]
    """Takes the tree of an object apart, the object's name given."""


class Framework(Protocol):
    """What a framework module offers (`highcamp.torch`, `highcamp.jax`, `highcamp.keras`)."""

    def to_host(self, leaf: object) -> HostArray | None:
        """The bytes of an array leaf, without a copy where possible; None if it is no array of this framework."""

    def from_host(self, array: HostArray, like: object | None) -> object:
        """A new array with memory of its own, placed like `like`."""

    def capture(self, obj: object) -> object | None:
        """The state tree of an object, live arrays as leaves; None if it is not one of this framework's kinds."""

    def template(self, obj: object) -> object | None:
        """The tree that a saved state must fit; None if that cannot be told beforehand."""

    def check(self, obj: object, tree: object) -> list[str]:
        """Further differences between a saved state and the object; changes nothing."""

    def restore(self, obj: object, tree: object) -> None:
        """Put a saved state into the object; its parameters keep their identity."""

    def export(self, state: Any, path: Path) -> None:
        """Write weights in the framework's own format: `.pt` from arrays by path, Keras's files from a model's state."""

    def random_state(self) -> object:
        """The state of the framework's global random generators."""

    def set_random_state(self, tree: object) -> None:
        """The reverse of `random_state`."""


def loaded_frameworks() -> list[str]:
    """The supported frameworks that this process has imported already."""
    return [name for name in ("torch", "jax", "keras") if name in sys.modules]


def framework(name: str) -> Any:
    """The framework module called `name`, a `Framework`; the only place where one is imported."""
    try:
        return _import(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("highcamp"):
            raise
        raise MissingExtra(
            f"this needs {error.name}, which is not installed", hint=f"pip install 'highcamp[{name}]'"
        ) from error


@functools.cache  # an import statement takes longer than all else that is done for a tensor
def _import(name: str) -> Any:
    if name == "torch":
        from highcamp import torch as module
    elif name == "jax":
        from highcamp import jax as module  # type: ignore[no-redef]
    else:
        from highcamp import keras as module  # type: ignore[no-redef]
    return module


_ROOTS = {
    "torch": "torch", "torchdata": "torch", "keras": "keras",
    "jax": "jax", "jaxlib": "jax", "flax": "jax", "equinox": "jax", "optax": "jax",
}  # fmt: skip


def frameworks_of(obj: object) -> tuple[str, ...]:
    """The frameworks that an object or array belongs to, the one that knows most of it first."""
    return _roots(type(obj))  # type: ignore[arg-type]  # a type can be hashed whatever its instances do


@functools.lru_cache(maxsize=4096)
def _roots(kind: type) -> tuple[str, ...]:
    """The frameworks that a type descends from: Keras on PyTorch descends from both, and Keras knows more."""
    found = {_ROOTS[root] for cls in kind.__mro__ if (root := cls.__module__.partition(".")[0]) in _ROOTS}
    return tuple(name for name in ("keras", "torch", "jax") if name in found)


def translators_of(obj: object) -> tuple[str, ...]:
    """The frameworks that translate a tracked object; JAX's module does so for a dict or list that holds a state of JAX."""
    is_holder = isinstance(obj, dict | list) and "jax" in sys.modules and framework("jax").can_restore(obj)
    return ("jax",) if is_holder else frameworks_of(obj)


def as_array(leaf: object) -> HostArray | None:
    """The bytes of an array leaf of NumPy or of any loaded framework; None if it is no array."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(leaf, numpy.ndarray):
        return HostArray.from_numpy(leaf, tie=(leaf.ctypes.data, leaf.strides) if leaf.size else None)
    for name in frameworks_of(leaf):
        array: HostArray | None = framework(name).to_host(leaf)
        if array is not None:
            return array
    return None


def flat(tree: object, where: str) -> Flat:
    """A state tree taken apart, see `tree.flatten`; the arrays may be views of live memory."""
    return flatten(tree, as_array, where=where)


def capture(name: str, obj: object, flat: Flatten = flat) -> Flat:
    """The state of a tracked object as a skeleton and arrays; the arrays may be views of live memory.

    flat: takes its tree apart, for callers that remember it. Raises InvalidState, with the path, for a value that files
    cannot hold, or if the object has no state to capture.
    """
    found = flat(_tree(name, obj), name)
    if not is_weights(obj):
        return found
    trained = frozenset(key for key, array in found.arrays.items() if array.is_trained)
    return replace(found, weights=True, trained=trained)


def is_weights(obj: object) -> bool:
    """Whether a tracked object is a model; an optimizer, a loader, a dict of whatever is none.

    An object of a framework module that stands for a model says so itself, in an attribute of this name.
    """
    if getattr(obj, "is_weights", None) is True:
        return True
    return any(framework(name).is_weights(obj) for name in frameworks_of(obj))


def _tree(name: str, obj: object) -> object:
    for framework_name in translators_of(obj):
        tree = framework(framework_name).capture(obj)
        if tree is not None:
            return tree
    numpy = sys.modules.get("numpy")
    if isinstance(obj, random.Random):
        return python_random_state(obj)
    if numpy is not None and isinstance(obj, numpy.random.Generator):
        return {"bit_generator": obj.bit_generator.state}
    if numpy is not None and isinstance(obj, numpy.random.RandomState):
        return {"legacy": obj.get_state(legacy=False)}
    if is_stateful(obj):
        return cast("Any", obj).state_dict()
    if isinstance(obj, dict | list) or (numpy is not None and isinstance(obj, numpy.ndarray)):
        return obj
    raise _no_state(name, obj)


def places(tensors: Sequence[object]) -> list[Hashable] | None:
    """Where the bytes of tensors lie, and how; as long as it is equal, so are their arrays. None if that cannot be told."""
    if not all("torch" in roots for roots in set(map(_roots, map(type, tensors)))):
        return None
    found: list[Hashable] | None = framework("torch").places(tensors) if tensors else []
    return found


def are_at(tensors: Sequence[object], places: Sequence[Hashable]) -> bool:
    """Whether these tensors, of which `places` were told, still lie there."""
    return not tensors or framework("torch").are_at(tensors, places) is True


def owned(optimizer: object) -> Iterable[object]:
    """The tensors that an optimizer writes to in its step: its parameters and its state."""
    if stands_for_optimizers(optimizer):
        return cast("Any", optimizer).owned()  # type: ignore[no-any-return]
    tensors: Iterable[object] = framework("torch").owned(optimizer)
    return tensors


def parameters(optimizer: object) -> list[object]:
    """The parameters that an optimizer has been given, trained or not."""
    if stands_for_optimizers(optimizer):
        return cast("Any", optimizer).parameters()  # type: ignore[no-any-return]
    found: list[object] = framework("torch").parameters(optimizer)
    return found


def before_step(obj: object, call: Callable[[], None]) -> Callable[[], None] | None:
    """Have `call` called before each step of an optimizer; returns what ends that, None if `obj` is no such optimizer.

    An object of a framework module that stands for optimizers says so itself, and answers `before_step`, `owned` and
    `parameters` in their place.
    """
    if stands_for_optimizers(obj):
        return cast("Any", obj).before_step(call)  # type: ignore[no-any-return]
    if not _is_torchs(obj):
        return None
    remove: Callable[[], None] | None = framework("torch").before_step(obj, call)
    return remove


def stands_for_optimizers(obj: object) -> bool:
    """Whether an object of a framework module says that it stands for optimizers."""
    return getattr(obj, "stands_for_optimizers", None) is True


def pin(view: memoryview) -> Callable[[], None] | None:
    """Have a framework whose device is in use copy to this memory at full rate; returns what ends that, or None."""
    return framework("torch").pin(view) if "torch" in sys.modules else None


def writes(tensors: Sequence[object]) -> list[int]:
    """For each tensor a count that grows with the writes that its framework notices."""
    counts: list[int] = framework("torch").writes(tensors) if tensors else []
    return counts


def _is_torchs(obj: object) -> bool:
    return "torch" in frameworks_of(obj)


def check_trackable(name: str, obj: object) -> None:
    """Whether an object is of a kind whose state can be captured. Raises InvalidState naming the kinds."""
    numpy = sys.modules.get("numpy")
    kinds: tuple[type, ...] = (random.Random, dict, list)
    if numpy is not None:
        kinds += (numpy.ndarray, numpy.random.Generator, numpy.random.RandomState)
    roots = frameworks_of(obj)
    if not (roots or is_stateful(obj) or isinstance(obj, kinds)):
        raise _no_state(name, obj)
    if roots == ("jax",) and not framework("jax").can_restore(obj):
        raise InvalidState(
            f"{name} is a {type(obj).__qualname__}, which never changes: what the loop makes of it is another object",
            path=name,
            hint="pass it, as in save(state, step=…) and restore(like=state), or track a dict that holds it and whose "
            "entries the loop replaces",
        )


def _no_state(name: str, obj: object) -> InvalidState:
    return InvalidState(
        f"{name} is a {type(obj).__module__}.{type(obj).__qualname__}, which has no state to save",
        path=name,
        hint="track objects with state_dict() and load_state_dict(), models, optimizers, random generators, or dicts of arrays",
    )


def is_stateful(obj: object) -> bool:
    """Whether it has a state in the manner of PyTorch."""
    return callable(getattr(obj, "state_dict", None)) and callable(getattr(obj, "load_state_dict", None))


def python_random_state(generator: random.Random | None = None) -> object:
    """The state of a Python generator, the global one by default: its words as an array, so that files stay small."""
    import numpy  # noqa: ICN001

    version, words, gauss = generator.getstate() if generator else random.getstate()
    return {"version": version, "words": numpy.array(words, dtype=numpy.uint32), "gauss": gauss}


def set_python_random_state(generator: random.Random | None, tree: Any) -> None:
    """The reverse of `python_random_state`."""
    state = (tree["version"], tuple(int(word) for word in tree["words"]), tree["gauss"])
    if generator is None:
        random.setstate(state)
    else:
        generator.setstate(state)


def mismatch(problems: list[str], where: str) -> Mismatch:
    """The error that lists every difference between a checkpoint and the live objects."""
    lines = "".join(f"\n  {line}" for line in problems)
    return Mismatch(
        f"{where} does not fit ({len(problems)} differences, nothing was changed):{lines}\n",
        path=where,
        hint="build the objects as they were when it was saved, or use another directory",
    )


def capture_state(state: object, flat: Flatten = flat) -> dict[str, Flat]:
    """A passed state as objects: the parts of a dict, or one object named "state". Raises InvalidState."""
    flats = {name: flat(part, name) for name, part in parts_of(plain(state)).items()}
    return {
        name: replace(found, weights=True, trained=_trained(name, found)) if is_name_of_weights(name) else found
        for name, found in flats.items()
    }


NAMES_OF_WEIGHTS = frozenset({"params", "model", "variables", "weights", "batch_stats", "ema"})
"""What Flax, Keras, Orbax and their examples call the part of a passed state that a prediction is made from."""


def is_name_of_weights(name: str) -> bool:
    """Whether a part of a passed state is weights; nothing but its name tells."""
    return name in NAMES_OF_WEIGHTS or name.startswith("ema_") or name.endswith("_ema")


def _trained(name: str, flat: Flat) -> frozenset[str]:
    """The tensors of a part of a passed state that are known to be trained; nothing but names tells."""
    if name in ("params", "weights"):
        return frozenset(flat.arrays)
    return frozenset(
        key for key in flat.arrays if key.startswith("params/")
    )  # a Flax model's other collections are not


def fresh(kind: str, spec: Spec) -> tuple[Any, memoryview]:
    """An array whose bytes are still to be set, for `adopt`, and its memory. kind: its framework, "" for NumPy."""
    if kind == "torch":
        made: tuple[Any, memoryview] = framework("torch").fresh(*spec)
        return made
    array = tensors.fresh(*spec)
    return array, array.data


def adopt(kind: str, array: Any, like: object | None) -> object:
    """What `fresh` has made and somebody has filled, as an array of its framework, placed like `like`.

    Its memory is taken over, except by JAX, and for devices that have their own.
    """
    if not isinstance(array, HostArray):
        return framework(kind).adopt(array, like)
    return framework(kind).from_host(array, like) if kind else array.numpy()


WHOLE = "state"
"""The object that holds a passed state which is no dict of parts."""


def plain(state: object) -> object:
    """A state as nested dicts, lists and tuples; JAX knows the node types that it and its libraries have registered."""
    return framework("jax").to_tree(state) if is_jax_state(state) else state


def is_jax_state(state: object) -> bool:
    """Whether a state has something of JAX in it."""
    return "jax" in sys.modules and bool(framework("jax").is_ours(state))


def parts_of(state: object) -> dict[str, object]:
    """The objects that a passed state, made `plain`, consists of."""
    return dict(state) if is_dict_of_parts(state) else {WHOLE: state}  # type: ignore[call-overload]


def is_dict_of_parts(state: object) -> bool:
    """Whether each entry of a dict may be an object of its own: names that can be file names, and no bare arrays."""
    return (
        type(state) is dict
        and bool(state)
        and all(is_file_name(name) and name.lower() != "progress" for name in state)
        and len({name.lower() for name in state}) == len(state)
        and not any(as_array(part) is not None for part in state.values())
    )


def arrays_of(name: str, tree: Any) -> Any:
    """A tree with every NumPy array in it as one of the framework called `name`."""
    numpy = sys.modules.get("numpy")
    if isinstance(tree, dict):
        return {key: arrays_of(name, child) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(arrays_of(name, child) for child in tree)
    if numpy is not None and isinstance(tree, numpy.ndarray):
        return framework(name).from_host(HostArray.from_numpy(tree), None)
    return tree


def loader_order(loader: object) -> object | None:
    """The state of its own that decides a loader's next epoch, taken before `iter()`; None if only global ones do."""
    return framework("torch").order_state(loader) if is_torch_loader(loader) else None


def loader_position(loader: object) -> object | None:
    """A loader's state in the middle of an epoch; None for one that has none."""
    return framework("torch").capture(loader) if is_torch_loader(loader) else None


def loader_resume(loader: object, order: object, position: object, skip: int) -> Iterator[Any] | None:
    """The rest of an epoch after `skip` batches; None for a loader of no framework."""
    if not is_torch_loader(loader):
        return None
    iterator: Iterator[Any] = framework("torch").resume_iter(
        loader, arrays_of("torch", order), skip, arrays_of("torch", position)
    )
    return iterator


def is_torch_loader(loader: object) -> bool:
    """Whether it is a DataLoader of torch, or one derived from it."""
    data = sys.modules.get("torch.utils.data")
    return data is not None and isinstance(loader, data.DataLoader)

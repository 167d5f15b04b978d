"""Live objects: what their state is, whether a saved state fits, and how it gets back in.

Here is the one door to the framework modules: an object or array of PyTorch, JAX or Keras is handed to the module that
bears its framework's name, which is imported only then, so only where the framework is in use already.
"""

from __future__ import annotations

import functools
import random
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

from highcamp.core.array import HostArray
from highcamp.core.names import is_file_name
from highcamp.core.tree import differences, fill, flatten, names, unflatten
from highcamp.errors import HighcampError, InvalidState, Mismatch, MissingExtra

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from highcamp.core.array import Spec
    from highcamp.core.tree import Flat


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


@dataclass(frozen=True)
class Saved:
    """The saved state of one object.

    skeleton: its tree. tensors: by their names. kinds: the framework whose array a tensor was, by its name.
    """

    skeleton: Any
    tensors: dict[str, HostArray] = field(repr=False)
    kinds: Mapping[str, str] = field(default_factory=dict, repr=False)

    def specs(self) -> dict[str, Spec]:
        """Data type and shape of every tensor by path, tied ones under each of their paths."""
        return {path: self.tensors[name].spec for path, name in names(self.skeleton).items()}


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


def _import(name: str) -> Any:
    if name == "torch":
        from highcamp import torch as module
    elif name == "jax":
        from highcamp import jax as module  # type: ignore[no-redef]
    else:
        from highcamp import keras as module  # type: ignore[no-redef]
    return module


_ROOTS = {"torch": "torch", "torchdata": "torch", "jax": "jax", "jaxlib": "jax", "keras": "keras"}


def _frameworks_of(obj: object) -> tuple[str, ...]:
    return _roots(type(obj))  # type: ignore[arg-type]  # a type can be hashed whatever its instances do


@functools.lru_cache(maxsize=4096)
def _roots(kind: type) -> tuple[str, ...]:
    """The frameworks that a type descends from: Keras on PyTorch descends from both, and Keras knows more."""
    found = {_ROOTS[root] for cls in kind.__mro__ if (root := cls.__module__.partition(".")[0]) in _ROOTS}
    return tuple(name for name in ("keras", "torch", "jax") if name in found)


def as_array(leaf: object) -> HostArray | None:
    """The bytes of an array leaf of NumPy or of any loaded framework; None if it is no array."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(leaf, numpy.ndarray):
        return HostArray.from_numpy(leaf, tie=(leaf.ctypes.data, leaf.strides) if leaf.size else None)
    for name in _frameworks_of(leaf):
        array: HostArray | None = framework(name).to_host(leaf)
        if array is not None:
            return array
    return None


def capture(name: str, obj: object) -> Flat:
    """The state of a tracked object as a skeleton and arrays; the arrays may be views of live memory.

    Raises InvalidState, with the path, for a value that files cannot hold, or if the object has no state to capture.
    """
    return flatten(_tree(name, obj), as_array, where=name)


def _tree(name: str, obj: object) -> object:
    for framework_name in _frameworks_of(obj):
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
    if _is_stateful(obj):
        return cast("Any", obj).state_dict()
    if isinstance(obj, dict | list) or (numpy is not None and isinstance(obj, numpy.ndarray)):
        return obj
    raise _no_state(name, obj)


def check_trackable(name: str, obj: object) -> None:
    """Whether an object is of a kind whose state can be captured. Raises InvalidState naming the kinds."""
    numpy = sys.modules.get("numpy")
    kinds: tuple[type, ...] = (random.Random, dict, list)
    if numpy is not None:
        kinds += (numpy.ndarray, numpy.random.Generator, numpy.random.RandomState)
    if not (_frameworks_of(obj) or _is_stateful(obj) or isinstance(obj, kinds)):
        raise _no_state(name, obj)


def _no_state(name: str, obj: object) -> InvalidState:
    return InvalidState(
        f"{name} is a {type(obj).__module__}.{type(obj).__qualname__}, which has no state to save",
        path=name,
        hint="track objects with state_dict() and load_state_dict(), models, optimizers, random generators, or dicts of arrays",
    )


def _is_stateful(obj: object) -> bool:
    return callable(getattr(obj, "state_dict", None)) and callable(getattr(obj, "load_state_dict", None))


def restore_objects(pairs: Mapping[str, tuple[object, Saved]], *, where: str) -> None:
    """Put saved states into live objects, after all of them have been compared: name -> (object, its saved state).

    Raises Mismatch listing every difference; then nothing has been changed.
    """
    problems: list[str] = []
    trees: dict[str, object] = {}
    for name, (obj, saved) in pairs.items():
        check_trackable(name, obj)
        trees[name] = unflatten(saved.skeleton, _rebuild(obj, saved))
        problems += [f"{name}/{line}" for line in _differences(name, obj, saved, trees[name])]
    if problems:
        raise mismatch(problems, where)
    for name, (obj, _) in pairs.items():
        try:
            _put(obj, trees[name])
        except HighcampError:
            raise
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise Mismatch(
                f"{where}: {name} refused its saved state: {error}",
                path=where,
                hint=f"objects before {name} have been restored already; build the objects as they were when it was saved",
            ) from error


def mismatch(problems: list[str], where: str) -> Mismatch:
    """The error that lists every difference between a checkpoint and the live objects."""
    lines = "".join(f"\n  {line}" for line in problems)
    return Mismatch(
        f"{where} does not fit ({len(problems)} differences, nothing was changed):{lines}\n",
        path=where,
        hint="build the objects as they were when it was saved, or use another directory",
    )


def _rebuild(obj: object, saved: Saved) -> Any:
    """How the tensors of `obj` come back: as arrays of its framework, or of the one each was; tied ones are one array."""
    roots = _frameworks_of(obj)
    loaded = loaded_frameworks()
    built: dict[str, object] = {}

    def leaf(name: str) -> object:
        if name not in built:
            array = saved.tensors[name]
            kind = roots[0] if roots else saved.kinds.get(name, "")
            built[name] = framework(kind).from_host(array, None) if kind in loaded else array.numpy()
        return built[name]

    return leaf


def _differences(name: str, obj: object, saved: Saved, tree: object) -> list[str]:
    problems: list[str] = []
    for framework_name in _frameworks_of(obj):
        module = framework(framework_name)
        template = module.template(obj)
        if template is not None:
            problems += _compare(name, template, saved)
        problems += module.check(obj, tree)
        return problems
    numpy = sys.modules.get("numpy")
    if isinstance(obj, dict | list) or (numpy is not None and isinstance(obj, numpy.ndarray)):
        problems += _compare(name, obj, saved)
    return problems


def _compare(name: str, template: object, saved: Saved) -> list[str]:
    flat = flatten(template, as_array, where=name)
    live = {path: flat.arrays[entry].spec for path, entry in names(flat.skeleton).items()}
    return differences(saved.specs(), live)


def _put(obj: object, tree: Any) -> None:
    for framework_name in _frameworks_of(obj):
        framework(framework_name).restore(obj, tree)
        return
    numpy = sys.modules.get("numpy")
    if isinstance(obj, random.Random):
        set_python_random_state(obj, tree)
    elif numpy is not None and isinstance(obj, numpy.random.Generator):
        obj.bit_generator.state = tree["bit_generator"]
    elif numpy is not None and isinstance(obj, numpy.random.RandomState):
        obj.set_state(tree["legacy"])
    elif _is_stateful(obj):
        cast("Any", obj).load_state_dict(tree)
    else:
        _put_in_place(obj, tree)


def _put_in_place(live: Any, saved: Any) -> None:
    """Containers of arrays: arrays that can keep their identity and take the saved bytes, all else is replaced."""
    numpy = sys.modules["numpy"]
    if isinstance(live, numpy.ndarray):
        live[...] = saved
        return
    if _is_torch_tensor(live):
        framework("torch").assign(live, saved)
        return
    if isinstance(live, dict):
        for key in [key for key in live if key not in saved]:
            del live[key]
        places = list(saved)
    else:
        live[len(saved) :] = []
        live += saved[len(live) :]
        places = list(range(len(saved)))
    for key in places:
        before = live.get(key) if isinstance(live, dict) else live[key]
        saved_one = saved[key]
        is_container = isinstance(before, dict | list | numpy.ndarray) and type(before) is type(saved_one)
        if is_container or (_is_torch_tensor(before) and _is_torch_tensor(saved_one)):
            _put_in_place(before, saved[key])
        else:
            live[key] = saved[key]


def _is_torch_tensor(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


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


def capture_state(state: object) -> dict[str, Flat]:
    """A passed state as objects: the parts of a dict, or one object named "state". Raises InvalidState."""
    return {name: flatten(part, as_array, where=name) for name, part in _parts(_plain(state)).items()}


def fill_state(like: object, saved: Callable[[str], Saved], objects: Iterable[str], *, where: str) -> Any:
    """The reverse: a tree with the structure of `like`. saved: gives the saved state of one of `objects`.

    Raises Mismatch listing every difference.
    """
    plain = _plain(like)
    parts = _parts(plain)
    problems = [f"{name}: only in the checkpoint" for name in objects if name not in parts]
    problems += [f"{name}: only here" for name in parts if name not in objects]
    found = {name: saved(name) for name in parts if name in objects}
    filled: dict[str, object] = {}
    for name, entry in found.items():
        specs = {key: array.spec for key, array in entry.tensors.items()}
        try:
            filled[name] = fill(parts[name], entry.skeleton, _leaf_like(entry), as_array, specs=specs)
        except Mismatch as error:
            problems += [f"{name}/{line.strip()}" for line in error.message.splitlines()[1:] if line.strip()]
    if problems:
        raise mismatch(problems, where)
    whole = {name: filled[name] for name in parts} if _is_dict_of_parts(plain) else filled[WHOLE]
    return framework("jax").from_tree(whole, like) if _is_jax_state(like) else whole


WHOLE = "state"
"""The object that holds a passed state which is no dict of parts."""


def _plain(state: object) -> object:
    """A state as nested dicts, lists and tuples; JAX knows the node types that it and its libraries have registered."""
    return framework("jax").to_tree(state) if _is_jax_state(state) else state


def _is_jax_state(state: object) -> bool:
    return "jax" in sys.modules and bool(framework("jax").is_ours(state))


def _parts(state: object) -> dict[str, object]:
    return dict(state) if _is_dict_of_parts(state) else {WHOLE: state}  # type: ignore[call-overload]


def _is_dict_of_parts(state: object) -> bool:
    """Whether each entry of a dict may be an object of its own: names that can be file names, and no bare arrays."""
    return (
        type(state) is dict
        and bool(state)
        and all(is_file_name(name) and name.lower() != "progress" for name in state)
        and len({name.lower() for name in state}) == len(state)
        and not any(as_array(part) is not None for part in state.values())
    )


def _leaf_like(saved: Saved) -> Callable[[str, object], object]:
    """A tensor as an array of the kind of the live one in its place."""

    def leaf(name: str, like: object) -> object:
        roots = _frameworks_of(like)
        array = saved.tensors[name]
        return framework(roots[0]).from_host(array, like) if roots else array.numpy()

    return leaf


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

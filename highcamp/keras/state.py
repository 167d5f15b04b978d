"""Translation: the state of Keras models, optimizers, callbacks and random generators, out of live objects and back.

A model is a flat tree `{"dense/kernel": Variable, …}` over `model.variables`: weights, and the state of every
SeedGenerator, which `.keras` and `.weights.h5` files lack. Its architecture rides along as plain JSON under
`ARCHITECTURE`, so that an export can rebuild it. An optimizer is a flat tree over `optimizer.variables`: iterations,
learning rate, slots, moving averages; its class rides along under `CLASS`, because AdamW has the variables of Adam.
"""

from __future__ import annotations

import contextlib
import json
import sys
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras.src.backend.common import global_state
from keras.src.random import seed_generator as seeds
from keras.src.utils.rng_utils import GLOBAL_RANDOM_SEED

from highcamp.core.array import HostArray
from highcamp.core.tree import differences
from highcamp.errors import InvalidState, Mismatch
from highcamp.keras.labels import ARCHITECTURE, CLASS, differ_by_counters, layer_labels, optimizer_labels
from highcamp.keras.numbers import as_number

if TYPE_CHECKING:
    from collections.abc import Mapping

# What of a callback changes from epoch to epoch. Keras resets it in every `on_train_begin` and offers no way to save it.
_CALLBACK_ATTRIBUTES: dict[type, tuple[str, ...]] = {
    keras.callbacks.EarlyStopping: ("wait", "best", "best_epoch", "best_weights", "stopped_epoch"),
    keras.callbacks.ReduceLROnPlateau: ("wait", "cooldown_counter", "best"),
    keras.callbacks.ModelCheckpoint: ("best", "_batches_seen_since_last_saving", "_last_batch_seen"),
    keras.callbacks.SwapEMAWeights: ("_ema_weights_in_model",),
}

_architectures: weakref.WeakKeyDictionary[Any, tuple[int, Any]] = weakref.WeakKeyDictionary()


# ------------------------------------------------------------------------------------------- what the door asks for


def to_host(leaf: object) -> HostArray | None:
    """The bytes of a Keras variable, a view of live memory where the backend allows one; None for anything else.

    On JAX the view must be dropped before the next training step: while it lives, the step cannot reuse the buffer.
    """
    return HostArray.from_numpy(_view(leaf)) if isinstance(leaf, keras.Variable) else None


def from_host(array: HostArray, like: object | None) -> object:  # noqa: ARG001  (a Variable places its value itself)
    """The saved bytes as a NumPy array; `restore` copies it into memory of the backend."""
    return array.numpy()


def capture(obj: object) -> object | None:
    """The state tree of a model, layer, metric, optimizer, callback or SeedGenerator, live variables as leaves.

    None: none of Keras's kinds. Raises InvalidState for a model without variables yet, and for a callback whose state
    is not known.
    """
    if isinstance(obj, keras.Model):
        if keras.backend.backend() == "jax":
            obj.jax_state_sync()  # while an epoch runs, the values of model and optimizer are elsewhere
        return model_state(obj)
    if isinstance(obj, keras.optimizers.Optimizer):
        return {**dict(zip(optimizer_labels(obj), _variables(obj), strict=True)), CLASS: _class(obj)}
    if isinstance(obj, keras.callbacks.Callback):
        return callback_state(obj)
    if isinstance(obj, keras.random.SeedGenerator):
        return {"state": obj.state}
    if isinstance(obj, keras.Layer | keras.metrics.Metric):
        return dict(zip(layer_labels(obj, obj.variables), obj.variables, strict=True))
    return None


def is_weights(obj: object) -> bool:
    """Whether the state of an object is that of a model or a layer, so that it stays when only weights are kept."""
    return isinstance(obj, keras.Layer)


def template(obj: object) -> object | None:  # noqa: ARG001
    """None: `check` compares, because integer types differ between backends and names between models of one process."""
    return None


def check(obj: object, tree: object) -> list[str]:
    """Every difference between a saved tree and the live object, as lines; [] fits. Nothing is changed.

    An optimizer that is not built yet is built first by `restore`, so it is compared only if it is built.
    """
    if isinstance(obj, keras.callbacks.Callback):
        return [] if isinstance(tree, dict) else [f"is not a callback's state but a {type(tree).__name__}"]
    if not isinstance(tree, dict):
        return [f"is not a Keras state but a {type(tree).__name__}"]
    is_optimizer = isinstance(obj, keras.optimizers.Optimizer)
    if is_optimizer and tree.get(CLASS, _class(obj)) != _class(obj):
        return [f"{CLASS}: {tree[CLASS]} in the checkpoint, {_class(obj)} here"]
    live = _live_variables(obj)
    return [] if live is None else _differences(_variables_of(tree), live)


def restore(obj: object, tree: object) -> None:
    """Assign a saved tree to the live object's variables, bit for bit; they keep their identity.

    Integers are converted between the widths that backends use for counters and seeds; everything else must be equal
    in shape and dtype. Raises Mismatch listing every difference, before the first assignment.
    """
    problems = check(obj, tree)
    if problems:
        raise Mismatch(
            "the saved state does not fit:" + "".join(f"\n  {line}" for line in problems),
            hint="build and compile the model as it was when it was saved",
        )
    if not isinstance(tree, dict):
        return
    if isinstance(obj, keras.callbacks.Callback):
        set_callback_state(obj, tree)
        return
    live = _live_variables(obj)
    if live is None:
        raise InvalidState(
            f"{type(obj).__name__} has no variables yet, so nothing can be restored into it",
            hint="build it first: model.build(input_shape), or optimizer.build(model.trainable_variables)",
        )
    for (name, variable), value in zip(live.items(), _in_order(_variables_of(tree), live), strict=True):
        assign(variable, np.asarray(value), name)


def random_state() -> dict[str, Any]:
    """What Keras itself draws from: the seed of `set_random_seed`, and the global SeedGenerator if there is one yet.

    Python's and NumPy's generators are not in it, and neither is PyTorch's.
    """
    generator = global_state.get_global_attribute(seeds.GLOBAL_SEED_GENERATOR)
    return {
        "seed": global_state.get_global_attribute(GLOBAL_RANDOM_SEED),
        "generator": None if generator is None else generator.state,
    }


def set_random_state(tree: Any) -> None:
    """The reverse of `random_state`; draws no number from any generator.

    The seed itself is left as the script has set it: it only says whether `set_random_seed` was called.
    """
    saved = tree["generator"]
    if saved is None:
        # Made anew by the first unseeded call, from Python's generator, whose state is restored as well.
        global_state.set_global_attribute(seeds.GLOBAL_SEED_GENERATOR, None)
        return
    generator = global_state.get_global_attribute(seeds.GLOBAL_SEED_GENERATOR)
    if generator is None:
        generator = keras.random.SeedGenerator(seed=0)  # with a seed: without one it would draw from Python's generator
        global_state.set_global_attribute(seeds.GLOBAL_SEED_GENERATOR, generator)
    assign(generator.state, np.asarray(saved), "global seed generator")


# ------------------------------------------------------------------------------------------------------------ models


def model_state(model: Any) -> dict[str, Any]:
    """A model's variables by name, such as {"conv2d/kernel": Variable}, and its architecture as plain JSON.

    Names Keras numbered itself are numbered within this model; equal names are told apart by "~2", "~3", …
    Raises InvalidState if the model is not built.
    """
    if not model.built:
        raise InvalidState(
            f"the model {model.name!r} is not built yet: it has no weights to save or restore",
            hint="start it with keras.Input(shape), or call model.build(input_shape) before training",
        )
    return {
        **dict(zip(layer_labels(model, model.variables), model.variables, strict=True)),
        ARCHITECTURE: architecture(model),
    }


def architecture(model: Any) -> Any:
    """The model as Keras serializes it, as plain JSON; None for a class that does not say how it is made.

    Serializing a large model takes longer than saving a small one, so the answer is kept while the model is unchanged.
    """
    known = _architectures.get(model)
    if known is not None and known[0] == len(model.variables):
        return known[1]
    found: Any = None
    # get_config() of a user's class may raise anything; the weights are worth saving all the same.
    with contextlib.suppress(Exception):
        found = json.loads(model.to_json())
    if not _is_plain(found):
        found = None
    _architectures[model] = (len(model.variables), found)
    return found


def _is_plain(value: Any) -> bool:
    """Whether a serialized model nests less deeply than a state tree may, and holds only finite numbers."""
    queue = deque([(value, 0)])
    while queue:
        entry, depth = queue.popleft()
        if depth > 80:
            return False
        if isinstance(entry, float) and not np.isfinite(entry):
            return False
        if isinstance(entry, dict | list):
            children = entry.values() if isinstance(entry, dict) else entry
            queue.extend((child, depth + 1) for child in children)
    return True


# -------------------------------------------------------------------------------------------------------- optimizers


def _variables(optimizer: Any) -> list[Any]:
    return list(optimizer.variables)


def _variables_of(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A saved tree without what rides along."""
    return {name: value for name, value in tree.items() if not isinstance(value, str) and name != ARCHITECTURE}


def _class(optimizer: Any) -> str:
    inner = getattr(optimizer, "inner_optimizer", None)  # of one that scales the loss
    return type(optimizer).__name__ + (f"({_class(inner)})" if inner is not None else "")


def _live_variables(obj: Any) -> dict[str, Any] | None:
    """The variables of a live object by name; None if it has not been built."""
    if isinstance(obj, keras.Model) and not obj.built:
        return None
    if isinstance(obj, keras.optimizers.Optimizer):
        return dict(zip(optimizer_labels(obj), _variables(obj), strict=True)) if obj.built else None
    if isinstance(obj, keras.random.SeedGenerator):
        return {"state": obj.state}
    return dict(zip(layer_labels(obj, obj.variables), obj.variables, strict=True))


# --------------------------------------------------------------------------------------------------------- callbacks


def has_callback_state(callback: object) -> bool:
    """Whether it is known what this callback has to remember."""
    return isinstance(callback, tuple(_CALLBACK_ATTRIBUTES)) or (
        callable(getattr(callback, "state_dict", None)) and callable(getattr(callback, "load_state_dict", None))
    )


def callback_state(callback: Any) -> dict[str, Any]:
    """What a callback remembers from epoch to epoch; weights it keeps are arrays.

    Known are Keras's own, and any with `state_dict()` and `load_state_dict()`. Raises InvalidState for others.
    """
    if callable(getattr(callback, "state_dict", None)) and callable(getattr(callback, "load_state_dict", None)):
        return {"state_dict": callback.state_dict()}
    for kind, attributes in _CALLBACK_ATTRIBUTES.items():
        if isinstance(callback, kind):
            return {name: _plain(getattr(callback, name)) for name in attributes if hasattr(callback, name)}
    raise InvalidState(
        f"{type(callback).__name__} has no state that could be saved",
        hint="give it state_dict() and load_state_dict(state)",
    )


def set_callback_state(callback: Any, tree: Mapping[str, Any]) -> None:
    """The reverse of `callback_state`; to be called after every `on_train_begin` has run, because those reset it."""
    if "state_dict" in tree:
        callback.load_state_dict(tree["state_dict"])
        return
    for name, value in tree.items():
        known = any(name in names for kind, names in _CALLBACK_ATTRIBUTES.items() if isinstance(callback, kind))
        if known:
            setattr(callback, name, value)


def _plain(value: Any) -> Any:
    """Numbers of a backend or of NumPy as Python's; lists of weights stay lists of arrays."""
    if isinstance(value, list | tuple):
        return [np.asarray(entry) for entry in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    number = as_number(value)
    return np.asarray(keras.ops.convert_to_numpy(value)) if number is None else number


# --------------------------------------------------------------------------------------------------------- variables


def _view(variable: Any) -> np.ndarray[Any, Any]:
    """A variable's value as NumPy, sharing memory on PyTorch and JAX where it lies in this machine's memory."""
    if variable._value is None:  # noqa: SLF001  (asking for `value` would try to initialize it anew)
        raise InvalidState(
            f"{variable.path} is empty: on JAX the values are elsewhere while an epoch runs",
            hint="capture the model first, or reach it through a callback's self.model, which brings them back",
        )
    value = variable.value
    backend = keras.backend.backend()
    if backend == "torch":
        return _torch_view(value)
    if backend == "jax":
        return np.asarray(value)
    return np.asarray(keras.ops.convert_to_numpy(value))


def _torch_view(tensor: Any) -> np.ndarray[Any, Any]:
    torch = sys.modules["torch"]  # the backend in use, so it is imported
    import ml_dtypes

    host = tensor.detach().cpu()
    if host.dtype == torch.bfloat16:  # NumPy knows it only through ml_dtypes: the same bytes under another name
        viewed: np.ndarray[Any, Any] = host.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return viewed
    try:
        return np.asarray(host.numpy())
    except TypeError:
        return np.asarray(keras.ops.convert_to_numpy(tensor))


def assign(variable: Any, value: np.ndarray[Any, Any], name: str) -> None:
    """Put bytes into a variable: a copy of its own, never the memory of `value`.

    JAX takes an aligned NumPy array as it is, and the first donated step would then write into the checkpoint's memory.
    """
    wanted = np.dtype(dtype_of(variable))
    if value.dtype != wanted:
        if value.dtype.kind not in "iu" or wanted.kind not in "iu":
            raise Mismatch(f"{name} is {value.dtype} in the checkpoint, {wanted} here")
        value = value.astype(wanted)  # seeds are int64, int32 or uint32, depending on the backend; they wrap alike
    tensor = keras.ops.convert_to_tensor(value, dtype=variable.dtype)
    variable.assign(keras.ops.copy(tensor) if keras.backend.backend() == "jax" else tensor)


def dtype_of(variable: Any) -> np.dtype[Any]:
    """The NumPy type of a variable's values, those of ml_dtypes included."""
    import ml_dtypes

    name = str(variable.dtype)
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def _differences(saved: Mapping[str, Any], live: Mapping[str, Any]) -> list[str]:
    """Lines for every name, shape and dtype that differs; the integer types of counters and seeds may."""
    if list(saved) != list(live) and differ_by_counters(saved, live):
        saved = dict(zip(live, saved.values(), strict=True))
    ours = {name: HostArray.from_numpy(np.asarray(value)).spec for name, value in saved.items()}
    theirs = {}
    for name, variable in live.items():
        empty = np.empty((0,), dtype_of(variable))
        dtype = HostArray.from_numpy(empty).spec[0]
        if name in saved and np.asarray(saved[name]).dtype.kind in "iu" and dtype_of(variable).kind in "iu":
            dtype = ours[name][0]
        theirs[name] = (dtype, tuple(int(size) for size in variable.shape))
    return differences(ours, theirs)


def _in_order(saved: Mapping[str, Any], live: Mapping[str, Any]) -> list[Any]:
    """The saved values in the order of the live variables: by name, or by position where only Keras's counters differ."""
    if set(saved) == set(live):
        return [saved[name] for name in live]
    return list(saved.values())

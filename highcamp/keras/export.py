"""Export: a saved model as the files Keras itself writes."""

from __future__ import annotations

import contextlib
from collections import deque
from typing import TYPE_CHECKING, Any

import keras
from keras.src.saving.serialization_lib import SafeModeScope

from highcamp.errors import InvalidArgument, InvalidState
from highcamp.keras import state
from highcamp.keras.labels import ARCHITECTURE

if TYPE_CHECKING:
    import os

SUFFIXES = (".weights.h5", ".keras")

_MODELS = {"Functional": keras.Model, "Sequential": keras.Sequential}
_IN_PYTHON = (
    "for a Keras model: checkpoint.restore(model=model), then model.save(path); other models: .safetensors, .npz or .pt"
)


def export(tree: Any, path: str | os.PathLike[str]) -> None:
    """Rebuild a saved model and write it to `path`, as `.keras` or `.weights.h5` says.

    tree: what `checkpoint.state("model")` gives. No code comes from the checkpoint. The optimizer in the file is a fresh
    one. Raises InvalidState if the model cannot be rebuilt from its description, Mismatch if the weights do not fit it,
    InvalidArgument for another suffix.
    """
    name = str(path)
    if not name.endswith(SUFFIXES):
        raise InvalidArgument(f"{name} has no suffix that Keras writes", path=name, hint=f"use {' or '.join(SUFFIXES)}")
    model = rebuild(tree)
    if name.endswith(".weights.h5"):
        model.save_weights(name)
    else:
        model.save(name)


def rebuild(tree: Any) -> Any:
    """The model that a saved tree describes, with its weights and seeds.

    Only classes of Keras itself are used, and those that this process has registered with
    `keras.saving.register_keras_serializable`: nothing is imported by a name from the checkpoint, and a Lambda layer,
    which holds byte code, is refused. Raises InvalidState for that, and if there is no description.
    """
    description = tree.get(ARCHITECTURE) if isinstance(tree, dict) else None
    if not isinstance(description, dict):
        raise InvalidState(
            "this checkpoint does not say how its model is made: it was not saved by Keras, or the class does not tell",
            hint=_IN_PYTHON,
        )
    _check(description)
    kind: Any = _MODELS.get(str(description.get("class_name"))) or _registered(description)
    if not _is_model_class(kind):
        raise InvalidState(
            f"the description is of a {description.get('class_name')!r}, not of a model", hint=_IN_PYTHON
        )
    # The scope, not the argument: enable_unsafe_deserialization() overrules every argument.
    with SafeModeScope(True):  # noqa: FBT003
        try:
            model: Any = kind.from_config(description["config"])
            if not model.built and description.get("build_config"):
                model.build_from_config(description["build_config"])
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise InvalidState(f"the model cannot be rebuilt from its description: {error}", hint=_IN_PYTHON) from error
        # Loss and metrics may be functions of the training script; the weights do not need them.
        with contextlib.suppress(TypeError, ValueError, KeyError, AttributeError):
            if description.get("compile_config"):
                model.compile_from_config(description["compile_config"])
    state.restore(model, tree)
    return model


def _check(description: dict[str, Any]) -> None:
    """Refuse a description that names anything but Keras's own and registered classes, before it is used."""
    queue = deque([value for key, value in description.items() if key != "compile_config"])
    queue.append(
        {key: value for key, value in description.items() if key in ("class_name", "module", "registered_name")}
    )
    while queue:
        entry = queue.popleft()
        if isinstance(entry, list):
            queue.extend(entry)
        elif isinstance(entry, dict):
            queue.extend(entry.values())
            kind, module = entry.get("class_name"), entry.get("module")
            if kind in ("Lambda", "__lambda__"):
                raise InvalidState("the model has a Lambda layer, which is code and is never run", hint=_IN_PYTHON)
            is_ours = module is None or module == "builtins" or str(module).partition(".")[0] == "keras"
            if isinstance(kind, str) and not is_ours and _registered(entry) is None:
                raise InvalidState(
                    f"the model needs {module}.{kind}, which is not registered in this process",
                    hint=f"decorate it with keras.saving.register_keras_serializable and import it; or {_IN_PYTHON}",
                )


def _registered(entry: dict[str, Any]) -> Any:
    name = entry.get("registered_name")
    return keras.saving.get_registered_object(name) if isinstance(name, str) else None


def _is_model_class(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, keras.Model)

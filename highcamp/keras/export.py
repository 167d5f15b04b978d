"""Export: a saved model as the files Keras itself writes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import keras

from highcamp.errors import InvalidArgument, InvalidState
from highcamp.keras import state

if TYPE_CHECKING:
    import os

SUFFIXES = (".weights.h5", ".keras")


def export(tree: Any, path: str | os.PathLike[str]) -> None:
    """Rebuild a saved model and write it to `path`, as `.keras` or `.weights.h5` says.

    tree: what `checkpoint.state("model")` gives. The model is rebuilt in Keras's safe mode: no code comes from the
    checkpoint. The optimizer in the file is a fresh one. Raises InvalidState if the model cannot be rebuilt from its
    description, Mismatch if the weights do not fit it, InvalidArgument for another suffix.
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
    """The model that a saved tree describes, with its weights and seeds; never runs code from the checkpoint.

    Raises InvalidState if there is no description, or if it needs a class or function that is not there.
    """
    description = tree.get(state.ARCHITECTURE) if isinstance(tree, dict) else None
    if not isinstance(description, dict):
        raise InvalidState(
            "this checkpoint does not say how its model is made: it was not saved by Keras, or its class has no get_config()",
            hint="build the model in Python and use checkpoint.restore(model=model), then model.save(path)",
        )
    model = _from_description(description)
    state.restore(model, tree)
    return model


def _from_description(description: dict[str, Any]) -> Any:
    # Loss and metrics may be functions of the training script; the weights do not need them.
    without = {key: value for key, value in description.items() if key != "compile_config"}
    for attempt, last in ((description, False), (without, True)):
        try:
            # safe_mode: a Lambda layer holds byte code, which is refused rather than run.
            model = keras.saving.deserialize_keras_object(json.loads(json.dumps(attempt)), safe_mode=True)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            if not last:
                continue
            raise InvalidState(
                f"the model cannot be rebuilt from its description: {error}",
                hint="register custom classes with keras.saving.register_keras_serializable, import them, and export in Python",
            ) from error
        if isinstance(model, keras.Model):
            return model
        break
    raise InvalidState(
        f"the description is of a {description.get('class_name')!r}, not of a model",
        hint="build the model in Python and use checkpoint.restore(model=model)",
    )

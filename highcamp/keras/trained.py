"""The trained: a model in `fit`, its optimizers, and the History that `fit` returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

from highcamp.core.names import is_file_name
from highcamp.errors import InvalidState

if TYPE_CHECKING:
    from highcamp.keras.dataset import EpochDataset
    from highcamp.run.run import Run


def build(model: Any, data: EpochDataset | None) -> None:
    """Have the variables made before they are restored: TensorFlow would make them with the first batch.

    data: tells the shape. Raises InvalidState where nothing does.
    """
    if not model.built and data is not None:
        model._symbolic_build(data_batch=data.batch(0, 0))  # noqa: SLF001
    if not model.built:
        raise InvalidState(
            f"CheckpointCallback: the model {model.name!r} is not built when training begins, so nothing could be "
            "restored into it after a restart",
            hint="start it with keras.Input(shape), or call model.build(input_shape) before fit",
        )
    if model.optimizer is not None and not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)


def objects(model: Any) -> dict[str, Any]:
    """The model and its optimizers, those that a model of several has under names of its own included."""
    found = {"model": model}
    for attribute, value in [("optimizer", model.optimizer), *sorted(vars(model).items())]:
        name = attribute.lstrip("_")
        is_optimizer = isinstance(value, keras.optimizers.Optimizer) and is_file_name(name)
        if is_optimizer and not any(value is known for known in found.values()):
            found[name] = value
    return found


def fill_history(model: Any, run: Run, done: int) -> None:
    """Put the `done` epochs of earlier attempts before those of this one in Keras's own History."""
    history = getattr(model, "history", None)
    if not isinstance(history, keras.callbacks.History) or not done:
        return
    rows = [row for row in run.history.epochs() if 0 < row.epoch <= done]
    history.epoch[:] = [row.epoch - 1 for row in rows]
    history.history.clear()
    for row in rows:
        for name, value in row.metrics.items():
            history.history.setdefault(name, []).append(value)

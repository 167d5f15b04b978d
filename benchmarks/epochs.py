"""A small Keras model with a checkpoint after each epoch: how long `fit` is held up."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.limits import write_durably

if TYPE_CHECKING:
    from collections.abc import Callable

HIDDEN = 290  # 87,000 parameters: with Adam's two moments 1.04 MB


class Epochs:
    """Fits of the same model from the same seed with one callback: "highcamp", "keras" or "keras weights"."""

    def __init__(self, directory: str, callback: str, epochs: int, rows: int) -> None:
        """directory: its own, empty. epochs: of each fit, at least 2. rows: of data; an epoch should outlast a save."""
        os.environ.setdefault("KERAS_BACKEND", "jax")
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._callback, self._epochs = callback, epochs
        self._count = 0
        generator = np.random.default_rng(0)
        self._x = generator.random((rows, 64), np.float32)
        self._y = generator.integers(0, 10, rows)

    def _model(self) -> Any:
        import keras

        keras.utils.set_random_seed(0)
        layers = [
            keras.Input((64,)),
            *(keras.layers.Dense(width, "relu") for width in (HIDDEN, 220)),
            keras.layers.Dense(10),
        ]
        model = keras.Sequential(layers)
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    def fit(self) -> dict[str, float]:
        """Train anew; the median pause of all epochs but the first, which is told apart, and the least a save can do.

        The last checkpoint is loaded and compared with the model. Raises ValueError if it differs.
        """
        import keras

        self._count += 1
        place = self._directory / f"fit-{self._count}"
        place.mkdir()
        model, path = self._model(), place / f"model{'.weights.h5' if 'weights' in self._callback else '.keras'}"
        if self._callback == "highcamp":
            from highcamp.keras import CheckpointCallback

            callback: Any = CheckpointCallback(place / "run", verbose=0)
        else:
            callback = keras.callbacks.ModelCheckpoint(path, save_weights_only="weights" in self._callback)
        pauses: list[float] = []
        callback.on_epoch_end = _timed(callback.on_epoch_end, pauses)
        model.fit(
            self._x, self._y, validation_data=(self._x, self._y), epochs=self._epochs, batch_size=64, verbose=0,
            callbacks=[callback],
        )  # fmt: skip
        size = 4 * sum(int(np.prod(variable.shape)) for variable in [*model.variables, *model.optimizer.variables])
        self._compare(model, place / "run" if self._callback == "highcamp" else path)
        limit: list[float] = []
        _timed(write_durably, limit)(place / "limit.bin", bytes(size))
        shutil.rmtree(place)
        return {
            "pause": statistics.median(pauses[1:]),
            "first_epoch": pauses[0],
            "write_small": limit[0],
            "state_bytes": float(size),
        }

    def _compare(self, model: Any, path: Path) -> None:
        import keras

        import highcamp

        other = self._model()
        if path.is_dir():
            checkpoint = highcamp.open(path).last
            assert checkpoint is not None
            checkpoint.restore(model=other)
        elif path.name.endswith(".weights.h5"):
            other.load_weights(path)
        else:
            other = keras.saving.load_model(path)
        pairs = zip(model.get_weights(), other.get_weights(), strict=True)
        if not all(np.array_equal(one, two) for one, two in pairs):
            raise ValueError(f"{self._callback}: the weights loaded are not those that were saved")


def _timed(action: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """`action`, with the seconds that each call takes appended to `seconds`."""

    def timed(*args: Any, **named: Any) -> Any:
        began = time.perf_counter()
        found = action(*args, **named)
        seconds.append(time.perf_counter() - began)
        return found

    return timed

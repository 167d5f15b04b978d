"""A training script as users write it, run by the tests, killed, and run again: `train_script.py MODE OUT [EPOCH.BATCH]`.

MODE: "arrays" (shuffled arrays, a checkpoint per epoch), "steps" (the same, one every 3 batches), "kept" (one per epoch, and
every batch in shared memory) or "data" (EpochDataset with workers, one every 3 batches). EPOCH.BATCH: where it kills itself.
At the end every variable and the History go to OUT.npz.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import keras
import numpy as np

from highcamp import Every
from highcamp.keras import CheckpointCallback, EpochDataset


class KillAt(keras.callbacks.Callback):
    """SIGKILL when a batch is done: no handler, no clean-up, a save perhaps under way."""

    def __init__(self, at):
        super().__init__()
        self.at, self.epoch = tuple(int(number) for number in at.split(".")), 0

    def on_epoch_begin(self, epoch, logs=None):
        """Note the epoch."""
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        """Die."""
        if (self.epoch, batch) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def main(mode, out, kill_at=None):
    """Train four epochs of eight batches."""
    keras.utils.set_random_seed(7)
    rng = np.random.default_rng(0)
    x = rng.random((32, 6)).astype("float32")
    y = (x.sum(axis=1, keepdims=True) > 3).astype("float32")
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, activation="relu"),
            keras.layers.Dropout(0.5),
            keras.layers.Dropout(0.2, seed=3),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(1, activation="sigmoid"),
        ]
    )
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    data = EpochDataset(x, y, batch_size=4, seed=3, workers=2) if mode == "data" else None
    callbacks = [
        keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.9),
        keras.callbacks.ReduceLROnPlateau(patience=1, factor=0.5),
        keras.callbacks.EarlyStopping(patience=50, restore_best_weights=True),
        CheckpointCallback(
            out,
            every=Every(epochs=1) if mode in ("arrays", "kept") else Every(steps=3),
            memory_every=Every(steps=1) if mode == "kept" else None,
            data=data,
        ),
        *([KillAt(kill_at)] if kill_at else []),
    ]
    options = {"epochs": 4, "validation_data": (x, y), "verbose": 0, "callbacks": callbacks}
    history = model.fit(data, **options) if mode == "data" else model.fit(x, y, batch_size=4, **options)
    values = [np.array(keras.ops.convert_to_numpy(each)) for each in (*model.variables, *model.optimizer.variables)]
    rows = {f"history/{name}": np.array(row) for name, row in history.history.items()}
    np.savez(f"{out}.npz", *values, epochs=np.array(history.epoch), predictions=model.predict(x, verbose=0), **rows)


if __name__ == "__main__":
    for one in sys.argv[1].split(","):
        main(one, str(Path(sys.argv[2]) / one), *sys.argv[3:])
        keras.backend.clear_session()

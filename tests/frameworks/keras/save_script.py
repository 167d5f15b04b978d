"""A script that is killed within a save of ModelCheckpoint: `save_script.py FOLDER [kill]`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import keras

from highcamp.keras import ModelCheckpoint


def main(folder, *, kill):
    """Save epoch 1; with `kill`, die half-way through the save of epoch 2."""
    path = Path(folder) / "best.keras"
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(512)])
    model.compile("sgd", "mse")
    callback = ModelCheckpoint(path, save_best_only=True)
    callback.set_model(model)
    callback.on_train_begin()
    if not kill:
        sys.stdout.write(f"{callback.best}\n")
        return
    callback.on_epoch_end(0, {"val_loss": 0.5})
    whole = model.save

    def half(target, **options):
        whole(target, **options)
        os.truncate(target, Path(target).stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    model.save = half
    callback.on_epoch_end(1, {"val_loss": 0.1})


if __name__ == "__main__":
    main(sys.argv[1], kill=sys.argv[2:] == ["kill"])

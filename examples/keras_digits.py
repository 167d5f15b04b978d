"""Handwritten digits with Keras: kill it whenever you like, run it again, and it ends as if nothing had happened.

    KERAS_BACKEND=jax python examples/keras_digits.py --directory runs/digits
    KERAS_BACKEND=jax python examples/keras_digits.py --directory runs/digits    # after a crash: goes on; after the end: says so

The last lines are digests of the final weights, of the optimizer's state, of the metrics and of the history. They are the
same for every run of this script on one machine and one backend, however often it was killed.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import keras
import numpy as np
import xxhash
from sklearn.datasets import load_digits

from highcamp import Every, Keep
from highcamp.keras import CheckpointCallback


def build() -> keras.Model:
    """A small network with dropout, a batch normalization and an optimizer with two slots per weight."""
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(3e-3), loss, metrics=["accuracy"])
    return model


def data() -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """1,000 images to train on, which `fit` shuffles, and 797 to validate with."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype("float32")
    return (images[:1000], labels[:1000]), (images[1000:], labels[1000:])


def digest(variables: list[Any]) -> str:
    """A short digest of the values of variables, to the last bit."""
    hasher = xxhash.xxh3_128()
    for variable in variables:
        hasher.update(np.ascontiguousarray(keras.ops.convert_to_numpy(variable)).tobytes())
    return hasher.hexdigest()


def main() -> None:
    """Train, or go on with training, and print the digests."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--directory", default="runs/keras-digits", help="the run")
    parser.add_argument("--epochs", type=int, default=8, help="how many to train in all")
    parser.add_argument("--steps", type=int, help="save every so many steps, beside every epoch")
    arguments = parser.parse_args()

    keras.utils.set_random_seed(7)
    train, validation = data()
    model = build()
    callback = CheckpointCallback(
        arguments.directory,
        monitor="val_loss",
        every=Every(epochs=1, steps=arguments.steps),
        keep=Keep(best=1, last=2),
    )
    history = model.fit(
        *train,
        batch_size=50,
        epochs=arguments.epochs,
        validation_data=validation,
        validation_batch_size=200,
        verbose=0,
        callbacks=[
            keras.callbacks.ReduceLROnPlateau(factor=0.5, patience=1),
            keras.callbacks.EarlyStopping(patience=5),
            callback,  # last, so that it saves what the others have done
        ],
    )

    metrics = model.evaluate(*validation, verbose=0, return_dict=True)
    print(
        f"best: epoch {callback.best.epoch if callback.best else '-'}, {callback.best.path if callback.best else '-'}"
    )
    print("weights  ", digest(model.variables))
    print("optimizer", digest(model.optimizer.variables))
    print("metrics  ", json.dumps(metrics))
    print("history  ", digest(list(history.history.values())), f"{len(history.epoch)} epochs")


if __name__ == "__main__":
    main()

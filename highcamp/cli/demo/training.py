"""The training script of the demo, as a user would write it; `highcamp demo` starts it, kills it, and starts it again.

    python -m highcamp.cli.demo.training DIRECTORY --epochs 50

What it has to say goes to stdout, one JSON object per line. Run twice, it goes on: the only line that makes it so is
the CheckpointCallback.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

SEED = 42
BATCH_SIZE = 32
LEARNING_RATE = 0.002
VALIDATION_COUNT = TEST_COUNT = 500


def tell(**facts: Any) -> None:
    """One line for `highcamp demo`."""
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> None:
    """Train the network of the demo in seven steps and evaluate its last and its best weights."""
    parser = argparse.ArgumentParser(description="The training script of highcamp demo.")
    parser.add_argument("directory")
    parser.add_argument("--epochs", type=int, default=50)
    options = parser.parse_args(arguments)

    import keras
    import numpy as np
    from sklearn.datasets import load_digits

    from highcamp.keras import CheckpointCallback

    keras.utils.set_random_seed(SEED)

    # 1. Load
    images, labels = load_digits(return_X_y=True)
    tell(step=1, images=len(images))

    # 2. Preprocess
    images = (images / 16).reshape(-1, 8, 8, 1).astype("float32")
    tell(step=2)

    # 3. Make training, validation and test sets
    order = np.random.default_rng(SEED).permutation(len(images))
    test, validation, training = np.split(order, [TEST_COUNT, TEST_COUNT + VALIDATION_COUNT])
    tell(step=3, training=len(training), validation=len(validation), test=len(test))

    # 4. Define
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, activation="relu"),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    tell(step=4, weights=model.count_params())

    # 5. Compile
    model.compile(
        optimizer=keras.optimizers.Adam(LEARNING_RATE), loss="sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    tell(step=5)

    # 6. Train, with checkpoints
    tell(step=6)
    checkpoints = CheckpointCallback(options.directory, monitor="val_loss", mode="min")
    model.fit(
        images[training],
        labels[training],
        validation_data=(images[validation], labels[validation]),
        epochs=options.epochs,
        batch_size=BATCH_SIZE,
        callbacks=[checkpoints],
        verbose=0,
    )

    # 7. Evaluate the last weights, which are in the model now, and the best ones
    def evaluate() -> dict[str, float]:
        loss, accuracy = model.evaluate(images[test], labels[test], verbose=0)
        return {
            "loss": float(loss),
            "accuracy": float(accuracy),
            "right": round(float(accuracy) * len(test)),
            "of": len(test),
        }

    tell(step=7)
    last = evaluate()
    best = checkpoints.best
    if best is not None:
        best.restore(model=model)
    tell(last=last, best=evaluate())


if __name__ == "__main__":
    main()

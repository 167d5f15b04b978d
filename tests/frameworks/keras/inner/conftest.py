"""For the checks that run once per backend, each time in a process of its own."""

from __future__ import annotations

import keras
import numpy as np
import pytest


def pytest_configure(config):
    """Name our marks: pytest is strict."""
    config.addinivalue_line("markers", "once: the same on every backend, so it runs on one of them (the quickest)")


@pytest.fixture(autouse=True)
def _seeded():
    """Every check draws the same numbers."""
    keras.utils.set_random_seed(1)


@pytest.fixture
def points():
    """Inputs (24, 4) and targets (24, 1), float32."""
    rng = np.random.default_rng(0)
    x = rng.random((24, 4)).astype("float32")
    return x, x.sum(axis=1, keepdims=True)


@pytest.fixture
def make_model():
    """A small compiled model; built anew by each call, with the same initial weights after the same seed."""

    def make(optimizer="adam", metrics=("mae",), **compiled):
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [
                keras.Input((4,)),
                keras.layers.Dense(6, activation="relu", name="hidden"),
                keras.layers.Dropout(0.3),
                keras.layers.BatchNormalization(),
                keras.layers.Dense(1, name="out"),
            ]
        )
        # Eager, because most of these models live for a few batches: tracing would take most of the time.
        model.compile(optimizer, "mse", metrics=list(metrics), run_eagerly=True, **compiled)
        return model

    return make


@pytest.fixture
def values_of():
    """Every variable of a model and its optimizer, as bytes."""

    def values(model):
        variables = [*model.variables, *(model.optimizer.variables if model.optimizer else [])]
        return [np.asarray(keras.ops.convert_to_numpy(variable)).tobytes() for variable in variables]

    return values

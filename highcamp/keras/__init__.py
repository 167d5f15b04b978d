"""Keras: the whole of highcamp inside `model.fit`, a drop-in `ModelCheckpoint`, and data that resume within an epoch.

    from highcamp.keras import CheckpointCallback

    model.fit(x, y, epochs=50, callbacks=[CheckpointCallback("runs/digits", monitor="val_loss")])

Works on Keras 3 with TensorFlow, PyTorch and JAX. The functions are what `highcamp.run.live` asks of a framework module.
"""

from __future__ import annotations

from highcamp.keras.callback import CheckpointCallback
from highcamp.keras.dataset import EpochDataset
from highcamp.keras.export import export
from highcamp.keras.model_checkpoint import ModelCheckpoint
from highcamp.keras.state import (
    capture,
    check,
    from_host,
    is_weights,
    random_state,
    restore,
    set_random_state,
    template,
    to_host,
)

__all__ = [
    "CheckpointCallback",
    "EpochDataset",
    "ModelCheckpoint",
    "capture",
    "check",
    "export",
    "from_host",
    "is_weights",
    "random_state",
    "restore",
    "set_random_state",
    "template",
    "to_host",
]

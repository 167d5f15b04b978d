"""Keras: the whole of highcamp inside `model.fit`, a drop-in `ModelCheckpoint`, and data that resume within an epoch.

    from highcamp.keras import CheckpointCallback

    model.fit(x, y, epochs=50, callbacks=[CheckpointCallback("runs/digits", monitor="val_loss")])

Works on Keras 3.15 and newer, below 4, with TensorFlow, PyTorch and JAX; importing it with another version raises
MissingExtra. The functions are what `highcamp.run.live` asks of a framework module.
"""

from __future__ import annotations

from highcamp.keras.supported import check_version

check_version()

from highcamp.keras.callback import CheckpointCallback  # noqa: E402  (another Keras has not what these import)
from highcamp.keras.dataset import EpochDataset  # noqa: E402
from highcamp.keras.export import export  # noqa: E402
from highcamp.keras.model_checkpoint import ModelCheckpoint  # noqa: E402
from highcamp.keras.state import (  # noqa: E402
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

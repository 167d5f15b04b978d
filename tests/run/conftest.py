from __future__ import annotations

import math

import numpy as np
import pytest

import highcamp
from highcamp import Checkpointer, Keep

LOSSES = [0.5, 0.2, math.nan, 0.3]


@pytest.fixture
def where(tmp_path):
    """The directory of the run; it does not exist yet."""
    return tmp_path / "runs" / "digits"


@pytest.fixture
def run(where):
    """A run of four epochs of ten steps, everything kept; the weights are the number of epochs done."""
    weights = {"dense": {"kernel": np.zeros((2, 3), np.float32), "bias": np.zeros(3)}, "rate": 0.5}
    with Checkpointer(where, monitor="val_loss", keep=Keep(best=1, last=100), verbose=0) as checkpointer:
        checkpointer.track(model=weights, steps=[0])
        for epoch in checkpointer.epochs(4):
            for _ in checkpointer.batches(range(10)):
                pass
            weights["dense"]["kernel"] += 1
            weights["dense"]["bias"] += 1
            checkpointer.log(val_loss=LOSSES[epoch], loss=1.0)
    return highcamp.open(where)

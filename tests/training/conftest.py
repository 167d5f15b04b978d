from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import highcamp
from highcamp import Checkpointer

WORKERS = Path(__file__).parent / "workers"
ROOT = Path(highcamp.__file__).parent.parent


@pytest.fixture
def where(tmp_path):
    """The directory of the run; it does not exist yet."""
    return tmp_path / "runs" / "digits"


@pytest.fixture
def train(where):
    """A training script: trains to the end and returns its closed Checkpointer; calling it again is starting it again.

    values: what is logged after each epoch, a number (the val_loss), a dict of metrics, or None for nothing at all. The
    weights are three times the number of epochs done.
    """

    def script(values, *, directory=None, monitor="val_loss", count=None, verbose=0, each=None, **options):
        weights = {"w": np.zeros(3)}
        place = where if directory is None else directory
        with Checkpointer(place, monitor=monitor, verbose=verbose, **options) as checkpointer:
            checkpointer.track(model=weights)
            for epoch in checkpointer.epochs(len(values) if count is None else count):
                weights["w"] += 1
                logged = values[epoch]
                if isinstance(logged, dict):
                    checkpointer.log(logged)
                elif logged is not None:
                    checkpointer.log(val_loss=logged)
                if each is not None:
                    each(checkpointer, epoch)
        return checkpointer

    return script


@pytest.fixture
def start():
    """Start a program of `tests/training/workers`, or a piece of code, in a process of its own and wait for its end."""

    def run(program, *arguments, **options):
        command = [str(WORKERS / program)] if program.endswith(".py") else ["-c", program]
        return subprocess.run(
            [sys.executable, *command, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"},
            capture_output=True, text=True, timeout=120, check=False, **options,
        )  # fmt: skip

    return run
